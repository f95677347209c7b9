"""The training losses against RecFormer's published code: pretraining from token ids, finetuning from an item table."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from textrec.models.pretrained import adapt_weights, config_from
from textrec.training import losses
from textrec.training.contrastive import pretraining_sums

THEIRS = {"token_ids_T": "input_ids", "type_ids_T": "token_type_ids", "item_positions_T": "item_position_ids",
          "masked_ids_T": "mlm_input_ids", "labels_T": "mlm_labels"}  # fmt: skip


@pytest.fixture(scope="module")
def model(golden):
    config = config_from(json.loads((golden / "recformer" / "tiny_config.json").read_text(encoding="utf-8")))
    return adapt_weights(load_file(golden / "recformer" / "tiny.safetensors"), config)


def view(arrays, suffix: str) -> dict[str, torch.Tensor]:
    real_BL = arrays[f"attention_mask{suffix}"] != 0
    packed = {ours: torch.from_numpy(arrays[theirs + suffix][real_BL]) for ours, theirs in THEIRS.items()}
    return packed | {"lengths_B": torch.from_numpy(real_BL.sum(1))}


def test_the_pretraining_loss_is_the_originals(model, golden):
    arrays = np.load(golden / "recformer" / "pretraining.npz")
    batch = {"history": view(arrays, "_a"), "item": view(arrays, "_b"), "targets_B": torch.arange(4)}
    with torch.no_grad():
        sums = {name: value.item() for name, value in pretraining_sums(model, batch).items()}
    contrast = sums["contrast"] / sums["rows"]
    history, item = (sums[f"mlm_{name}"] / sums[f"masked_{name}"] for name in ("history", "item"))
    assert contrast == pytest.approx(arrays["loss_contrastive"].item(), abs=1e-5)
    assert history == pytest.approx(arrays["loss_mlm_a"].item(), abs=1e-5)
    assert item == pytest.approx(arrays["loss_mlm_b"].item(), abs=1e-5)
    assert contrast + 0.1 * (history + item) == pytest.approx(arrays["loss_total"].item(), abs=1e-5)
    assert sums["correct"] == arrays["correct"]


def test_the_finetuning_losses_are_the_originals(golden):
    arrays = {name: torch.from_numpy(values) for name, values in np.load(golden / "recformer" / "seqrec.npz").items()}
    unit_BD, unit_ID = (F.normalize(arrays[name], dim=-1) for name in ("pooler_output", "item_table"))
    users_BD, table = unit_BD / 0.05, torch.cat([torch.zeros_like(unit_ID[:1]), unit_ID])
    targets_B, negatives_BN = arrays["labels"] + 1, arrays["sampled_negative_ids"] + 1
    full = losses.full_softmax(users_BD, table, targets_B) / len(targets_B)
    assert full.item() == pytest.approx(arrays["loss_full_softmax"].item(), abs=1e-5)
    candidates_B1N = torch.cat([targets_B[:, None], negatives_BN], 1)
    scores_B1N = torch.einsum("bd,bnd->bn", users_BD, table[candidates_B1N])
    theirs_B = F.cross_entropy(scores_B1N, torch.zeros_like(targets_B), reduction="none")
    assert theirs_B.mean().item() == pytest.approx(arrays["loss_sampled_softmax"].item(), abs=1e-5)
    clean_B = ~(negatives_BN == targets_B[:, None]).any(1)
    assert 0 < clean_B.sum() < len(clean_B)  # the original counts a negative that hits the target, ours leaves it out
    for rows_B, same in ((clean_B, True), (~clean_B, False)):
        ours = losses.sampled_softmax(users_BD[rows_B], table, targets_B[rows_B], negatives_BN[rows_B])
        assert (ours.item() == pytest.approx(theirs_B[rows_B].sum().item(), abs=5e-5)) == same
