"""Training batches: which histories form a step, their inputs and their targets, as a pure function of seed and epoch.

Every process of a run draws the same permutation and takes every world_size-th row of each global batch, so 1 x 128 and
2 x 64 see the same histories in the same step, and a resumed run sees what the uninterrupted one would have seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from textrec.data.histories import Histories
from textrec.models.bert4rec import mask_histories
from textrec.schema import PADDING_ID
from textrec.seeding import generator


class GlobalBatches(Sampler[tuple[int, int, np.ndarray]]):
    """Yields `(epoch, step, rows)`: this process's rows of each global batch, reshuffled every epoch.

    Each process has at least `parts` rows of every batch, to compute its gradient in so many parts.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, parts: int = 1):
        if batch_size < world_size * parts:
            in_parts = f" in {parts} parts each" if parts > 1 else ""
            raise ValueError(f"batch_size={batch_size} histories cannot be shared by {world_size} processes{in_parts}")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self.rank, self.world_size, self.parts, self.epoch = rank, world_size, parts, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this at the start of every epoch, a resumed one included."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_rows, self.batch_size)
        return full + (rest >= self.world_size * self.parts)

    def __iter__(self) -> Iterator[tuple[int, int, np.ndarray]]:
        order = generator(self.seed, "shuffle", self.epoch).permutation(self.num_rows)
        for step in range(len(self)):
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield self.epoch, step, rows[self.rank :: self.world_size]


class HistoryBatches(Dataset):
    """Gathers the newest training interactions of a batch of users; `make` turns a window into inputs and targets.

    `with_times` adds the inputs' times and each row's newest time, which is that of its last target.
    """

    def __init__(
        self, histories: Histories, train_end_U: np.ndarray, max_sequence_length: int, make: Callable,
        with_times: bool = False,
    ):  # fmt: skip
        self.users = np.flatnonzero(train_end_U >= 2)  # one interaction leaves nothing to predict
        self.histories, self.train_end_U = histories, train_end_U
        self.max_sequence_length, self.make, self.with_times = max_sequence_length, make, with_times

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, batch: tuple[int, int, np.ndarray]) -> dict:
        import torch

        epoch, step, rows = batch
        users_B = self.users[rows]
        ends_B = self.train_end_U[users_B]
        items_BL, times_BL, lengths_B = self.histories.windows(users_B, ends_B, self.max_sequence_length + 1)
        inputs_BL, targets_BL = self.make(items_BL, epoch, step)
        batch = {"items": torch.from_numpy(inputs_BL), "targets": torch.from_numpy(targets_BL), "step": step}
        if self.with_times:
            requests_B = np.take_along_axis(times_BL, lengths_B[:, None] - 1, 1)[:, 0]
            times_BL = np.ascontiguousarray(times_BL[:, : inputs_BL.shape[1]])
            batch |= {"times": torch.from_numpy(times_BL), "requests": torch.from_numpy(requests_B)}
        return batch


def next_item_targets(items_BL: np.ndarray, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Shift by one: each position predicts the next interaction, the newest interaction is a target only."""
    targets_BL = items_BL[:, 1:]
    return np.where(targets_BL != PADDING_ID, items_BL[:, :-1], PADDING_ID), np.ascontiguousarray(targets_BL)


@dataclass(frozen=True)
class MaskedItems:
    """BERT4Rec's inputs and targets, masked afresh in every epoch; the window is not shifted."""

    num_items: int
    mask_probability: float
    last_probability: float
    seed: int
    rank: int

    def __call__(self, items_BL: np.ndarray, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        return mask_histories(
            items_BL, self.num_items, generator(self.seed, "mask", epoch, step, self.rank),
            mask_probability=self.mask_probability, last_probability=self.last_probability,
        )  # fmt: skip


class InParts:
    """A loader whose batches come in `parts` of their rows, each with the number of targets of the whole batch."""

    def __init__(self, loader: DataLoader, parts: int):
        self.loader, self.parts, self.sampler = loader, parts, loader.sampler  # Lightning tells the sampler the epoch

    def __len__(self) -> int:
        return len(self.loader) * self.parts

    def __iter__(self) -> Iterator[dict]:
        for batch in self.loader:
            rows_of = {name: value for name, value in batch.items() if hasattr(value, "shape")}
            told = {"targets_in_step": int((batch["targets"] != PADDING_ID).sum())}
            for part in range(self.parts):
                rows = {name: value[part :: self.parts] for name, value in rows_of.items()}
                yield batch | rows | told | {"part": part}


def training_loader(
    dataset: HistoryBatches, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, parts: int = 1
) -> DataLoader | InParts:
    """Return a loader of ready batches; gathering is vectorised, so it needs no worker processes."""
    batches = GlobalBatches(len(dataset), batch_size, seed, rank, world_size, parts)
    loader = DataLoader(dataset, batch_size=None, sampler=batches)
    return loader if parts == 1 else InParts(loader, parts)
