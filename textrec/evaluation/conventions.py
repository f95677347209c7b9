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
    fewest = counts.candidates_U.min() - 1
    if num_negatives > fewest:
        raise ValueError(f"num_negatives={num_negatives}, but a user has {fewest} other candidates")
    ranks_U = counts.ties_U + 1
    starts_U = np.cumsum(ranks_U) - ranks_U
    higher_R = np.arange(ranks_U.sum()) - np.repeat(starts_U - counts.higher_U, ranks_U)
    cases, case_R = np.unique(
        higher_R * (counts.candidates_U.max() + 1) + np.repeat(counts.candidates_U, ranks_U), return_inverse=True
    )
    higher_P, candidates_P = np.divmod(cases, counts.candidates_U.max() + 1)
    table = np.stack([_hypergeometric(x, higher_P, candidates_P - 1, num_negatives) for x in range(max(ks))], axis=1)
    gains = 1 / np.log2(np.arange(2, max(ks) + 2))
    values = {f"recall@{k}": table[:, :k].sum(1) for k in ks} | {f"ndcg@{k}": table[:, :k] @ gains[:k] for k in ks}
    return {name: np.add.reduceat(values_P[case_R], starts_U) / ranks_U for name, values_P in values.items()}


def rosetta(ranks: Ranks, k: int = 10) -> dict[str, dict[str, float]]:
    """Return the same ranks as each convention would print them: convention -> metric -> mean over users."""
    filtered = mean_metrics(ranks.filtered, (k,))
    conventions = {"full ranking, seen items filtered": filtered}
    conventions["full ranking, seen items kept (RecBole)"] = mean_metrics(ranks.kept, (k,))
    conventions["RecTools' default NDCG"] = {f"ndcg@{k}": rectools_ndcg(filtered[f"ndcg@{k}"], k)}
    conventions[f"MRR cut at {k}"] = {"mrr": float(mrr_at(ranks.filtered, k).mean())}
    for num_negatives, source in ((100, "SASRec paper"), (19, "language model prompts")):
        if num_negatives < ranks.filtered.candidates_U.min():
            sampled = expected_sampled_metrics(ranks.filtered, num_negatives, (k,))
            name = f"{num_negatives} uniform negatives, expected ({source})"
            conventions[name] = {metric: float(values_U.mean()) for metric, values_U in sampled.items()}
    return conventions


def _hypergeometric(x: int, higher_P: np.ndarray, others_P: np.ndarray, drawn: int) -> np.ndarray:
    """Return the probability that exactly x of `drawn` others are above the target."""
    from scipy.special import gammaln  # infinite at the impossible, whose probability comes out as 0

    def log_choose(n, k) -> np.ndarray:
        return gammaln(n + 1.0) - gammaln(k + 1.0) - gammaln(n - k + 1.0)

    return np.exp(log_choose(higher_P, x) + log_choose(others_P - higher_P, drawn - x) - log_choose(others_P, drawn))
