"""How sure a number is: intervals, paired tests, effect sizes, equivalence.

Values come as `values_SU`: one row per training seed, one column per user, the same users in every row. Users are
crossed with seeds, so both are resampled and a user keeps its values of all seeds; that is slightly conservative
(Owen 2007, "The pigeonhole bootstrap"). With one seed an interval is over users only.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from textrec.seeding import generator

FEW_VALUES = 500  # up to so many distinct values it is faster to draw how often each one occurs


def bootstrap_interval(
    values_SU: np.ndarray, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean over seeds and users.

    Resampling S seeds shows only (S - 1) / S of their variance, so that the seeds' weights are spread by the root of
    its inverse.
    """
    values_SU = _checked(values_SU)
    rng = generator(seed, "bootstrap")
    num_seeds = len(values_SU)
    weights_RS = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), draws) / num_seeds
    weights_RS = 1 / num_seeds + (weights_RS - 1 / num_seeds) * np.sqrt(num_seeds / max(num_seeds - 1, 1))
    means_RS = np.concatenate(list(_resampled_means(values_SU, draws, rng)))
    low, high = np.quantile((means_RS * weights_RS).sum(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_randomisation(a_SU: np.ndarray, b_SU: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of equal means: users' differences, averaged over seeds, get random signs.

    It is never 0: the observed order counts as one of the draws (Phipson and Smyth 2010).
    """
    differences_U = _differences(a_SU, b_SU)
    observed = abs(differences_U.sum()) - 1e-9  # rounding may not turn a tie into less
    blocks = _signed_sums(differences_U, draws, generator(seed, "paired randomisation"))
    return (sum(int((np.abs(sums_R) >= observed).sum()) for sums_R in blocks) + 1) / (draws + 1)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Return p-values adjusted for testing all of them (Holm 1979), in the given order."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * p_values[order]).clip(max=1)
    return adjusted


def equivalence(
    values_SU: np.ndarray, published: float, *, tolerance: float = 0.05, alpha: float = 0.05, seed: int = 0
) -> str:
    """Test our mean for equivalence to a published value (two one-sided tests by the 1 - 2 alpha interval).

    `equivalent`: the interval lies inside published x (1 - tolerance) .. published x (1 + tolerance); `different`:
    wholly outside; `undecided`: the data cannot tell.
    """
    low, high = bootstrap_interval(values_SU, level=1 - 2 * alpha, seed=seed)
    margin = tolerance * abs(published)
    if published - margin <= low and high <= published + margin:
        return "equivalent"
    outside = high < published - margin or low > published + margin
    return "different" if outside else "undecided"


def _resampled_means(values_SU: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield blocks [r, S] of the seeds' means over users drawn with replacement, `draws` rows in all."""
    num_users = values_SU.shape[1]
    groups_SG, sizes_G = np.unique(values_SU, axis=1, return_counts=True)
    if len(sizes_G) <= FEW_VALUES:  # a rank metric has few values: the same distribution from far fewer numbers
        yield rng.multinomial(num_users, sizes_G / num_users, draws) @ groups_SG.T / num_users
        return
    for _ in range(draws):
        times_U = np.bincount(rng.integers(0, num_users, num_users), minlength=num_users)
        yield (values_SU @ times_U / num_users)[None]


def _signed_sums(differences_U: np.ndarray, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield blocks of sums of the differences under random signs, `draws` in all."""
    sizes_G, counts_G = np.unique(np.abs(differences_U).round(12), return_counts=True)
    if len(sizes_G) <= FEW_VALUES:
        yield (2 * rng.binomial(counts_G, 0.5, (draws, len(sizes_G))) - counts_G) @ sizes_G
        return
    for first in range(0, draws, 8):  # a random byte per user holds its signs in eight draws
        bits_8U = np.unpackbits(np.frombuffer(rng.bytes(len(differences_U)), np.uint8)[None], axis=0)
        yield (2.0 * bits_8U[: draws - first] - 1.0) @ differences_U


def _differences(a_SU: np.ndarray, b_SU: np.ndarray) -> np.ndarray:
    a_SU, b_SU = _checked(a_SU), _checked(b_SU)
    if a_SU.shape[1] != b_SU.shape[1]:
        raise ValueError(f"a paired comparison needs the same users: {a_SU.shape[1]} and {b_SU.shape[1]}")
    return a_SU.mean(0) - b_SU.mean(0)


def _checked(values_SU: np.ndarray) -> np.ndarray:
    values_SU = np.asarray(values_SU, dtype=np.float64)
    if values_SU.ndim != 2 or not values_SU.size or not np.isfinite(values_SU).all():
        raise ValueError(f"expected finite values of shape [seeds, users], got shape {values_SU.shape}")
    return values_SU
