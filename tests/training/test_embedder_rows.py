"""Rows of embedders: a planted word is found, exchanged vectors are chance; stores, costs, cuts, what was published."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from training.text_sets import brand_set
from transformers import PreTrainedTokenizerFast

from textrec.data.histories import Split
from textrec.data.item_text import item_attributes, item_texts
from textrec.data.tokenizing import train_tokenizer
from textrec.evaluation.metrics import chance_metrics, mean_metrics
from textrec.models.text_encoder import TextEncoder, save_random_embedder
from textrec.schema import InputError
from textrec.training.embedder_rows import (
    EMBEDDER_ROWS,
    SEPARATOR,
    encoded,
    history_texts,
    plan,
    respelled,
    run_embedder_rows,
)

BRIEF = {"all": {"max_epochs": 3, "batch_size": 32}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0, num_users=200)


@pytest.fixture(scope="module")
def texts(prepared):
    return list(item_texts(item_attributes(prepared.catalogue)))


@pytest.fixture(scope="module")
def folder(prepared, tmp_path_factory):
    place = tmp_path_factory.mktemp("embedder") / "model"
    save_random_embedder(train_tokenizer(item_attributes(prepared.catalogue), 400), place, max_tokens=96)
    return place


@pytest.fixture(scope="module")
def found(prepared, folder, tmp_path_factory):
    """Every row, on an embedder of random weights, which still tells words apart."""
    place = tmp_path_factory.mktemp("run")
    encoder = TextEncoder(folder, query_prompt="next after ")
    options = {"seed": 0, "run_dir": place, "store": place / "vectors", "overrides": BRIEF}
    return run_embedder_rows(list(EMBEDDER_ROWS), prepared, encoder, **options), encoder, options


def test_texts_tell_the_brand_and_exchanged_vectors_do_not(found, prepared):
    """A target that the user has had is near itself whatever its vector, so it is left out."""
    results = {result.row: result for result in found[0]}
    assert {result.status for result in results.values()} == {"ok"}
    ranks = results["zero_shot_recency"].ranks
    items, offsets = prepared.histories.prefixes(ranks.users_U, prepared.split.test_target_U[ranks.users_U])
    new_U = np.array(
        [target not in items[a:b] for target, a, b in zip(ranks.targets_U, offsets, offsets[1:], strict=False)]
    )
    recall = {
        row: mean_metrics(each.ranks.filtered.subset(new_U), ks=(10,))["recall@10"] for row, each in results.items()
    }
    chance = chance_metrics(ranks.filtered.candidates_U, ks=(10,))["recall@10"]
    assert new_U.sum() > 80 and recall["zero_shot_concatenated"] > 1.5 * chance
    assert min(recall[row] for row in ("zero_shot_recency", "zero_shot_last_item", "whitened")) > 2 * chance, recall
    assert recall["zero_shot_permuted"] < 1.6 * chance, (recall, chance)
    curves = [results[row].curve for row in ("linear_probe", "linear_probe_whitened")]
    assert all(curve[-1]["train_loss"] < curve[0]["train_loss"] for curve in curves)


def test_a_finished_row_is_read_back_and_a_stored_text_costs_what_it_cost(found, prepared, monkeypatch):
    results, encoder, options = found
    monkeypatch.setattr(TextEncoder, "encode", None)  # whoever reads a text again breaks
    again = run_embedder_rows(list(EMBEDDER_ROWS), prepared, encoder, **options)
    assert [result.cost for result in again] == [result.cost for result in results]
    elsewhere = options | {"run_dir": options["run_dir"] / "other", "name": "second"}
    (other,) = run_embedder_rows(["zero_shot_concatenated"], prepared, encoder, **elsewhere)
    assert other.row == "zero_shot_concatenated@second" and other.cost["tokens"] == results[0].cost["tokens"] > 0
    assert other.cost["cpu_s"] > 0


def test_the_store_knows_prompt_pooling_limit_and_checkpoint(folder, texts, prepared, tmp_path):
    other = tmp_path / "other"
    save_random_embedder(train_tokenizer(item_attributes(prepared.catalogue), 400), other, max_tokens=96, seed=1)
    store, kinds = tmp_path / "store", [
        (TextEncoder(folder), "document"), (TextEncoder(folder, query_prompt="a "), "query"),
        (TextEncoder(folder, query_prompt="b "), "query"), (TextEncoder(folder, pooling="first"), "document"),
        (TextEncoder(folder, max_tokens=32), "document"), (TextEncoder(other), "document"),
    ]  # fmt: skip
    for encoder, side in kinds:
        encoded(encoder, texts[:3], side, folder=store)
    folders = {path for path in store.iterdir() if path.is_dir()}
    assert len(folders) == len(kinds)
    again = encoded(TextEncoder(folder), texts[:3], "query", folder=store)  # no prompt: read as documents are
    assert {path for path in store.iterdir() if path.is_dir()} == folders and again.here_s == 0 < again.cpu_s


def test_histories_are_cut_between_items_newest_first(folder, texts, prepared):
    encoder = TextEncoder(folder, max_tokens=40)
    whole, cut = history_texts(prepared, texts), history_texts(prepared, texts, encoder=encoder)
    users_U, ends_U = prepared.split.targets("test")
    newest = prepared.histories.at(users_U, ends_U - 1)
    assert all(text.startswith(texts[item - 1]) for text, item in zip(cut, newest, strict=True))
    assert any(len(short) < len(long) for short, long in zip(cut, whole, strict=True))
    for short, long in zip(cut, whole, strict=True):
        kept, there = short.split(SEPARATOR), long.split(SEPARATOR)
        assert there[: len(kept)] == kept
        without_limit = TextEncoder.tokenize(_unlimited(encoder), [short])[0]
        assert len(without_limit) <= 40
        if len(kept) < len(there):  # one more would not have been read whole
            assert len(TextEncoder.tokenize(_unlimited(encoder), [SEPARATOR.join(there[: len(kept) + 1])])[0]) > 36
    short = history_texts(prepared, texts, max_items=2)
    assert {text.count(SEPARATOR) for text in short} == {1}


def _unlimited(encoder):
    twin = object.__new__(TextEncoder)
    torch.nn.Module.__init__(twin)
    twin.model, twin.sides, twin.max_tokens = encoder.model, encoder.sides, 96
    return twin


def test_a_user_of_one_item_is_that_item_but_not_as_published(folder, texts, prepared, tmp_path):
    """RecFormer's study, defects 1 and 2: two spaces, and pieces that are read as words."""
    ones = np.ones(prepared.histories.num_users, np.int64)
    single = replace(prepared, split=Split(ones, ones * -1, ones))
    firsts = prepared.histories.at(np.arange(len(ones)), ones * 0) - 1
    encoder = TextEncoder(folder)
    items = encoded(encoder, texts, "document", folder=tmp_path).vectors
    users = encoded(encoder, history_texts(single, texts), "document", folder=tmp_path).vectors
    torch.testing.assert_close((users * items[firsts]).sum(1), torch.ones(len(ones)))
    written = respelled(item_attributes(prepared.catalogue), encoder.model.tokenizer)
    items = encoded(encoder, written, "published_item", folder=tmp_path).vectors
    users = encoded(
        encoder, history_texts(single, written, separator=" "), "published_history", folder=tmp_path
    ).vectors
    assert (users * items[firsts]).sum(1).max() < 0.9
    plain, twice = (encoder.tokenize(each[:5]) for each in (texts, written))
    read = encoder.model.tokenizer(texts[:5])["input_ids"]
    assert all(ours.tolist() == theirs for ours, theirs in zip(plain, read, strict=True))
    assert all(len(b) > len(a) for a, b in zip(plain, twice, strict=True))


