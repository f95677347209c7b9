"""SASRec against pmixer's port: the recorded states, logits and losses of three Adam steps, post-norm and pre-norm."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.training import losses


def original_state(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the port's parameters; its joint query-key-value projection is cut in three."""
    renamed = {"item_table.weight": weights["item_emb.weight"], "position_table.weight": weights["pos_emb.weight"]}
    for ours, theirs in (("attention_norm", "attention_layernorms"), ("forward_norm", "forward_layernorms")):
        for kind in ("weight", "bias"):
            renamed |= {f"blocks.{b}.{ours}.{kind}": weights[f"{theirs}.{b}.{kind}"] for b in range(2)}
    for b in range(2):
        for kind in ("weight", "bias"):
            parts = weights[f"attention_layers.{b}.in_proj_{kind}"].chunk(3)
            names = ("query", "key", "value")
            renamed |= {f"blocks.{b}.attention.{name}.{kind}": part for name, part in zip(names, parts, strict=True)}
            renamed[f"blocks.{b}.attention.output.{kind}"] = weights[f"attention_layers.{b}.out_proj.{kind}"]
            for ours, theirs in (("enter", "conv1"), ("leave", "conv2")):
                part = weights[f"forward_layers.{b}.{theirs}.{kind}"]
                renamed[f"blocks.{b}.feed_forward.{ours}.{kind}"] = part.flatten(1) if kind == "weight" else part
    return renamed | {f"final_norm.{kind}": weights[f"last_layernorm.{kind}"] for kind in ("weight", "bias")}


@pytest.fixture(params=["norm_last", "norm_first"])
def recorded(request, golden):
    """The model with the port's weights, and what the port computed with them."""
    config = SASRecConfig(
        num_items=60, max_sequence_length=12, embedding_dim=16, num_blocks=2, num_heads=2, dropout=0.0,
        attention_dropout=0.0, norm={"norm_last": "post", "norm_first": "pre"}[request.param], attend_padding=True,
    )  # fmt: skip
    model = SASRec(config)
    model.load_state_dict(original_state(load_file(golden / "sasrec" / "toy.safetensors")))
    arrays = np.load(golden / "sasrec" / f"toy_{request.param}.npz")
    return model, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_states_and_logits_equal_the_ports(recorded):
    model, expected = recorded
    real_BL = expected["sequences"] != 0
    hidden_TD = model(expected["sequences"])
    torch.testing.assert_close(hidden_TD, expected["features"][real_BL], rtol=0, atol=1e-5)
    for name in ("positive", "negative"):
        picked = losses.picked_scores(hidden_TD, model.item_vectors(), expected[f"{name}s"][real_BL][:, None])[:, 0]
        torch.testing.assert_close(picked, expected[f"{name}_logits"][real_BL], rtol=0, atol=5e-5)


def test_three_adam_steps_lose_what_the_port_loses(recorded):
    model, expected = recorded
    real_BL = expected["sequences"] != 0
    targets_T, negatives_T1 = expected["positives"][real_BL], expected["negatives"][real_BL][:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    measured = []
    for _ in range(3):
        optimizer.zero_grad()
        total = losses.gbce(model(expected["sequences"]), model.item_vectors(), targets_T, negatives_T1)
        loss = 2 * total / len(targets_T)  # the port adds the means of its positive and negative half
        loss.backward()
        optimizer.step()
        measured.append(loss.item())
    np.testing.assert_allclose(measured, expected["losses_of_three_adam_steps"], rtol=0, atol=1e-5)


def test_padding_left_out_of_attention_is_not_the_port(recorded):
    model, expected = recorded
    masked = SASRec(SASRecConfig(**{**vars(model.config), "attend_padding": False}))
    masked.load_state_dict(model.state_dict())
    real_BL = expected["sequences"] != 0
    padded_B = ~real_BL.all(1)
    assert padded_B.any()
    difference_T = (masked(expected["sequences"]) - expected["features"][real_BL]).abs().amax(1)
    rows_T = real_BL.nonzero()[:, 0]
    assert difference_T[padded_B[rows_T]].max() > 1e-2
    assert not (~padded_B).any() or difference_T[~padded_B[rows_T]].max() < 1e-5
