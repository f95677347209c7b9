"""User histories as flat, memory-mapped arrays, and batches gathered from them without a loop per row.

A set of U users and E interactions is three arrays: `items_E` (int32, ids 1..num_items), `times_E` (int64 unix
seconds, all zero where the source gives an order only) and `offsets_U1` (int64): user u owns rows
offsets[u]..offsets[u+1], oldest first. A split is three positions per user in that user's own row: it costs no copy.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Histories:
    """Time-ordered item ids of all users. Users are rows 0..num_users-1."""

    items_E: np.ndarray
    times_E: np.ndarray
    offsets_U1: np.ndarray

    @property
    def num_users(self) -> int:
        return len(self.offsets_U1) - 1

    @property
    def lengths_U(self) -> np.ndarray:
        return np.diff(self.offsets_U1)

    def windows(self, users_B: np.ndarray, ends_B: np.ndarray, max_length: int):
        """Return the newest `max_length` interactions before position `ends_B` of each user.

        Returns `(items_BL, times_BL, lengths_B)`, int64, left-aligned, zeros behind the end; L is the longest length
        in the batch (at least 1).
        """
        starts_B = np.maximum(ends_B - max_length, 0)
        lengths_B = np.maximum(ends_B - starts_B, 0)
        columns_L = np.arange(max(int(lengths_B.max(initial=0)), 1))
        real_BL = columns_L < lengths_B[:, None]
        rows_BL = np.where(real_BL, (self.offsets_U1[users_B] + starts_B)[:, None] + columns_L, 0)
        items_BL = np.where(real_BL, self.items_E[rows_BL], 0).astype(np.int64)
        times_BL = np.where(real_BL, self.times_E[rows_BL], 0)
        return items_BL, times_BL, lengths_B

    def at(self, users_B: np.ndarray, positions_B: np.ndarray) -> np.ndarray:
        """Return the item ids (int64) at `positions_B` of each user's row."""
        return self.items_E[self.offsets_U1[users_B] + positions_B].astype(np.int64)

    def prefixes(self, users_B: np.ndarray, ends_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the items before `ends_B` as one flat array and its offsets (B + 1): the seen items of a batch."""
        offsets_B1 = np.concatenate([[0], np.cumsum(ends_B)])
        within = np.arange(offsets_B1[-1]) - np.repeat(offsets_B1[:-1], ends_B)
        return self.items_E[np.repeat(self.offsets_U1[users_B], ends_B) + within].astype(np.int64), offsets_B1

    @classmethod
    def load(cls, folder: Path) -> "Histories":
        """Memory-map `items.npy`, `times.npy` and `offsets.npy` of a prepared folder."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("items", "times", "offsets")))


@dataclass(frozen=True)
class Split:
    """Positions in each user's row: training is [0, train_end); a target at position p is predicted from [0, p).

    -1 marks a user without that target. `validation_target` may lie inside or behind the training part of other
    users, never inside the same user's.
    """

    train_end_U: np.ndarray
    validation_target_U: np.ndarray
    test_target_U: np.ndarray

    def targets(self, which: str) -> tuple[np.ndarray, np.ndarray]:
        """Return `(users, positions)` of the users that have a `validation` or `test` target."""
        positions_U = {"validation": self.validation_target_U, "test": self.test_target_U}[which]
        users = np.flatnonzero(positions_U >= 0)
        return users, positions_U[users]
