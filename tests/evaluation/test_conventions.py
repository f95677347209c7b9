"""Conversions between conventions, by hand arithmetic, enumeration and sampling."""

import itertools
import math

import numpy as np
import pytest
import torch

from textrec.evaluation.conventions import (
    expected_sampled_metrics,
    ideal_gain,
    mrr_at,
    rectools_ndcg,
    rosetta,
)
from textrec.evaluation.metrics import mean_metrics
from textrec.evaluation.ranking import Counts, Ranks, rank_sampled, rank_targets
from textrec.seeding import generator


def counts(higher, ties, candidates):
    return Counts(np.array(higher), np.array(ties), np.array(candidates))


def test_rectools_divides_by_the_gain_of_k_hits():
    assert ideal_gain(10) == pytest.approx(4.5436, abs=5e-5)
    assert ideal_gain(1) == 1
    assert rectools_ndcg(0.1821, 10) == pytest.approx(0.1821 / sum(1 / math.log2(r + 1) for r in range(1, 11)))


def test_mrr_is_cut_at_k():
    assert mrr_at(counts([1, 9, 10], [0, 0, 0], [50] * 3), 10) == pytest.approx([1 / 2, 1 / 10, 0])
    assert mrr_at(counts([9], [1], [50]), 10) == pytest.approx([1 / 20])  # rank 10 or 11


def test_sampling_without_replacement_equals_its_enumeration():
    num_others, higher, ties, num_negatives = 7, 2, 2, 3
    hits, gains = [], []
    for drawn in itertools.combinations(range(num_others), num_negatives):  # 0, 1 above; 2, 3 tied
        above, tied = sum(d < higher for d in drawn), sum(higher <= d < higher + ties for d in drawn)
        ranks = [above + t + 1 for t in range(tied + 1)]
        hits.append(np.mean([rank <= 2 for rank in ranks]))
        gains.append(np.mean([(rank <= 2) / math.log2(rank + 1) for rank in ranks]))
    expected = expected_sampled_metrics(counts([higher], [ties], [num_others + 1]), num_negatives, (2,))
    assert expected["recall@2"][0] == pytest.approx(np.mean(hits))
    assert expected["ndcg@2"][0] == pytest.approx(np.mean(gains))


def test_expectation_meets_what_sampling_finds():
    rng = generator("sampled protocol")
    scores = rng.random((4000, 60)).astype(np.float32)
    targets = rng.integers(1, 61, 4000)
    scores[np.arange(4000), targets - 1] += 0.4  # a model that knows something
    seen = lambda rows: (np.zeros(0, dtype=np.int64), np.zeros(rows.stop - rows.start + 1, dtype=np.int64))  # noqa: E731
    scorer = lambda rows: torch.from_numpy(scores[rows])  # noqa: E731
    full = rank_targets(scorer, np.arange(4000), targets, seen, num_items=60).filtered
    others = rng.permuted(np.tile(np.arange(1, 60), (4000, 1)), axis=1)[:, :20]
    negatives = others + (others >= targets[:, None])
    drawn = mean_metrics(rank_sampled(scorer, np.arange(4000), targets, negatives, num_items=60), (5,))
    expected = expected_sampled_metrics(full, 20, (5,))
    assert drawn["recall@5"] == pytest.approx(expected["recall@5"].mean(), abs=0.015)
    assert drawn["ndcg@5"] == pytest.approx(expected["ndcg@5"].mean(), abs=0.015)
    assert drawn["recall@5"] > mean_metrics(full, (5,))["recall@5"] + 0.1  # the conversion is not the identity


def test_no_opinion_is_chance_in_every_convention():
    tied = counts(np.zeros(30, int), np.full(30, 999), np.full(30, 1000))
    expected = expected_sampled_metrics(tied, 100)
    assert expected["recall@10"].mean() == pytest.approx(10 / 101)
    assert round(expected["ndcg@10"].mean(), 4) == 0.0450


def test_the_table_of_conventions():
    filtered, kept = counts([0, 4], [0, 0], [500, 500]), counts([0, 20], [0, 0], [510, 510])
    ranks = Ranks(np.arange(2), np.ones(2, dtype=np.int64), filtered, kept)
    table = rosetta(ranks)
    ndcg = (1 + 1 / math.log2(6)) / 2
    assert table["full ranking, seen items filtered"]["ndcg@10"] == pytest.approx(ndcg)
    assert table["full ranking, seen items kept (RecBole)"]["ndcg@10"] == pytest.approx(1 / 2)
    assert table["RecTools' default NDCG"]["ndcg@10"] == pytest.approx(ndcg / 4.5436, rel=1e-4)
    assert table["MRR cut at 10"]["mrr"] == pytest.approx((1 + 1 / 5) / 2)
    assert table["100 uniform negatives, expected (SASRec paper)"]["recall@10"] == pytest.approx(1, abs=1e-6)


def test_more_negatives_than_items_are_refused():
    with pytest.raises(ValueError, match="num_negatives=100, but a user has 9"):
        expected_sampled_metrics(counts([0], [0], [10]), 100)


def test_many_users_with_many_ties_share_their_sums():
    """A control ties a target with most of a catalogue: memory must not hold users x items."""
    import tracemalloc

    rng, users, items = np.random.default_rng(0), 20_000, 3_000
    higher_U = rng.integers(0, 50, users)
    candidates_U = items - rng.integers(0, 5, users)
    counts = Counts(higher_U, candidates_U - 1 - higher_U, candidates_U)
    tracemalloc.start()
    found = expected_sampled_metrics(counts, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6  # bytes; eight for each user and item would be 480 MB
    few = np.unique(candidates_U, return_index=True)[1]
    alone = expected_sampled_metrics(Counts(higher_U[few], counts.ties_U[few], candidates_U[few]), 100)
    assert np.abs(found["ndcg@10"][few] - alone["ndcg@10"]).max() < 1e-9
