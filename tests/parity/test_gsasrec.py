"""gSASRec against its author's code: logits, the transform, element losses, gradients and four Adam steps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.training import losses

NUM_ITEMS, CALIBRATION, NUM_NEGATIVES = 50, 0.75, 7
PADDING = NUM_ITEMS + 1  # the original's padding id; its row 0 is unused
NAMES = {
    "query": "multihead_attention.query_proj", "key": "multihead_attention.key_proj",
    "value": "multihead_attention.val_proj", "attention_norm": "first_norm", "forward_norm": "second_norm",
    "enter": "dense1", "leave": "dense2",
}  # fmt: skip


def original_state(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the original's parameters; the padding row is ours, the original's last row has no counterpart."""
    renamed = {}
    for ours, theirs in (("item_table", "item_embedding"), ("output_table", "output_embedding")):
        renamed[f"{ours}.weight"] = weights[f"{theirs}.weight"][:PADDING].clone()
        renamed[f"{ours}.weight"][0] = 0
    positions = weights["position_embedding.weight"]
    renamed["position_table.weight"] = torch.cat([torch.zeros(1, positions.shape[1]), positions])
    for name, value in weights.items():
        if name.startswith("transformer_blocks."):
            _, block, rest = name.split(".", 2)
            part = next(ours for ours, theirs in NAMES.items() if rest.rpartition(".")[0] == theirs)
            inside = {"query": "attention.", "key": "attention.", "value": "attention."}.get(part, "")
            inside = inside or ("feed_forward." if part in ("enter", "leave") else "")
            renamed[f"blocks.{block}.{inside}{part}.{rest.rpartition('.')[2]}"] = value
    return renamed | {f"final_norm.{kind}": weights[f"seq_norm.{kind}"] for kind in ("weight", "bias")}


@pytest.fixture
def recorded(golden):
    """The model with the original's first weights, and what the original recorded."""
    config = SASRecConfig(
        num_items=NUM_ITEMS, max_sequence_length=10, embedding_dim=16, num_blocks=2, num_heads=2, dropout=0.0,
        attention_dropout=0.0, norm="original", tie_item_table=False, scale_item_table=False, output_projection=False,
        norm_eps=1e-5, attend_padding=True, mask_padding_keys=True,
    )  # fmt: skip
    model = SASRec(config)
    model.load_state_dict(original_state(load_file(golden / "gsasrec" / "toy_gbce_init.safetensors")))
    return model, np.load(golden / "gsasrec" / "toy_gbce.npz"), golden / "gsasrec"


def history_and_picks(arrays, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return our inputs [4, 10], the targets and the negatives of the real positions of one recorded batch."""
    sequences = torch.from_numpy(arrays[f"sequences_{step}"])
    items_BL = sequences[:, :-1].masked_fill(sequences[:, :-1] == PADDING, 0)
    real_BL = items_BL != 0
    return items_BL, sequences[:, 1:][real_BL], torch.from_numpy(arrays[f"negatives_{step}"])[:, 1:][real_BL]


def step_loss(model, arrays, step: int) -> torch.Tensor:
    items_BL, targets_T, negatives_TN = history_and_picks(arrays, step)
    total = losses.gbce(model(items_BL), model.item_vectors(), targets_T, negatives_TN, CALIBRATION)
    return total / len(targets_T)


def test_logits_transform_and_element_losses_equal_the_originals(recorded):
    model, arrays, _ = recorded
    items_BL, targets_T, negatives_TN = history_and_picks(arrays, 0)
    real_BL = (items_BL != 0).numpy()
    hidden_TD = model(items_BL)
    raw_TN = losses.picked_scores(hidden_TD, model.item_vectors(), torch.cat([targets_T[:, None], negatives_TN], 1))
    np.testing.assert_allclose(raw_TN.detach(), arrays["raw_logits_step1"][real_BL], rtol=0, atol=5e-5)

    beta = 1 - CALIBRATION * (1 - NUM_NEGATIVES / (NUM_ITEMS - 1))
    positive_T = raw_TN[:, 0].detach().double()
    transformed_T = -torch.log(torch.sigmoid(positive_T) ** -beta - 1)  # the published map, then plain cross-entropy
    np.testing.assert_allclose(transformed_T, arrays["transformed_logits_step1"][real_BL][:, 0], rtol=0, atol=5e-5)
    element_TN = torch.cat([beta * F.softplus(-raw_TN[:, :1]), F.softplus(raw_TN[:, 1:])], 1)
    np.testing.assert_allclose(element_TN.detach(), arrays["element_losses_step1"][real_BL], rtol=0, atol=1e-5)
    np.testing.assert_allclose(step_loss(model, arrays, 0).item(), element_TN.mean().item(), rtol=1e-6)


def test_first_gradients_equal_the_originals(recorded):
    model, arrays, folder = recorded
    expected = original_state(load_file(folder / "toy_gbce_gradients_step1.safetensors"))
    step_loss(model, arrays, 0).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=1e-5, msg=name)


def test_four_adam_steps_end_where_the_original_ends(recorded):
    model, arrays, folder = recorded
    expected = original_state(load_file(folder / "toy_gbce_after.safetensors"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    measured = []
    for step in range(4):
        optimizer.zero_grad()
        loss = step_loss(model, arrays, step)
        loss.backward()
        optimizer.step()
        measured.append(loss.item())
    np.testing.assert_allclose(measured, arrays["losses"], rtol=0, atol=1e-5)
    for name, parameter in model.state_dict().items():
        if not name.endswith("key.bias"):  # its true gradient is zero: Adam follows rounding noise
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-5, msg=name)


def test_padded_rows_are_invisible_to_the_original(recorded):
    model, arrays, _ = recorded
    packed = SASRec(SASRecConfig(**{**vars(model.config), "attend_padding": False, "mask_padding_keys": False}))
    packed.load_state_dict(model.state_dict())
    items_BL, _, _ = history_and_picks(arrays, 0)
    torch.testing.assert_close(packed(items_BL), model(items_BL), rtol=0, atol=1e-5)
