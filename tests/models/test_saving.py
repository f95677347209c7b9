"""A saved model comes back bit by bit; what does not fit is named."""

import json
from dataclasses import replace

import pytest
import torch

from textrec.models.recformer import PRESETS, RecFormer, RecFormerForPretraining
from textrec.models.saving import load_exactly
from textrec.schema import InputError

CONFIG = replace(PRESETS["tiny"], vocabulary_size=50, num_positions=40, max_tokens=30)


@pytest.mark.parametrize("kind", [RecFormer, RecFormerForPretraining])
def test_a_model_comes_back(kind, tmp_path):
    model = kind(CONFIG)
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    loaded = kind.from_pretrained(tmp_path / "model")
    assert loaded.config == CONFIG and not loaded.training
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"config\.json is missing"):
        RecFormer.from_pretrained(tmp_path)
    RecFormer(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="holds a RecFormer, not a RecFormerForPretraining"):
        RecFormerForPretraining.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(settings | {"depth": 3}), encoding="utf-8")
    with pytest.raises(InputError, match="'depth'"):
        RecFormer.from_pretrained(tmp_path)


def test_all_that_does_not_fit_is_listed():
    model = torch.nn.Linear(2, 3)
    load_exactly(model, {"weight": torch.ones(3, 2), "bias": torch.zeros(3)}, "here")
    assert model.weight.sum() == 6
    with pytest.raises(InputError) as caught:
        load_exactly(model, {"weight": torch.ones(2, 2), "other": torch.zeros(3)}, "here")
    for word in ("here", "Linear", "missing: bias", "unexpected: other", "another shape: weight (2, 2) for (3, 2)"):
        assert word in str(caught.value)
