"""RecFormer against the published code: its recorded states, scores and losses, from its own tiny checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from textrec.models.pretrained import adapt_weights, config_from


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "recformer"


@pytest.fixture(scope="module")
def model(folder):
    config = config_from(json.loads((folder / "tiny_config.json").read_text(encoding="utf-8")))
    assert (config.attention_window, config.max_items, config.max_tokens, config.position_offset) == (8, 50, 128, 2)
    return adapt_weights(load_file(folder / "tiny.safetensors"), config)


def recorded(folder, name: str) -> dict[str, torch.Tensor]:
    arrays = np.load(folder / f"{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def packed(arrays: dict[str, torch.Tensor], suffix: str = "", ids: str = "input_ids"):
    """What the model reads, and which padded positions that is."""
    real_BL = arrays[f"attention_mask{suffix}"] != 0
    inputs = [arrays[f"{name}{suffix}"][real_BL] for name in (ids, "token_type_ids", "item_position_ids")]
    return [*inputs, real_BL.sum(1)], real_BL


@pytest.mark.parametrize("path", ["auto", "dense", "blocked"])
@pytest.mark.parametrize("name", ["model_mixed", "model_short", "model_one_token"])
def test_every_state_equals_the_originals(model, folder, name, path, monkeypatch):
    monkeypatch.setattr(model.encoder, "config", replace(model.config, attention_path=path))
    arrays = recorded(folder, name)
    inputs, real_BL = packed(arrays)
    seen = []
    watched = (model.encoder.embedding_norm, model.encoder.blocks[0])
    hooks = [part.register_forward_hook(lambda _, __, output: seen.append(output)) for part in watched]
    with torch.no_grad():
        last_TD = model.encoder(*inputs)
        first_BD = model.encoder.encode(*inputs)
    for hook in hooks:
        hook.remove()
    for states, original in zip([*seen[:2], last_TD], ["hidden_0", "hidden_1", "last_hidden_state"], strict=True):
        torch.testing.assert_close(states, arrays[original][real_BL], rtol=0, atol=1e-5)
    torch.testing.assert_close(first_BD, arrays["pooler_output"], rtol=0, atol=1e-5)


def test_another_window_or_first_position_is_not_the_original(model, folder, monkeypatch):
    inputs, real_BL = packed(arrays := recorded(folder, "model_mixed"))
    for changes in ({"attention_window": 16}, {"position_offset": 1}):
        monkeypatch.setattr(model.encoder, "config", replace(model.config, **changes))
        with torch.no_grad():
            assert (model.encoder(*inputs) - arrays["last_hidden_state"][real_BL]).abs().max() > 1e-2


def test_pretraining_loss_equals_the_originals(model, folder):
    arrays = recorded(folder, "pretraining")
    losses, vectors = {}, {}
    with torch.no_grad():
        for side in ("_a", "_b"):
            inputs, real_BL = packed(arrays, side)
            vectors[side] = model.encoder.encode(*inputs)
            torch.testing.assert_close(vectors[side], arrays[f"pooler{side}"], rtol=0, atol=1e-5)
            inputs, _ = packed(arrays, side, "mlm_input_ids")
            every_T = torch.arange(int(real_BL.sum()))
            torch.testing.assert_close(model(*inputs, every_T), arrays[f"lm_scores{side}"][real_BL], rtol=0, atol=5e-5)
            labels_T = arrays[f"mlm_labels{side}"][real_BL]
            masked_N = (labels_T != -100).nonzero()[:, 0]
            losses[side] = F.cross_entropy(model(*inputs, masked_N), labels_T[masked_N])
            assert losses[side].item() == pytest.approx(arrays[f"loss_mlm{side}"].item(), abs=1e-5)
        logits_BB = model.encoder.scores(vectors["_a"], vectors["_b"])
    torch.testing.assert_close(logits_BB, arrays["similarity_logits"], rtol=0, atol=5e-5)
    contrastive = F.cross_entropy(logits_BB, torch.arange(len(logits_BB)))
    total = contrastive + 0.1 * losses["_a"] + 0.1 * losses["_b"]
    assert contrastive.item() == pytest.approx(arrays["loss_contrastive"].item(), abs=1e-5)
    assert total.item() == pytest.approx(arrays["loss_total"].item(), abs=1e-5)


def test_scores_of_items_equal_the_originals(model, folder):
    arrays = recorded(folder, "seqrec")
    with torch.no_grad():
        users_BD = model.encoder.encode(*packed(arrays)[0])
        scores_BI = model.encoder.scores(users_BD, arrays["item_table"])
    torch.testing.assert_close(users_BD, arrays["pooler_output"], rtol=0, atol=1e-5)
    torch.testing.assert_close(scores_BI, arrays["scores"], rtol=0, atol=5e-5)
    assert torch.equal(scores_BI[:, 3], scores_BI[:, 7])  # the recorded tie
    loss = F.cross_entropy(scores_BI, arrays["labels"])
    assert loss.item() == pytest.approx(arrays["loss_full_softmax"].item(), abs=1e-5)
