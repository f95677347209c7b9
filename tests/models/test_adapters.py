"""Adapters: counts of the study, nothing else is trained, merging changes nothing, a file knows its base."""

import copy
from dataclasses import replace

import pytest
import torch
from models.packed_inputs import random_inputs
from safetensors.torch import load_file

from textrec.models.adapters import (
    TARGETS,
    AdapterConfig,
    adapter_layers,
    load_adapters,
    merged,
    save_adapters,
    trained_state,
    with_adapters,
)
from textrec.models.recformer import PRESETS, RecFormer, RecFormerForPretraining
from textrec.schema import InputError

SMALL = replace(PRESETS["tiny"], vocabulary_size=300, hidden_size=32, intermediate_size=48)
KINDS = [{}, {"dora": True}, {"rslora": True, "rank": 4}, {"targets": "attn_global"}]


def inputs() -> list[torch.Tensor]:
    return random_inputs([40, 1, 90, 17])


@pytest.fixture(scope="module")
def model() -> RecFormer:
    torch.manual_seed(0)
    model = RecFormer(SMALL).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def moved(model: RecFormer, config: AdapterConfig) -> RecFormer:
    """Adapters as a training leaves them: B is no longer zero."""
    torch.manual_seed(1)
    adapted = with_adapters(model, config).eval()
    with torch.no_grad():
        for parameter in trained_state(adapted).values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def test_the_studys_setting_has_108_layers_and_1769472_parameters_on_base():
    with torch.device("meta"):
        encoder, whole = RecFormer(PRESETS["base"]), RecFormerForPretraining(PRESETS["base"])
        adapted = with_adapters(encoder, AdapterConfig())
        assert len(adapter_layers(adapted)) == 108
        assert sum(weight.numel() for weight in trained_state(adapted).values()) == 1_769_472
        with_head = with_adapters(whole, AdapterConfig())
        assert sum(weight.numel() for weight in trained_state(with_head).values()) == 1_781_760
        assert "head.dense" in adapter_layers(with_head)


@pytest.mark.parametrize(
    ("targets", "of_layer"), [("attn_local", 3), ("attn_global", 3), ("attn", 7), ("ffn", 2), ("all", 9)]
)
def test_a_set_names_linear_maps_of_every_layer(model, targets, of_layer):
    layers = adapter_layers(with_adapters(model, AdapterConfig(targets=targets)))
    assert len(layers) == of_layer * SMALL.num_layers
    assert {name.rpartition(".")[2] for name in layers} == set(TARGETS[targets]) - {"dense"}


@pytest.mark.parametrize("settings", KINDS)
def test_merged_is_unmerged(model, settings):
    adapted = moved(model, AdapterConfig(**settings))
    plain = merged(adapted)
    assert not adapter_layers(plain) and adapter_layers(adapted) and merged(plain) is plain
    assert plain.state_dict().keys() == model.state_dict().keys()
    given = inputs()
    with torch.no_grad():
        expected, found, start = (each.encode(*given) for each in (adapted, plain, model))
        torch.testing.assert_close(adapted(*given), plain(*given), atol=1e-5, rtol=0)
    assert (found - expected).abs().max() < 1e-5 < 1e-3 < (start - expected).abs().max()
    fresh = with_adapters(model, AdapterConfig(**settings)).eval()
    with torch.no_grad():
        assert (fresh.encode(*given) - start).abs().max() < 1e-5  # B is zero at first


def test_half_precision_does_not_round_folded_adapters_away(model):
    """Keys and values of the start token are asked for their matrix; a bias a hundred times as large hid it."""
    biased = copy.deepcopy(model)
    for block in biased.blocks:
        block.attention.value_global.bias.data.add_(50.0)
    adapted = moved(biased, AdapterConfig(targets="attn_global"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        given, wanted = (each.encode(*inputs()) for each in (adapted, merged(adapted)))
    assert (given - wanted).abs().max() < 0.01


@pytest.mark.parametrize("train_also", [(), ("word_table",)])
def test_adapters_and_what_is_named_are_trained_and_nothing_else(model, train_also):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = with_adapters(model, AdapterConfig(train_also=train_also)).train()
    assert {name for name in trained_state(adapted) if ".lora_" not in name} == {
        f"{name}.weight" for name in train_also
    }
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    start = {name: weight.clone() for name, weight in adapted.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        adapted.encode(*inputs()).square().sum().backward()
        optimizer.step()
    changed = {name for name, weight in adapted.state_dict().items() if not torch.equal(weight, start[name])}
    # the last layer's local attention is not asked for
    assert changed <= trained_state(adapted).keys()
    assert {f"{name}.weight" for name in train_also} <= changed
    assert any(name.startswith("blocks.1.attention.value_global.lora_") for name in changed)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())  # a copy was changed


def test_adapters_are_loaded_onto_the_weights_they_were_trained_on_and_no_others(model, tmp_path):
    config, path = AdapterConfig(targets="ffn", rank=2, train_also=["type_table"]), tmp_path / "adapters.safetensors"
    adapted = moved(model, config)
    save_adapters(adapted, path)
    assert load_file(path).keys() == trained_state(adapted).keys()
    again = load_adapters(model, path)
    with torch.no_grad():
        assert torch.equal(again.encode(*inputs()), adapted.encode(*inputs()))
    assert again.adapter_config == config and config.train_also == ("type_table",)
    other = copy.deepcopy(model)
    other.type_table.weight.data.add_(1.0)  # replaced by what the file holds
    load_adapters(other, path)
    other.blocks[0].enter.weight.data[0, 0] += 1e-3
    with pytest.raises(InputError, match="adapters of weights with the hash"):
        load_adapters(other, path)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="holds no adapters"):
        load_adapters(model, tmp_path / "plain" / "model.safetensors")


def test_settings_without_sense_are_refused(model):
    for settings, said in (
        ({"targets": "query"}, "attn_local"),
        ({"rank": 0}, "at least 1"),
        ({"dropout": 1.0}, "below 1"),
    ):
        with pytest.raises(ValueError, match=said):
            AdapterConfig(**settings)
    with pytest.raises(InputError, match="train_also names 'word_tables'"):
        with_adapters(model, AdapterConfig(train_also=("word_tables",)))
    with pytest.raises(InputError, match="has adapters already"):
        with_adapters(with_adapters(model, AdapterConfig()), AdapterConfig())
