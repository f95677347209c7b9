"""What the loops over item texts read: several sets joined to one, contrast batches, examples of users in parts.

Each process gets its rows of every global batch, so the number of processes changes no batch.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import default_convert

from textrec.data.examples import FinetuningExamples, PretrainingExamples
from textrec.data.histories import Histories
from textrec.data.tokenizing import ItemTokens
from textrec.schema import InputError
from textrec.seeding import generator
from textrec.training.batches import GlobalBatches
from textrec.training.text_ranking import TextSet


def joined(sets: Sequence[TextSet], interactions: str = "all") -> tuple[ItemTokens, Histories, np.ndarray]:
    """Return one item table, the histories of all sets over it, and where each one's pretraining part ends.

    The ids of a set's items are shifted by the number of items before; a user of two sets has two sequences.
    """
    ends = [s.prepared.histories.lengths_U if interactions == "all" else s.prepared.split.train_end_U for s in sets]
    if len(sets) == 1:
        return sets[0].tokens, sets[0].prepared.histories, ends[0]
    if len({each.special for each in sets}) > 1:
        raise InputError(f"the sets {', '.join(each.prepared.name for each in sets)} come from different tokenizers")
    tokens, histories = [each.tokens for each in sets], [each.prepared.histories for each in sets]
    items_before = np.cumsum([0] + [each.prepared.num_items for each in sets])
    items_E = np.concatenate([each.items_E + shift for each, shift in zip(histories, items_before, strict=False)])
    flat = [np.concatenate([vars(each)[name] for each in tokens]) for name in
            ("token_ids_T", "type_ids_T", "word_starts_T")]  # fmt: skip
    together = Histories(
        items_E.astype(np.int32), np.concatenate([each.times_E for each in histories]),
        _chained([each.offsets_U1 for each in histories], 1),
    )  # fmt: skip
    return ItemTokens(*flat, _chained([each.offsets_I1 for each in tokens], 2)), together, np.concatenate(ends)


def _chained(offsets: Sequence[np.ndarray], skipped: int) -> np.ndarray:
    """Return the offsets of arrays laid one after the other; all but the first begin with `skipped` zeros."""
    before = np.cumsum([0] + [each[-1] for each in offsets])
    rest = [each[skipped:] + shift for each, shift in zip(offsets[1:], before[1:], strict=False)]
    return np.concatenate([offsets[0], *rest])


class ContrastBatches:
    """The contrast batches of a round, this process's rows of each; incomplete ones at the end of a pass are left out.

    `first_users` (S,): where the users of each joined set begin; a batch then holds sequences of one set alone.
    """

    def __init__(
        self, examples: PretrainingExamples, size: int, per_round: int, seed: int, rank: int, world_size: int,
        first_users: Sequence[int] = (0,),
    ):  # fmt: skip
        self.sets = np.split(np.arange(len(examples)), np.searchsorted(examples.users, first_users[1:]))
        fewest = min(map(len, self.sets))
        if size % world_size or fewest < size:
            raise InputError(
                f"batch_size / accumulate = {size}: expected a multiple of the {world_size} processes, and at most the "
                f"{fewest} sequences of two items or more"
            )
        self.examples, self.size, self.per_round, self.seed = examples, size, per_round, seed
        self.rank, self.world_size, self.round = rank, world_size, 0
        self.sampler = self  # whom Lightning tells the epoch

    def set_epoch(self, epoch: int) -> None:
        self.round = epoch

    def __len__(self) -> int:
        return self.per_round

    def __iter__(self) -> Iterator[dict]:
        per_pass, drawn = sum(len(rows) // self.size for rows in self.sets), -1
        for step in range(self.round * self.per_round, (self.round + 1) * self.per_round):
            passed, place = divmod(step, per_pass)
            if passed != drawn:
                batches, drawn = self._pass(generator(self.seed, "shuffle", passed)), passed
            rows = batches[place][self.rank :: self.world_size]
            yield default_convert(self.examples[passed, step, rows]) | {"step": step}

    def _pass(self, source: np.random.Generator) -> np.ndarray:
        """Return the rows of all batches of one pass over the sequences, (batches, size)."""
        shuffled = [rows[source.permutation(len(rows))][: len(rows) // self.size * self.size] for rows in self.sets]
        batches = np.concatenate(shuffled).reshape(-1, self.size)
        return batches if len(self.sets) == 1 else source.permutation(batches)


class ExampleBatches:
    """Each user's example once an epoch; this process's share of a step comes in `parts`, for accumulation."""

    def __init__(self, examples: FinetuningExamples, batches: GlobalBatches):
        self.examples, self.sampler = examples, batches  # Lightning tells the sampler the epoch

    def __len__(self) -> int:
        return len(self.sampler) * self.sampler.parts

    def __iter__(self) -> Iterator[dict]:
        for epoch, step, rows in self.sampler:
            for part in range(self.sampler.parts):
                batch = self.examples[epoch, step, rows[part :: self.sampler.parts]]
                yield default_convert(batch) | {"step": step, "part": part, "rows_in_step": len(rows)}