def test_the_published_arm_reads_pieces_as_the_published_code_gives_them_as_words():
    letters = "abcdefghijklmnopqrstuvwxyz"
    known = ["[UNK]", "#", "paint", "##ing", "title", "##paint", *letters, *(f"##{letter}" for letter in letters)]
    pieces = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(known)}, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]")
    attributes = pandas.DataFrame({"title": ["Painting set", "an " * 40], "brand": ["Kzogg", "Zor-2"]})
    for text, row in zip(respelled(attributes, tokenizer), attributes.to_dict("records"), strict=True):
        words = [each for name, value in row.items() for each in tokenizer.tokenize(f"{name}{value}")[:32]]
        published = tokenizer(words, is_split_into_words=True)["input_ids"]
        assert tokenizer(text)["input_ids"] == published != tokenizer.convert_tokens_to_ids(words)


def test_without_a_prompt_the_prompted_rows_say_so(folder, prepared, tmp_path):
    rows = ["zero_shot_mean_prompted", "zero_shot_mean"]
    options = {"seed": 0, "run_dir": tmp_path, "store": tmp_path / "v", "skipped": {"zero_shot_mean": "too dear"}}
    prompted, skipped = run_embedder_rows(rows, prepared, TextEncoder(folder), **options)
    assert prompted.status == skipped.status == "not_attempted"
    assert "no prompt" in prompted.reason and skipped.reason == "too dear"


@pytest.mark.parametrize(("row", "overrides", "said"), [
    ("zero_shot_man", {}, "zero_shot_mean"), ("linear_probe", {"all": {"half_live": 2}}, "half_life"),
    ("linear_probe", {"linear_probe": {"half_life": -1}}, "half_life=-1"),
    ("linear_probe", {"linear_probe": {"loss": "mse"}}, "loss='mse'"),
])  # fmt: skip
def test_a_mistake_is_one_sentence(row, overrides, said, folder, prepared, tmp_path):
    with pytest.raises(InputError, match=said):
        run_embedder_rows([row], prepared, TextEncoder(folder), seed=0, run_dir=tmp_path, store=tmp_path,
                          overrides=overrides)  # fmt: skip


def test_rows_differ_in_what_they_name():
    configs = {row: plan(row, 9, 4, {"all": {"half_life": 2.0}})[0] for row in EMBEDDER_ROWS}
    assert configs["linear_probe"] == replace(configs["zero_shot_recency"], learned=True)
    assert configs["whitened"] == configs["zero_shot_recency"] and EMBEDDER_ROWS["whitened"].transforms
    assert configs["zero_shot_recency"].half_life == 2.0
