"""Metrics by hand arithmetic."""

import math

import numpy as np
import pytest

from textrec.evaluation.metrics import chance_metrics, list_metrics, mean_metrics, per_user_metrics
from textrec.evaluation.ranking import Counts


def counts(higher, ties, candidates):
    return Counts(np.array(higher), np.array(ties), np.array(candidates))


@pytest.mark.parametrize("rank", range(1, 12))
def test_a_target_at_a_known_rank_gains_the_logarithm_of_it(rank):
    metrics = mean_metrics(counts([rank - 1], [0], [50]), ks=(10,))
    assert metrics["ndcg@10"] == pytest.approx(1 / math.log2(rank + 1) if rank <= 10 else 0)
    assert metrics["recall@10"] == (rank <= 10)
    assert metrics["mrr"] == pytest.approx(1 / rank)
    assert metrics["auc"] == pytest.approx((50 - rank) / 49)


def test_ties_spread_over_the_cut_off():
    tied = counts([1], [3], [9])  # the target holds rank 2, 3, 4 or 5
    expected = mean_metrics(tied, ks=(3,))
    assert expected["recall@3"] == 2 / 4
    assert expected["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 4)
    assert expected["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert expected["auc"] == pytest.approx(1 - (1 + 3 / 2) / 8)
    assert mean_metrics(tied, ks=(3,), ties="optimistic")["recall@3"] == 1
    assert mean_metrics(tied, ks=(3,), ties="optimistic")["auc"] == pytest.approx(7 / 8)
    assert mean_metrics(tied, ks=(3,), ties="pessimistic")["mrr"] == pytest.approx(1 / 5)


def test_expected_lies_between_the_bounds_and_equals_them_without_ties():
    rng = np.random.default_rng(0)
    higher, ties = rng.integers(0, 60, 500), rng.integers(0, 40, 500)
    values = [
        per_user_metrics(counts(higher, ties, np.full(500, 100)), ties=t)
        for t in ("pessimistic", "expected", "optimistic")
    ]
    for name in values[0]:
        assert (values[0][name] <= values[1][name] + 1e-12).all() and (values[1][name] <= values[2][name] + 1e-12).all()
        untied = ties == 0
        assert np.allclose(values[0][name][untied], values[2][name][untied])
    assert mean_metrics(counts(higher, ties, np.full(500, 100)))["mrr"] != pytest.approx(
        mean_metrics(counts(rng.permutation(higher), ties, np.full(500, 100)))["mrr"], abs=1e-12
    )


def test_chance_levels_of_the_published_protocols():
    sampled = chance_metrics(np.array([101]))
    assert sampled["recall@10"] == pytest.approx(10 / 101)
    assert sampled["ndcg@10"] == pytest.approx(sum(1 / math.log2(r + 1) for r in range(1, 11)) / 101)
    assert round(chance_metrics(np.array([3416]))["recall@10"], 4) == 0.0029
    assert round(chance_metrics(np.array([3706]))["ndcg@10"], 4) == 0.0012


def test_one_candidate_and_no_user():
    alone = mean_metrics(counts([0], [0], [1]))
    assert (alone["recall@1"], alone["auc"]) == (1, 0.5)
    with pytest.raises(ValueError, match="no user"):
        mean_metrics(counts([], [], []))
    with pytest.raises(ValueError, match="ties='average'"):
        per_user_metrics(counts([0], [0], [1]), ties="average")


def test_list_metrics_by_hand():
    popularity = np.array([6, 1, 1, 0])
    metrics = list_metrics(np.array([[1, 2], [1, 0]]), popularity)
    assert metrics["coverage@2"] == 2 / 4
    assert metrics["novelty@2"] == pytest.approx((2 * math.log2(12 / 7) + math.log2(12 / 2)) / 3)
    assert metrics["popularity_lift@2"] == pytest.approx(((6 + 1 + 6) / 3) / (38 / 8) - 1)
