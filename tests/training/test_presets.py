"""Presets: each resolves to valid configurations, and what it says it changes is what it changes."""

import pytest

from textrec.training.module import TrainingConfig
from textrec.training.presets import CONTROLS, PRESETS
from textrec.training.rows import model_class

TRAINED = {name: preset for name, preset in PRESETS.items() if preset.model not in CONTROLS}


@pytest.mark.parametrize("name", TRAINED)
def test_presets_build(name):
    preset = TRAINED[name]
    model_class(preset.model).config_class(num_items=20, **preset.model_settings)
    TrainingConfig(**preset.training_settings)


@pytest.mark.parametrize("name", [n for n, p in TRAINED.items() if p.changed.startswith(("loss:", "block:"))])
def test_a_row_of_the_ladder_changes_one_thing(name):
    reference, preset = PRESETS["sasrec_ce"], PRESETS[name]
    same_model = preset.model_settings == reference.model_settings
    same_training = preset.training_settings == reference.training_settings
    assert same_model != same_training
    if preset.changed.startswith("block:"):
        assert {k for k, v in preset.model_settings.items() if reference.model_settings.get(k) != v} == {"norm"}


def test_cosines_are_all_that_lies_between_sampled_softmax_and_its_row_with_cosines():
    cosine, plain = PRESETS["sasrec_cosine"], PRESETS["sasrec_ss"]
    assert cosine.model_settings == plain.model_settings | {"temperature": 0.05}
    assert cosine.training_settings == plain.training_settings == PRESETS["llama"].training_settings


def test_published_sizes():
    """ML-1M with 3,416 items: pmixer 212,000 and gSASRec's tables, by the settings alone."""
    sizes = {}
    for name in ("sasrec_pmixer", "gsasrec"):
        preset = PRESETS[name]
        cls = model_class(preset.model)
        model = cls(cls.config_class(num_items=3416, max_sequence_length=200, **preset.model_settings))
        sizes[name] = sum(p.numel() for p in model.parameters())
    padding_row, unused_rows = 50 + 50, 128  # tables of ours hold a padding row each
    assert sizes["sasrec_pmixer"] - padding_row == 212_000 - 50 - 50
    assert abs(sizes["gsasrec"] - unused_rows - 1_067_008) <= 256
