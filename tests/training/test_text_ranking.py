"""Item tables and ranks from texts: equal to a plain loop, each text encoded once, in whatever batches and store."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training.text_sets import SMALL, brand_set

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import history_tokens, train_tokenizer
from textrec.evaluation.metrics import chance_metrics, mean_metrics
from textrec.models.attention import BandLayout
from textrec.models.recformer import RecFormer
from textrec.training import text_ranking
from textrec.training.text_ranking import (
    BagOfWords,
    TextSet,
    distinct_items,
    item_table,
    text_ranks,
    weights_digest,
    with_permuted_words,
    with_random,
    with_uniform_attention,
)  # fmt: skip

COPIES = [0, 0, 7, 7, 7]  # items 1 and 2 have one text, items 8, 41 and 100 another
PLACES = [0, 1, 7, 40, 99]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> TextSet:
    prepared = brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0)
    attributes = item_attributes(prepared.catalogue).copy()
    attributes.iloc[PLACES] = attributes.iloc[COPIES].to_numpy()
    return TextSet.of(prepared, train_tokenizer(attributes, 400), attributes=attributes)


@pytest.fixture
def encoder() -> RecFormer:
    torch.manual_seed(0)
    return RecFormer(SMALL)


def one_by_one(encoder, texts: TextSet, histories: list) -> torch.Tensor:
    vectors = []
    for items in histories:
        packed = history_tokens(texts.tokens, np.array([items]), start_token=texts.special.start, max_items=6,
                                max_tokens=64)  # fmt: skip
        with torch.no_grad():
            vectors.append(encoder.eval().encode(*(torch.from_numpy(packed[name]) for name in text_ranking.PACKED)))
    return F.normalize(torch.cat(vectors), dim=-1)


def test_a_table_equals_a_loop_and_copies_are_encoded_once(texts, encoder, monkeypatch, tmp_path):
    encoded, plain = [], encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda *inputs: encoded.append(len(inputs[3])) or plain(*inputs))
    table = item_table(encoder.train(), texts)
    assert encoder.training and sum(encoded) == 240 - 3  # copies beyond the first
    assert torch.equal(table[0], torch.zeros(16)) and torch.equal(table[1], table[2])
    assert torch.equal(table[8], table[41]) and torch.equal(table[8], table[100])
    torch.testing.assert_close(table[1:], one_by_one(encoder, texts, [[i] for i in range(1, 241)]), rtol=0, atol=1e-6)
    few = item_table(encoder, texts, max_batch_tokens=40)
    mapped = torch.from_numpy(np.lib.format.open_memmap(tmp_path / "table.npy", "w+", np.float32, (241, 16)))
    assert item_table(encoder, texts, out=mapped) is mapped
    for other in (few, mapped):
        torch.testing.assert_close(other, table, rtol=0, atol=1e-6)


def test_texts_are_compared_a_block_of_items_at_a_time(texts, monkeypatch):
    first_U, inverse_N = distinct_items(texts.tokens)
    written = [
        texts.tokens.token_ids_T[slice(*texts.tokens.offsets_I1[item : item + 2])].tobytes() for item in range(1, 241)
    ]
    assert len(first_U) == len(set(written)) == 237
    assert [written[first_U[distinct]] for distinct in inverse_N] == written
    monkeypatch.setattr(text_ranking, "ITEMS_AT_ONCE", 7)
    for one, other in zip(distinct_items(texts.tokens), (first_U, inverse_N), strict=True):
        assert (one == other).all()


def test_processes_share_the_work_and_get_one_table(texts, encoder, monkeypatch):
    table, parts = item_table(encoder, texts, max_batch_tokens=200), []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda out: parts.append(out.clone()))
    for rank in (0, 1):
        item_table(encoder, texts, max_batch_tokens=200, rank=rank, world_size=2)
    summed = parts[0] + parts[1]
    first_U, _ = distinct_items(texts.tokens)
    assert torch.equal(summed[first_U + 1], table[first_U + 1])
    assert all((part[first_U + 1] == 0).all(1).float().mean() > 0.3 for part in parts)


def test_the_store_encodes_once_for_one_state_of_the_weights(texts, encoder, monkeypatch, tmp_path):
    table = item_table(encoder, texts)
    torch.testing.assert_close(item_table(encoder, texts, folder=tmp_path), table, rtol=0, atol=1e-6)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.word_table.weight[5, 0] += 1.0
    assert weights_digest(other) != weights_digest(encoder) == weights_digest(copy.deepcopy(encoder))
    monkeypatch.setattr(encoder, "encode", None)  # a second call reads
    torch.testing.assert_close(item_table(encoder, texts, folder=tmp_path), table, rtol=0, atol=1e-6)
    torch.testing.assert_close(item_table(other, texts, folder=tmp_path), item_table(other, texts), rtol=0, atol=1e-6)


def test_ranks_equal_a_plain_cosine_of_every_pair(texts, encoder):
    ranks = text_ranks(encoder, texts, "test", max_batch_tokens=100)
    users, ends = texts.prepared.split.targets("test")
    histories = [texts.prepared.histories.prefixes(users[[u]], ends[[u]])[0].tolist() for u in users]
    users_UD = one_by_one(encoder, texts, histories)
    scores_UI = (users_UD[:, None] * item_table(encoder, texts)[None, 1:]).sum(-1)
    target_U = torch.from_numpy(ranks.targets_U)
    own_U1 = scores_UI.gather(1, target_U[:, None] - 1)
    assert (ranks.users_U == users).all() and (ranks.targets_U == texts.prepared.histories.at(users, ends)).all()
    surely_U = (scores_UI > own_U1 + 1e-6).sum(1).numpy()
    maybe_U = (scores_UI > own_U1 - 1e-6).sum(1).numpy()
    assert (surely_U <= ranks.kept.higher_U + ranks.kept.ties_U).all() and (ranks.kept.higher_U <= maybe_U).all()
    assert (ranks.kept.ties_U[np.isin(ranks.targets_U, np.array(PLACES) + 1)] >= 1).all()
    some = text_ranks(encoder, texts, "test", users=users[[5, 2]])
    assert (some.users_U == [2, 5]).all()


def test_lengths_are_those_of_what_the_model_reads(texts):
    users, ends = texts.prepared.split.targets("test")
    items_BL, _, _ = texts.prepared.histories.windows(users, ends, 6)
    for config in (SMALL, replace(SMALL, max_tokens=20), replace(SMALL, max_items=2)):
        assert (texts.history_lengths(users, ends, config) == texts.packed(items_BL, config)["lengths_B"]).all()


def test_an_encoder_without_any_sense_stays_at_chance(texts, encoder, monkeypatch):
    monkeypatch.setattr(encoder, "encode", lambda *inputs: torch.ones(len(inputs[3]), 16))
    ranks = text_ranks(encoder, texts, "test")
    found, chance = (each["recall@10"] for each in (mean_metrics(ranks.kept), chance_metrics(ranks.kept.candidates_U)))
    assert found == pytest.approx(chance) == pytest.approx(10 / 240)


def test_a_bag_of_words_is_the_mean_word_and_ties_all_items_after_an_empty_history(texts, encoder):
    bag = BagOfWords.of(encoder)
    item = 3
    ids = texts.tokens.token_ids_T[texts.tokens.offsets_I1[item] : texts.tokens.offsets_I1[item + 1]]
    mean_D = encoder.word_table(torch.from_numpy(ids)).mean(0)
    torch.testing.assert_close(item_table(bag, texts)[item], F.normalize(mean_D, dim=0).detach(), rtol=0, atol=1e-6)
    empty = texts.packed(np.zeros((1, 1), np.int64), SMALL)
    assert not bag.encode(*(torch.from_numpy(empty[name]) for name in text_ranking.PACKED)).any()


def test_permuted_words_are_the_same_vectors_elsewhere(encoder):
    before, after = (each.word_table.weight.detach() for each in (encoder, with_permuted_words(encoder, 0)))
    assert not torch.equal(before, after)
    assert torch.equal(before.sum(1).sort().values, after.sum(1).sort().values)
    assert torch.equal(before, encoder.word_table.weight)


def test_a_part_is_drawn_anew_and_the_rest_stays(encoder):
    encoder = copy.deepcopy(encoder)
    for weight in (encoder.word_table.weight, encoder.blocks[1].attention.key_global.weight):
        weight.data.mul_(3)  # as a training leaves them
    for part in ("word_table", "blocks"):
        drawn, again, other = (with_random(encoder, part, seed) for seed in (0, 0, 1))
        for name, weight in drawn.state_dict().items():
            same = torch.equal(weight, encoder.state_dict()[name])
            assert same or name.startswith(part), name
        name = "word_table.weight" if part == "word_table" else "blocks.1.attention.key_global.weight"
        weights = [each.state_dict()[name] for each in (encoder, drawn, other)]
        assert torch.equal(drawn.state_dict()[name], again.state_dict()[name])
        torch.manual_seed(0)
        assert not torch.equal(weights[1], RecFormer(SMALL).state_dict()[name])  # as a training with this seed begins
        assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
        spread = [each.std().item() for each in weights]
        assert spread[1] == pytest.approx(spread[0], rel=1e-4)  # it weighs as much beside the parts that stay
        if part == "word_table":
            assert not weights[1][SMALL.padding_id].any()


@pytest.mark.parametrize("path", ["dense", "blocked"])
def test_uniform_attention_is_the_mean_of_what_a_token_may_see(encoder, path):
    source, lengths_B = torch.Generator().manual_seed(0), torch.tensor([1, 30, 9])
    hidden_TD, layout = torch.randn(40, 16, generator=source), BandLayout.of(lengths_B, 8, 2, path)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    learnt, uniform = (each.eval().blocks[0].attention for each in (encoder, with_uniform_attention(encoder)))
    expected = []
    for start, length in ((0, 1), (1, 30), (31, 9)):
        for place in range(length):
            seen = {0, *range(max(place - 4, 0), min(place + 5, length))} if place else range(length)
            value = uniform.value if place else uniform.value_global
            expected.append(value(hidden_TD[[start + each for each in seen]]).mean(0))
    torch.testing.assert_close(uniform(hidden_TD, layout), torch.stack(expected), atol=1e-5, rtol=0)
    assert (learnt(hidden_TD, layout) - torch.stack(expected)).abs().max() > 0.1
    first_BD = uniform(hidden_TD, layout, first_only=True)
    torch.testing.assert_close(first_BD, torch.stack(expected)[layout.starts_B], atol=1e-5, rtol=0)


def test_a_bag_of_words_is_saved_and_loaded(encoder, tmp_path):
    BagOfWords.of(encoder).save_pretrained(tmp_path)
    assert torch.equal(BagOfWords.from_pretrained(tmp_path).word_table.weight, encoder.word_table.weight)


def test_what_a_checkpoint_remembers_changes_with_any_token(texts):
    other = TextSet.of(texts.prepared, train_tokenizer(item_attributes(texts.prepared.catalogue), 300))
    assert other.identity["fingerprint"] == texts.identity["fingerprint"] and other.identity != texts.identity
    before, after = (replace(texts, tokens=replace(texts.tokens)) for _ in range(2))
    assert after.tokens.lengths_I.sum() and before.identity == after.identity  # what was worked out is no part of it
