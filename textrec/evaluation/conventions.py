"""One vector of ranks in the conventions of other libraries and papers, so that two numbers can be put on one axis.

Conversions need no new scores: they are re-reads of the stored counts, exact or in expectation.
"""

from collections.abc import Sequence

import numpy as np

from textrec.evaluation.metrics import mean_metrics, mean_over_ranks
from textrec.evaluation.ranking import Counts, Ranks


def ideal_gain(k: int) -> float:
    """Return the DCG of k hits; one target can reach 1, the gain of the first rank."""
    return float((1 / np.log2(np.arange(2, k + 2))).sum())


def rectools_ndcg(ndcg: float, k: int) -> float:
    """Return our ndcg@k as RecTools' default `NDCG` prints it: divided by the gain of k hits, reachable or not."""
    return ndcg / ideal_gain(k)


def from_rectools_ndcg(ndcg: float, k: int) -> float:
    """Return RecTools' default `NDCG` (`divide_by_achievable=False`) of a set with one target per user as ndcg@k."""
    return ndcg * ideal_gain(k)


def recbole_counts(ranks: Ranks) -> Counts:
    """Return the counts behind RecBole's sequential evaluation, which never removes seen items."""
    return ranks.kept


def mrr_at(counts: Counts, k: int) -> np.ndarray:
    """Return per user 1 / rank where rank <= k, else 0, expected over ties (MRR@k of RecBole, RecTools, RePlay)."""
    return mean_over_ranks(1 / np.arange(1, k + 1), counts.higher_U, counts.higher_U + counts.ties_U + 1)


def expected_sampled_metrics(
    counts: Counts, num_negatives: int, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, np.ndarray]:
    """Return the `recall@k` and `ndcg@k` per user expected when its target is ranked among uniform negatives.

    With h of C - 1 other candidates above the target, the number above it among n distinct negatives is hypergeometric
    (Krichene and Rendle 2020). Tied candidates are thought to be ordered at random.
    """
    if num_negatives > counts.candidates_U.min() - 1:
        raise ValueError(
            f"num_negatives={num_negatives}, but a user has {counts.candidates_U.min() - 1} other candidates"
        )
    log_factorials = _log_factorials(int(counts.candidates_U.max()))
    columns = [f"recall@{k}" for k in ks] + [f"ndcg@{k}" for k in ks]
    values_UM = np.empty((len(counts.higher_U), len(columns)))
    for candidates in np.unique(counts.candidates_U):  # so many users as there are, so few sizes of a catalogue
        users = np.flatnonzero(counts.candidates_U == candidates)
        first_U, last_U = counts.higher_U[users], counts.higher_U[users] + counts.ties_U[users]
        if counts.ties_U[users].any():  # users share the sums over all places that their targets could have
            higher_P = np.arange(first_U.min(), last_U.max() + 1)
            sums_PM = np.cumsum(_expected(higher_P, candidates, num_negatives, ks, log_factorials), axis=0)
            sums_PM = np.concatenate([np.zeros((1, len(columns))), sums_PM])
            values_UM[users] = sums_PM[last_U - higher_P[0] + 1] - sums_PM[first_U - higher_P[0]]
            values_UM[users] /= (last_U - first_U + 1)[:, None]
        else:
            higher_P, place_U = np.unique(first_U, return_inverse=True)
            values_UM[users] = _expected(higher_P, candidates, num_negatives, ks, log_factorials)[place_U]
    return dict(zip(columns, values_UM.T, strict=True))


def _expected(higher_P, candidates: int, drawn: int, ks: Sequence[int], log_factorials: np.ndarray) -> np.ndarray:
    """Return recall and ndcg at each of `ks` (P, 2 x ks) where h of the other candidates are above the target."""
    table_PX = np.stack(
        [_hypergeometric(x, higher_P, candidates - 1, drawn, log_factorials) for x in range(max(ks))], axis=1
    )
    gains = 1 / np.log2(np.arange(2, max(ks) + 2))
    return np.stack([table_PX[:, :k].sum(1) for k in ks] + [table_PX[:, :k] @ gains[:k] for k in ks], axis=1)


def rosetta(ranks: Ranks, k: int = 10) -> dict[str, dict[str, float]]:
    """Return the same ranks as each convention would print them: convention -> metric -> mean over users."""
    conventions = {
        "full ranking, seen items filtered": mean_metrics(ranks.filtered, (k,)),
        "full ranking, seen items kept (RecBole)": mean_metrics(recbole_counts(ranks), (k,)),
    }
    filtered = conventions["full ranking, seen items filtered"]
    conventions["RecTools' default NDCG"] = {f"ndcg@{k}": rectools_ndcg(filtered[f"ndcg@{k}"], k)}
    conventions[f"MRR cut at {k}"] = {"mrr": float(mrr_at(ranks.filtered, k).mean())}
    for num_negatives, source in ((100, "SASRec paper"), (19, "language model prompts")):
        if num_negatives < ranks.filtered.candidates_U.min():
            sampled = expected_sampled_metrics(ranks.filtered, num_negatives, (k,))
            name = f"{num_negatives} uniform negatives, expected ({source})"
            conventions[name] = {metric: float(values_U.mean()) for metric, values_U in sampled.items()}
    return conventions


def _log_factorials(largest: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])


def _hypergeometric(x: int, higher_P, others: int, drawn: int, log_factorials: np.ndarray) -> np.ndarray:
    """Return the probability that exactly x of `drawn` others are above the target."""

    def log_choose(n, k) -> np.ndarray:
        possible = (k >= 0) & (k <= n)
        chosen = np.where(possible, k, 0)
        found = log_factorials[n] - log_factorials[chosen] - log_factorials[n - chosen]
        return np.where(possible, found, -np.inf)

    ways = log_choose(higher_P, x) + log_choose(others - higher_P, drawn - x)
    return np.exp(ways - log_choose(np.asarray(others), drawn))
