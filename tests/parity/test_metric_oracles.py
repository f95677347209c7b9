"""Our ranks and metrics against pytrec_eval, the wrapper of the official TREC program."""

import numpy as np
import pytest
import torch

from textrec.evaluation.metrics import mean_metrics, per_user_metrics
from textrec.evaluation.ranking import rank_targets
from textrec.seeding import generator

pytrec_eval = pytest.importorskip("pytrec_eval")


def evaluation(num_users=200, num_items=150):
    rng = generator("metric oracle")
    scores = rng.permuted(np.tile(np.arange(num_items, dtype=np.float32), (num_users, 1)), axis=1)  # no ties
    targets = rng.integers(1, num_items + 1, num_users)
    seen = [np.setdiff1d(rng.integers(1, num_items + 1, 20), [target]) for target in targets]
    return scores, targets, seen


def seen_of(lists):
    def seen(rows):
        part = lists[rows]
        return np.concatenate(part), np.concatenate([[0], np.cumsum([len(items) for items in part])])

    return seen


@pytest.mark.parametrize("rule", ["filtered", "kept"])
def test_ranks_and_metrics_equal_trec(rule):
    scores, targets, seen = evaluation()
    ranks = rank_targets(
        lambda rows: torch.from_numpy(scores[rows]), np.arange(200), targets, seen_of(seen), num_items=150
    )
    run = {
        str(user): {
            str(item): float(scores[user, item - 1])
            for item in range(1, 151)
            if rule == "kept" or item not in seen[user]
        }
        for user in range(200)
    }
    relevant = {str(user): {str(target): 1} for user, target in enumerate(targets)}
    oracle = pytrec_eval.RelevanceEvaluator(relevant, {"ndcg_cut.10", "recall.10", "recip_rank"}).evaluate(run)
    ours = per_user_metrics(getattr(ranks, rule), ks=(10,))
    for name, trec_name in (("ndcg@10", "ndcg_cut_10"), ("recall@10", "recall_10"), ("mrr", "recip_rank")):
        theirs = np.array([oracle[str(user)][trec_name] for user in range(200)])
        assert np.allclose(ours[name], theirs, atol=1e-12)
        assert not np.allclose(ours[name], np.roll(theirs, 1), atol=1e-12)  # the comparison can fail


def test_the_two_rules_for_seen_items_differ():
    scores, targets, seen = evaluation()
    ranks = rank_targets(
        lambda rows: torch.from_numpy(scores[rows]), np.arange(200), targets, seen_of(seen), num_items=150
    )
    assert mean_metrics(ranks.filtered)["mrr"] > mean_metrics(ranks.kept)["mrr"]
