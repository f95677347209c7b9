"""BERT4Rec against the code behind "The Elephant in the Room": states, logits and loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from textrec.models.bert4rec import BERT4Rec, BERT4RecConfig
from textrec.training import losses


def original_state(weights: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """Rename the original's parameters.

    Its norm divides by the unbiased deviation plus 1e-6; ours, with eps 1e-12, is that norm once the gain carries the
    factor sqrt((width - 1) / width).
    """
    unbiased = ((width - 1) / width) ** 0.5
    renamed = {
        "item_table.weight": weights["bert.embedding.token.weight"],
        "position_table.weight": weights["bert.embedding.position.pe.weight"],
        "output_table.weight": weights["out.weight"],
        "output_bias": weights["out.bias"],
    }
    for b in range(2):
        block = f"bert.transformer_blocks.{b}"
        for kind in ("weight", "bias"):
            projections = [weights[f"{block}.attention.linear_layers.{i}.{kind}"] for i in range(3)]
            renamed[f"blocks.{b}.query_key_value.{kind}"] = torch.cat(projections)
            renamed[f"blocks.{b}.output.{kind}"] = weights[f"{block}.attention.output_linear.{kind}"]
            renamed[f"blocks.{b}.enter.{kind}"] = weights[f"{block}.feed_forward.w_1.{kind}"]
            renamed[f"blocks.{b}.leave.{kind}"] = weights[f"{block}.feed_forward.w_2.{kind}"]
        for ours, theirs in (("attention_norm", "input_sublayer"), ("forward_norm", "output_sublayer")):
            renamed[f"blocks.{b}.{ours}.weight"] = weights[f"{block}.{theirs}.norm.a_2"] * unbiased
            renamed[f"blocks.{b}.{ours}.bias"] = weights[f"{block}.{theirs}.norm.b_2"]
    return renamed


@pytest.fixture
def recorded(golden):
    """The model with the original's weights, and what the original computed with them."""
    config = BERT4RecConfig(
        num_items=40, max_sequence_length=10, embedding_dim=32, num_blocks=2, num_heads=4, dropout=0.0,
        attention_dropout=0.0, norm_embedding=False, tie_item_table=False,
    )  # fmt: skip
    model = BERT4Rec(config)
    model.load_state_dict(original_state(load_file(golden / "bert4rec" / "toy.safetensors"), 32))
    arrays = np.load(golden / "bert4rec" / "toy.npz")
    return model, {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_states_equal_the_originals(recorded):
    model, expected = recorded
    inputs = expected["inputs"]
    assert (inputs == model.config.mask_id).any()  # the mask id is ours, too
    seen = {}
    model.blocks[0].register_forward_hook(
        lambda _, given, out: seen.update(embedding_output=given[0], block0_output=out)
    )
    hidden_TD = model(inputs)
    assert (hidden_TD[:, -1] == 1).all()  # the dimension that meets the bias
    for name, states_TD in {**seen, "hidden": hidden_TD[:, :-1]}.items():
        torch.testing.assert_close(states_TD, expected[name][inputs != 0], rtol=0, atol=1e-5, msg=name)


def test_logits_and_loss_equal_the_originals(recorded):
    model, expected = recorded
    real_BL = expected["inputs"] != 0
    scores_TI = model.scores(model(expected["inputs"]), model.item_vectors())
    torch.testing.assert_close(scores_TI, expected["logits"][real_BL], rtol=0, atol=5e-5)
    targets_T = expected["labels"][real_BL]
    loss = F.cross_entropy(scores_TI, targets_T, ignore_index=0)  # the original lets the padding class compete
    torch.testing.assert_close(loss, expected["loss"], rtol=0, atol=1e-5)


def test_our_loss_is_the_originals_without_its_padding_class(recorded):
    model, expected = recorded
    real_BL, targets_BL = expected["inputs"] != 0, expected["labels"]
    masked_T = targets_BL[real_BL] != 0
    total = losses.full_softmax(
        model(expected["inputs"])[masked_T], model.item_vectors(), targets_BL[real_BL][masked_T]
    )
    by_hand = F.cross_entropy(expected["logits"][targets_BL != 0][:, 1:], targets_BL[targets_BL != 0] - 1)
    torch.testing.assert_close(total / masked_T.sum(), by_hand, rtol=0, atol=1e-5)
