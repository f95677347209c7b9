"""Exact ranks of the target by counting: full ranking, seen items filtered and kept in one pass, and sampled ranking.

A rank is stored as two counts, the candidates above the target and the other candidates tied with it, so that every
metric at every k under every tie rule is a later re-read. A model that gives equal scores cannot look good.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from textrec.seeding import generator

Scorer = Callable[[slice], torch.Tensor]  # rows of the evaluated users -> scores [B, num_items]; column j is item j + 1
Seen = Callable[[slice], tuple[np.ndarray, np.ndarray]]  # rows -> their seen items, flat, and offsets (B + 1)

CHUNK_SCORES = 2**20  # scores compared at once on a CPU: they and their flags stay in the second-level cache
BLOCK_SCORES = 2**22  # scores asked of a scorer at once on a CPU
MAX_ITEMS = 2**24  # flags are summed in float32, the fastest way; such sums are exact below


@dataclass(frozen=True)
class Counts:
    """Per user, int64: candidates above the target, OTHER candidates tied with it, candidates including it."""

    higher_U: np.ndarray
    ties_U: np.ndarray
    candidates_U: np.ndarray

    def subset(self, mask_U: np.ndarray) -> "Counts":
        """Return the counts of the users in a boolean mask or an index array."""
        return Counts(self.higher_U[mask_U], self.ties_U[mask_U], self.candidates_U[mask_U])


@dataclass(frozen=True)
class Ranks:
    """The target's counts per evaluated user under both rules for seen items."""

    users_U: np.ndarray
    targets_U: np.ndarray
    filtered: Counts  # seen items are no candidates; the target stays one even if it was seen
    kept: Counts  # the whole catalogue

    def subset(self, mask_U: np.ndarray) -> "Ranks":
        """Return the ranks of the users in a boolean mask or an index array: a slice is a re-read, not a new run."""
        users_U, targets_U = self.users_U[mask_U], self.targets_U[mask_U]
        return Ranks(users_U, targets_U, self.filtered.subset(mask_U), self.kept.subset(mask_U))

    def save(self, path: Path) -> None:
        """Write one row per user as parquet; the file appears under its name only when it is complete."""
        import pyarrow
        import pyarrow.parquet

        columns = {"user": self.users_U, "target": self.targets_U}
        for rule in ("filtered", "kept"):
            columns |= {f"{rule}_{name[:-2]}": values for name, values in vars(getattr(self, rule)).items()}
        partial = Path(f"{path}.partial-{os.getpid()}")
        with partial.open("wb") as file:
            pyarrow.parquet.write_table(pyarrow.table(columns), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Ranks":
        """Read what `save` wrote."""
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(path, use_threads=False)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        names = ("higher", "ties", "candidates")
        filtered, kept = (Counts(*(columns[f"{rule}_{name}"] for name in names)) for rule in ("filtered", "kept"))
        return cls(columns["user"], columns["target"], filtered, kept)


class VectorScorer:
    """Scores as inner products of user and item vectors; row k of `item_vectors` [num_items, D] is item k + 1.

    Matrix products may round equal columns differently (seen with MKL on AVX2); items of bit-equal vectors are given
    one score, so that duplicated vectors are ties on every machine.
    """

    def __init__(self, user_vectors: Callable[[slice], torch.Tensor], item_vectors: torch.Tensor):
        self.user_vectors = user_vectors
        self.item_vectors = _at_least_single(item_vectors.detach())
        self.duplicates, self.originals = _duplicate_rows(self.item_vectors)

    def __call__(self, rows: slice) -> torch.Tensor:
        return self.product(self.users(rows))

    def users(self, rows: slice) -> torch.Tensor:
        """Return the user vectors [B, D] of these rows in the item vectors' dtype and on their device."""
        return self.user_vectors(rows).detach().to(self.item_vectors)

    def product(self, users_BD: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scores [B, num_items] of some user vectors."""
        scores_BI = torch.mm(users_BD, self.item_vectors.T, out=out)
        if len(self.duplicates):
            scores_BI[:, self.duplicates] = scores_BI[:, self.originals]
        return scores_BI


def rank_targets(
    scorer: Scorer,
    users_U: np.ndarray,
    targets_U: np.ndarray,
    seen: Seen,
    *,
    num_items: int,
    block_users: int | None = None,
) -> Ranks:
    """Rank each user's target among all items, seen items filtered and kept, from one scoring pass.

    Memory is one block of scores whatever the number of users. Half precision is compared in float32. A non-finite
    score is a ValueError that names the user. Users without a target are not passed in.
    """
    targets_U = _checked_targets(users_U, targets_U, num_items)
    counts_5U = np.zeros((5, len(targets_U)), dtype=np.int64)
    for rows, scores_BI, flags_BI in _chunks(scorer, users_U, num_items, block_users):
        targets_B1 = torch.from_numpy(targets_U[rows, None]).to(scores_BI.device)
        target_scores_B1 = scores_BI.gather(1, targets_B1 - 1)
        higher_B = torch.gt(scores_BI, target_scores_B1, out=flags_BI).sum(1)
        tied_B = torch.eq(scores_BI, target_scores_B1, out=flags_BI).sum(1)
        counts_5U[:2, rows] = torch.stack([higher_B, tied_B - 1]).cpu().numpy()
        counts_5U[2:, rows] = _count_seen(scores_BI, targets_U[rows], target_scores_B1[:, 0].cpu().numpy(), seen(rows))
    higher_U, ties_U, seen_U, seen_higher_U, seen_ties_U = counts_5U
    kept = Counts(higher_U, ties_U, np.full(len(targets_U), num_items, dtype=np.int64))
    filtered = Counts(higher_U - seen_higher_U, ties_U - seen_ties_U, kept.candidates_U - seen_U)
    return Ranks(np.asarray(users_U, dtype=np.int64), targets_U, filtered, kept)


def rank_sampled(
    scorer: Scorer,
    users_U: np.ndarray,
    targets_U: np.ndarray,
    candidates_UN: np.ndarray,
    *,
    num_items: int,
    block_users: int | None = None,
) -> Counts:
    """Rank each user's target among itself and the given negatives [U, N]; 0 fills up shorter lists.

    A negative counts as often as it was drawn; one that equals the target ties with it, as in the published protocols.
    """
    targets_U = _checked_targets(users_U, targets_U, num_items)
    if candidates_UN.min(initial=0) < 0 or candidates_UN.max(initial=0) > num_items:
        raise ValueError(f"candidates_UN holds an item outside 0..{num_items}")
    counts_U3 = np.zeros((len(targets_U), 3), dtype=np.int64)
    for rows, scores_BI, _ in _chunks(scorer, users_U, num_items, block_users):
        items_BN = torch.from_numpy(np.asarray(candidates_UN[rows], dtype=np.int64)).to(scores_BI.device)
        targets_B1 = torch.from_numpy(targets_U[rows]).to(scores_BI.device)[:, None]
        scores_BN = scores_BI.gather(1, (items_BN - 1).clamp(min=0))
        target_scores_B1 = scores_BI.gather(1, targets_B1 - 1)
        drawn_BN = items_BN > 0
        above_BN, tied_BN = scores_BN > target_scores_B1, scores_BN == target_scores_B1
        counts = [(above_BN & drawn_BN).sum(1), (tied_BN & drawn_BN).sum(1), drawn_BN.sum(1) + 1]
        counts_U3[rows] = torch.stack(counts, dim=1).cpu().numpy()
    return Counts(*counts_U3.T.copy())


def top_k(
    scorer: Scorer, users_U: np.ndarray, seen: Seen, k: int, *, num_items: int, block_users: int | None = None
) -> np.ndarray:
    """Return the ids [U, k] of each user's best unseen items, best first; 0 where fewer than k are unseen."""
    lists_UK = np.zeros((len(users_U), k), dtype=np.int64)
    for rows, scores_BI, _ in _chunks(scorer, users_U, num_items, block_users):
        cells_E = torch.from_numpy(_seen_cells(seen(rows), num_items)).to(scores_BI.device)
        unseen_BI = scores_BI.clone(memory_format=torch.contiguous_format)
        unseen_BI.view(-1)[cells_E] = -torch.inf
        best_BK, columns_BK = unseen_BI.topk(min(k, num_items), dim=1)
        lists_UK[rows, : best_BK.shape[1]] = torch.where(best_BK > -torch.inf, columns_BK + 1, 0).cpu().numpy()
    return lists_UK


def _chunks(
    scorer: Scorer, users_U: np.ndarray, num_items: int, block_users: int | None
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield rows, their checked scores [B, num_items] and a float32 scratch of that shape; both are reused."""
    by_vectors = isinstance(scorer, VectorScorer)
    on_gpu = by_vectors and scorer.item_vectors.is_cuda
    block_users = block_users or int(np.clip(BLOCK_SCORES // num_items, 16, 256)) * (16 if on_gpu else 1)
    width = num_items
    if by_vectors:
        _expect_shape("item vectors", scorer.item_vectors, (num_items, width := scorer.item_vectors.shape[1]))
    product = flags = None
    for start in range(0, len(users_U), block_users):
        block = slice(start, min(start + block_users, len(users_U)))
        given = scorer.users(block) if by_vectors else _at_least_single(scorer(block).detach())
        _expect_shape("what the scorer returned", given, (block.stop - start, width))
        chunk_users = len(given) if given.is_cuda else max(CHUNK_SCORES * torch.get_num_threads() // num_items, 16)
        for first in range(0, len(given), chunk_users):
            part = given[first : first + chunk_users]
            rows = slice(start + first, start + first + len(part))
            if flags is None or len(flags) < len(part):
                flags = part.new_empty((len(part), num_items), dtype=torch.float32)
                product = torch.empty_like(flags, dtype=part.dtype) if by_vectors else None
            scores_BI = part if product is None else scorer.product(part, out=product[: len(part)])
            _refuse_non_finite(scores_BI, users_U[rows])
            yield rows, scores_BI, flags[: len(part)]


def _count_seen(
    scores_BI: torch.Tensor, targets_B: np.ndarray, target_scores_B: np.ndarray, seen: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Return [3, B]: each user's distinct seen items other than the target, in all, scored above it, tied with it."""
    first_B = np.arange(len(targets_B)) * scores_BI.shape[1]
    cells_E = np.sort(_seen_cells(seen, scores_BI.shape[1]))
    cells_E = cells_E[np.diff(cells_E, prepend=-1) > 0]
    cells_E = np.append(cells_E, scores_BI.numel())  # so that every search below finds something
    starts_B = np.searchsorted(cells_E, first_B)
    counts_B = np.diff(starts_B, append=len(cells_E) - 1)
    target_cells_B = first_B + targets_B - 1
    target_B = cells_E[np.searchsorted(cells_E, target_cells_B)] == target_cells_B
    scores_E = scores_BI.take(torch.from_numpy(cells_E[:-1]).to(scores_BI.device)).cpu().numpy()
    target_scores_E = np.repeat(target_scores_B, counts_B)

    def per_user(flags_E: np.ndarray) -> np.ndarray:
        sums_B = np.add.reduceat(np.append(flags_E, False), starts_B, dtype=np.int64)
        return np.where(counts_B > 0, sums_B, 0)

    higher_B, tied_B = per_user(scores_E > target_scores_E), per_user(scores_E == target_scores_E)
    return np.stack([counts_B - target_B, higher_B, tied_B - target_B])


def _seen_cells(seen: tuple[np.ndarray, np.ndarray], num_items: int) -> np.ndarray:
    """Return the positions of the seen items in a flattened [B, num_items] block."""
    items_E, offsets_B1 = seen
    if len(items_E) and not (1 <= items_E.min() and items_E.max() <= num_items):
        raise ValueError(f"a seen item lies outside 1..{num_items}: {items_E.min()}..{items_E.max()}")
    return np.repeat(np.arange(len(offsets_B1) - 1) * num_items - 1, np.diff(offsets_B1)) + items_E


def _checked_targets(users_U: np.ndarray, targets_U: np.ndarray, num_items: int) -> np.ndarray:
    if num_items >= MAX_ITEMS:
        raise ValueError(f"num_items={num_items}, expected less than {MAX_ITEMS}")
    targets_U = np.array(targets_U, dtype=np.int64)
    if len(users_U) != len(targets_U):
        raise ValueError(f"{len(users_U)} users but {len(targets_U)} targets")
    wrong = np.flatnonzero((targets_U < 1) | (targets_U > num_items))
    if len(wrong):
        raise ValueError(f"user {users_U[wrong[0]]} has target {targets_U[wrong[0]]}, expected 1..{num_items}")
    return targets_U


def _expect_shape(name: str, values: torch.Tensor, expected: tuple[int, int]) -> None:
    if tuple(values.shape) != expected:
        raise ValueError(f"{name}: shape {tuple(values.shape)}, expected {expected}; the padding row is no item")


def _at_least_single(values: torch.Tensor) -> torch.Tensor:
    """Return half precision and integers as float32: half precision ties thousands of candidates that differ."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _refuse_non_finite(scores_BI: torch.Tensor, users_B: np.ndarray) -> None:
    if torch.isfinite(scores_BI.sum()):  # one fast pass; finite scores fail it by overflow only
        return
    bad = (~torch.isfinite(scores_BI)).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(f"user {users_B[row]} has the score {scores_BI[row, column].item()} for item {column + 1}")


def _duplicate_rows(vectors_ID: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows that equal an earlier row, and those earlier rows."""
    words_IW = (vectors_ID + 0.0).cpu().contiguous().numpy().view(np.uint32)  # + 0.0 turns -0.0 into 0.0
    factors_W = generator("duplicate rows").integers(1, 2**63, words_IW.shape[1], dtype=np.uint64)
    hashes_I = np.zeros(len(words_IW), dtype=np.uint64)
    for column, factor in enumerate(factors_W):
        hashes_I += words_IW[:, column] * factor
    _, first, inverse = np.unique(hashes_I, return_index=True, return_inverse=True)
    duplicates = np.flatnonzero(first[inverse] != np.arange(len(words_IW)))
    originals = first[inverse][duplicates]
    equal = (words_IW[duplicates] == words_IW[originals]).all(1)
    device = vectors_ID.device
    return torch.from_numpy(duplicates[equal]).to(device), torch.from_numpy(originals[equal]).to(device)
