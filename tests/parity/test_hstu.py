"""HSTU against its published research code: buckets, layers with their gradients, and the ML-1M net with its loss."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textrec.models.hstu import HSTU, HSTUConfig, HSTULayer, Tiles, time_buckets
from textrec.models.sequence_model import Layout
from textrec.training import losses

NAMES = {"_uvqk": "project.weight", "_o.weight": "output.weight", "_o.bias": "output.bias"}
NAMES |= {"_rel_attn_bias._w": "distances", "_rel_attn_bias._pos_w": "distances", "_rel_attn_bias._ts_w": "buckets"}


def layer_weights(weights: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """Rename a layer's tensors; its joint projection is multiplied from the right."""
    found = {ours: weights[prefix + theirs] for theirs, ours in NAMES.items() if prefix + theirs in weights}
    return found | {"project.weight": found["project.weight"].T.contiguous()}


def arrays(path) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(values) for name, values in np.load(path).items()}


def test_buckets(golden):
    expected = arrays(golden / "hstu" / "buckets.npz")
    assert torch.equal(time_buckets(expected["delta"]).long(), expected["bucket"])
    firsts = expected["smallest_delta_of_bucket"]
    assert {0: 0, 2: 2, 60: 13, 3600: 27, 86400: 37} == {
        seconds: time_buckets(torch.tensor([seconds])).item() for seconds in (0, 2, 60, 3600, 86400)
    }
    assert len(firsts) == 70


@pytest.fixture(params=["layer_time_and_position", "layer_position_only"])
def layer(request, golden):
    """A layer with the recorded weights, and what the original computed with it."""
    expected = arrays(golden / "hstu" / f"{request.param}.npz")
    config = HSTUConfig(
        num_items=9, max_sequence_length=1, embedding_dim=16, num_heads=2, linear_dim=10, attention_dim=6,
        dropout=0.0, time_bias="time" in request.param,
    )  # fmt: skip
    assert config.block_length == 12
    module = HSTULayer(config)
    module.load_state_dict(layer_weights(load_file(golden / "hstu" / f"{request.param}.safetensors")))
    return module, expected


def tiles_of(module, expected) -> Tiles:
    layout = Layout.of(torch.arange(12) < expected["lengths"][:, None])
    times = (None, None)
    if module.config.time_bias:
        after = torch.cat([expected["timestamps"][:, 1:], expected["timestamps"][:, -1:]], 1)
        times = tuple(each[layout.rows_T, layout.columns_T] for each in (expected["timestamps"], after))
    return Tiles(layout, 2, *times)


def test_layer_and_its_gradients(layer):
    module, expected = layer
    x = expected["x"].requires_grad_()
    output = module(x, tiles_of(module, expected))
    torch.testing.assert_close(output, expected["output"], rtol=0, atol=1e-5)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    torch.testing.assert_close(x.grad, expected["input_gradient"], rtol=0, atol=1e-5)
    gradients = layer_weights({k.removeprefix("grad."): v for k, v in expected.items() if k.startswith("grad.")})
    for name, parameter in module.named_parameters():  # what is recorded is 2e-5 off in sums of 30, as fp64 tells
        torch.testing.assert_close(parameter.grad, gradients.pop(name), rtol=1e-6, atol=1e-5, msg=name)
    assert not gradients


def test_a_layer_of_another_denominator_is_not_the_original(layer):
    module, expected = layer
    other = HSTULayer(HSTUConfig(**{**vars(module.config), "denominator": "row"}))
    other.load_state_dict(module.state_dict())
    output = other(expected["x"], tiles_of(module, expected))
    assert (output - expected["output"])[expected["offsets"][1] :].abs().max() > 1e-4


@pytest.fixture
def net(golden):
    weights = load_file(golden / "hstu" / "ml1m_init.safetensors")
    state = {
        "item_table.weight": weights["_embedding_module._item_emb.weight"],
        "position_table.weight": weights["_input_features_preproc._pos_emb.weight"],
    }
    for block in range(2):
        ours = layer_weights(weights, f"_hstu._attention_layers.{block}.")
        state |= {f"blocks.{block}.{name}": value for name, value in ours.items()}
    model = HSTU(HSTUConfig(num_items=3952, dropout=0.0))
    model.load_state_dict(state)
    return model, arrays(golden / "hstu" / "batch.npz"), arrays(golden / "hstu" / "ml1m_init.npz")


def given(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch["historical_ids"], batch["historical_timestamps"], batch["target_timestamps"]


def test_states_vectors_and_scores(net):
    model, batch, expected = net
    with torch.no_grad():
        torch.testing.assert_close(model(*given(batch)) * 0.05, expected["positions"], rtol=0, atol=2e-6)
        users = model.encode(*given(batch))
        torch.testing.assert_close(users * 0.05, expected["user_vectors"], rtol=0, atol=2e-6)
        scores = model.scores(users, model.item_vectors()[1:]) * 0.05
        torch.testing.assert_close(scores, expected["scores"], rtol=0, atol=5e-5)
        early = model.encode(*given(batch)[:2])  # the request at the newest item's time
    assert (early * 0.05 - expected["user_vectors"]).abs().max() > 1e-5


def test_loss(net):
    model, batch, expected = net
    negatives, positives = expected["negative_ids"].long(), expected["positive_ids"]
    total = losses.sampled_softmax(model(*given(batch)), model.item_vectors(), positives, negatives)
    assert (negatives == positives[:, None]).sum() == 8
    assert total.item() / len(positives) == pytest.approx(expected["loss"].item(), abs=1e-5)
