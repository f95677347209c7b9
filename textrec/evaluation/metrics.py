"""Metrics re-read from stored counts. With one target, recall@k is the papers' HR@k and ndcg@k the gain of its rank."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from textrec.evaluation.ranking import Counts

Ties = Literal["expected", "optimistic", "pessimistic"]
KS = (1, 5, 10, 20, 50, 100)


def per_user_metrics(counts: Counts, ks: Sequence[int] = KS, ties: Ties = "expected") -> dict[str, np.ndarray]:
    """Return `recall@k`, `ndcg@k`, `mrr` and `auc` per user, float64 [U].

    A target tied with m candidates holds one of m + 1 ranks: `expected` is the mean over them, `optimistic` the best,
    `pessimistic` the worst. The gain at rank r <= k is 1 / log2(r + 1); auc without any negative is 0.5, chance.
    """
    if ties not in ("expected", "optimistic", "pessimistic"):
        raise ValueError(f"ties={ties!r}, expected 'expected', 'optimistic' or 'pessimistic'")
    before_U = counts.higher_U + (counts.ties_U if ties == "pessimistic" else 0)
    after_U = counts.higher_U + 1 + (0 if ties == "optimistic" else counts.ties_U)
    inverse_ranks = 1.0 / np.arange(1, after_U.max(initial=1) + 1)
    gains = 1.0 / np.log2(np.arange(2, max(ks, default=1) + 2))
    metrics = {f"recall@{k}": mean_over_ranks(np.ones(k), before_U, after_U) for k in ks}
    metrics |= {f"ndcg@{k}": mean_over_ranks(gains[:k], before_U, after_U) for k in ks}
    negatives_U = counts.candidates_U - 1
    above_U = (before_U + after_U - 1) / 2
    auc_U = 1.0 - np.divide(above_U, negatives_U, out=np.full(len(above_U), 0.5), where=negatives_U > 0)
    return metrics | {"mrr": mean_over_ranks(inverse_ranks, before_U, after_U), "auc": auc_U}


def mean_metrics(counts: Counts, ks: Sequence[int] = KS, ties: Ties = "expected") -> dict[str, float]:
    """Return the means of `per_user_metrics` over users; no users is a ValueError."""
    if not len(counts.higher_U):
        raise ValueError("no user to average over")
    return {name: float(values_U.mean()) for name, values_U in per_user_metrics(counts, ks, ties).items()}


def chance_metrics(candidates_U: np.ndarray, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return what a random order of these numbers of candidates reaches: the level a protocol gives for nothing."""
    return mean_metrics(Counts(np.zeros_like(candidates_U), candidates_U - 1, candidates_U), ks)


def list_metrics(lists_UK: np.ndarray, popularity_I: np.ndarray) -> dict[str, float]:
    """Return what the recommended lists [U, k] (ids, 0 = nothing) are made of, given training counts of items 1..I.

    `coverage@k` share of the catalogue recommended to anybody; `novelty@k` mean self-information -log2 of an item's
    share of training (add-one smoothed); `popularity_lift@k` mean popularity of what is recommended, relative to that
    of what is consumed, minus 1 (0 = as popular as the training interactions).
    """
    k, shown = lists_UK.shape[1], lists_UK[lists_UK > 0] - 1
    shares_I = (popularity_I + 1) / (popularity_I + 1).sum()
    consumed = (popularity_I.astype(np.float64) ** 2).sum() / popularity_I.sum()
    return {
        f"coverage@{k}": len(np.unique(shown)) / len(popularity_I),
        f"novelty@{k}": float(-np.log2(shares_I[shown]).mean()),
        f"popularity_lift@{k}": float(popularity_I[shown].mean() / consumed - 1),
    }


def mean_over_ranks(values_R: np.ndarray, before_U: np.ndarray, after_U: np.ndarray) -> np.ndarray:
    """Return the mean of values_R[rank - 1] (0 behind its end) over the ranks before + 1 .. after of each user."""
    sums = np.concatenate([[0.0], np.cumsum(values_R)])
    last = len(values_R)
    return (sums[np.minimum(after_U, last)] - sums[np.minimum(before_U, last)]) / (after_U - before_U)
