"""Negatives of sampled rankings: 0 fills up lists that are shorter than asked for, and is no candidate.

Strict samplers draw distinct items that are neither the target nor seen before it. The legacy ones repeat what
published numbers were made with: S100u of SASRec and its ports, S100p of BERT4Rec and its replications.

U users · B users of one block · N negatives · I catalogue + 1 (column j is item j; 0 is padding)
"""

from collections.abc import Iterator

import numpy as np

from textrec.data.histories import Histories
from textrec.schema import InputError
from textrec.seeding import generator

BLOCK_CELLS = 2**23  # users of a block x catalogue; draws depend on it, so it is no setting


def draw_negatives(
    histories: Histories, users_U: np.ndarray, targets_at_U: np.ndarray, *, weights_I: np.ndarray,
    num_negatives: int = 100, seed: int = 0, legacy: bool = False,
) -> np.ndarray:  # fmt: skip
    """Draw distinct unseen items [U, N], int64, in proportion to `weights_I`: ones are `uniform`, counts `popular`.

    Entry j of the weights is item j + 1; `targets_at_U` are positions in the users' rows. `legacy` is S100p: seen items
    are drawn as well and then filtered, which leaves active users with fewer negatives.
    """
    drawn_UN = np.zeros((len(users_U), num_negatives), dtype=np.int64)
    rates_I = np.concatenate([[0], np.asarray(weights_I, dtype=np.float64)])
    random = generator(seed, "negatives", "distinct")
    for rows, seen_BI in _seen_blocks(histories, users_U, targets_at_U, len(weights_I)):
        excluded_BI = np.zeros_like(seen_BI) if legacy else seen_BI
        targets_B = histories.at(users_U[rows], targets_at_U[rows])
        excluded_BI[np.arange(len(targets_B)), targets_B] = True
        excluded_BI |= rates_I == 0
        _check_pool((~excluded_BI).sum(axis=1), num_negatives, users_U[rows])
        # the smallest of exponential clocks, one per item, that tick in proportion to the weights
        clocks_BI = random.standard_exponential(excluded_BI.shape)
        np.divide(clocks_BI, rates_I, out=clocks_BI, where=~excluded_BI)
        clocks_BI[excluded_BI] = np.inf
        drawn_UN[rows] = clocks_BI.argpartition(num_negatives - 1, axis=1)[:, :num_negatives]
        if legacy:
            drawn_UN[rows][np.take_along_axis(seen_BI, drawn_UN[rows], axis=1)] = 0
    return drawn_UN


def legacy_uniform_negatives(
    histories: Histories, users_U: np.ndarray, train_ends_U: np.ndarray, *, num_items: int,
    num_negatives: int = 100, seed: int = 0,
) -> np.ndarray:  # fmt: skip
    """Draw S100u [U, N], int64: with replacement, rejecting the training part only.

    So the validation item and the target itself may come, and an item may come twice.
    """
    drawn_UN = np.zeros((len(users_U), num_negatives), dtype=np.int64)
    random = generator(seed, "negatives", "legacy_uniform")
    for rows, seen_BI in _seen_blocks(histories, users_U, train_ends_U, num_items):
        _check_pool((~seen_BI[:, 1:]).sum(axis=1), 1, users_U[rows])
        drawn_BN = drawn_UN[rows]
        refused_BN = np.ones_like(drawn_BN, dtype=bool)
        while refused_BN.any():
            drawn_BN[refused_BN] = random.integers(1, num_items + 1, refused_BN.sum())
            refused_BN = np.take_along_axis(seen_BI, drawn_BN, axis=1)
    return drawn_UN


def _seen_blocks(histories, users_U, ends_U, num_items: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield blocks of users with a mask [B, I] of the items before `ends_U`."""
    step = max(1, BLOCK_CELLS // (num_items + 1))
    for start in range(0, len(users_U), step):
        rows = slice(start, start + step)
        items, offsets_B1 = histories.prefixes(users_U[rows], ends_U[rows])
        seen_BI = np.zeros((len(offsets_B1) - 1, num_items + 1), dtype=bool)
        seen_BI[np.repeat(np.arange(len(seen_BI)), np.diff(offsets_B1)), items] = True
        yield rows, seen_BI


def _check_pool(pool_B: np.ndarray, wanted: int, users_B: np.ndarray) -> None:
    short = np.flatnonzero(pool_B < wanted)
    for row in short[:1]:
        few = f"user {users_B[row]} has only {pool_B[row]} items to draw them from"
        raise InputError(f"num_negatives is {wanted} but {few}")
