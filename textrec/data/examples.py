"""The examples that RecFormer trains on, as packed tokens: targets drawn anew in every epoch, whole words masked.

Everything random depends on the seed, the epoch and the user alone, so any division into batches and processes draws
the same. An object here is indexed by `(epoch, step, rows)`, which is what a sampler of global batches yields.

T tokens · B rows · U users · G groups of tokens (whole words) · W groups in the order of a walk through their rows
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from textrec.data.histories import Histories
from textrec.data.tokenizing import ItemTokens, Packed, SpecialTokens, pack_histories, stretches
from textrec.seeding import derive_seed

IGNORED = -100  # label of a token that is not to be predicted
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest stay as they are
MOST_MASKED = 512  # tokens of one row
ORDER, FATE, REPLACEMENT = 0, 1, 2  # streams of random numbers
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class HistoryExamples:
    """Training examples as packed tokens, one per user and epoch; `examples[epoch, step, rows]` gives a batch of them.

    Rows are those of `users`, who have enough interactions before `ends_U`. The target is drawn anew in every epoch.
    """

    item_tokens: ItemTokens
    histories: Histories
    ends_U: np.ndarray  # train_end of the split
    special: SpecialTokens
    seed: int
    max_items: int = 50
    max_tokens: int = 1024
    faithful: bool = False

    @cached_property
    def users(self) -> np.ndarray:
        return np.flatnonzero(self.ends_U >= 2)

    def __len__(self) -> int:
        return len(self.users)

    def _view(self, histories) -> tuple[Packed, np.ndarray]:
        return pack_histories(self.item_tokens, histories, self.special.start, self.max_items, self.max_tokens)


class FinetuningExamples(HistoryExamples):
    """History and next item: the target is any interaction but the first.

    `faithful`: any at all, so that histories may be empty, and users with a single interaction take part.
    """

    @cached_property
    def users(self) -> np.ndarray:
        return np.flatnonzero(self.ends_U >= (1 if self.faithful else 2))

    def __getitem__(self, batch: tuple[int, int, np.ndarray]) -> dict:
        """Return `history` (packed) and `targets_B` (item ids, int64)."""
        epoch, _, rows = batch
        users_B = self.users[rows]
        seeds_B = row_seeds(users_B, self.seed, "finetuning target", epoch)
        targets_at_B = draw_positions(0 if self.faithful else 1, self.ends_U[users_B], seeds_B)
        items_BL, _, _ = self.histories.windows(users_B, targets_at_B, self.max_items)
        return {"history": self._view(items_BL)[0], "targets_B": self.histories.at(users_B, targets_at_B)}


@dataclass(frozen=True, kw_only=True)
class PretrainingExamples(HistoryExamples):
    """History and next item with whole words masked in both (RecFormer, section 2.4).

    The target lies in the second half of the sequence, floor((L - 1) / 2) .. L - 1, so the history of a sequence of two
    may be empty; what follows the target is not used. Sequences of one are left out. `last_targets` takes the last
    item, for a validation that does not change. `faithful`: see `mask_words`.
    """

    mask_share: float = 0.15
    last_targets: bool = False

    def __getitem__(self, batch: tuple[int, int, np.ndarray]) -> dict:
        """Return `history` and `item` (packed, with `masked_ids_T` and `labels_T`) and `targets_B` (item ids)."""
        epoch, _, rows = batch
        users_B = self.users[rows]
        ends_B = self.ends_U[users_B]
        first_B = ends_B - 1 if self.last_targets else (ends_B - 1) // 2
        targets_at_B = draw_positions(first_B, ends_B, row_seeds(users_B, self.seed, "pretraining target", epoch))
        targets_B = self.histories.at(users_B, targets_at_B)
        items_BL, _, _ = self.histories.windows(users_B, targets_at_B, self.max_items)
        views = {}
        for name, history in (("history", items_BL), ("item", targets_B[:, None])):
            packed, word_starts_T = self._view(history)
            packed["masked_ids_T"], packed["labels_T"] = mask_words(
                packed["token_ids_T"], word_starts_T, packed["lengths_B"],
                row_seeds(users_B, self.seed, "mask", name, epoch),
                special=self.special, share=self.mask_share, faithful=self.faithful,
            )  # fmt: skip
            views[name] = packed
        return {**views, "targets_B": targets_B}


def draw_positions(first_B: np.ndarray | int, ends_B: np.ndarray, seeds_B: np.ndarray) -> np.ndarray:
    """Draw one position of first .. end - 1 for each row, all equally likely."""
    return first_B + (_uniform(seeds_B, np.zeros(len(seeds_B), np.int64), ORDER) * (ends_B - first_B)).astype(np.int64)


def mask_words(
    token_ids_T: np.ndarray,
    word_starts_T: np.ndarray,
    lengths_B: np.ndarray,
    seeds_B: np.ndarray,
    *,
    special: SpecialTokens,
    share: float = 0.15,
    faithful: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(masked_ids_T, labels_T)` of packed rows: whole words are hidden, the start token never.

    Each row's words are taken in random order until `share` of its length (rounded, at least 1 token, the start token
    counted) is reached; one that would overshoot is skipped. Where every word would, the shortest is taken. Of the
    chosen tokens 80 % become the mask token, 10 % any token, 10 % stay. Labels (int64) are -100 elsewhere. `faithful`
    repeats the original's slip: the share is of the longest row of the batch, padding is chosen, too, and then given
    up, and so is the start token with the word glued to it; a short row may go without a masked token.
    """
    rows_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    columns_T = np.arange(len(token_ids_T)) - np.repeat(np.cumsum(lengths_B) - lengths_B, lengths_B)
    starts_T = word_starts_T | (columns_T <= (0 if faithful else 1))
    first_G = np.flatnonzero(starts_T)
    sizes_G = np.diff(first_G, append=len(token_ids_T))
    rows_G, columns_G, costs_G = rows_T[first_G], columns_T[first_G], sizes_G
    shares_B = lengths_B
    if faithful:
        shares_B = np.full_like(lengths_B, lengths_B.max(initial=0))
        padding_B = shares_B - lengths_B
        rows_G = np.concatenate([rows_G, np.repeat(np.arange(len(lengths_B)), padding_B)])
        columns_G = np.concatenate([columns_G, stretches(lengths_B, padding_B)])
        costs_G = np.concatenate([costs_G, np.ones(padding_B.sum(), np.int64)])
    else:
        costs_G = np.where(columns_G == 0, len(token_ids_T) + MOST_MASKED, costs_G)  # the start token: never
    order_G = _uniform(seeds_B[rows_G], columns_G, ORDER)
    budgets_B = np.clip(np.round(share * shares_B).astype(np.int64), 1, MOST_MASKED)
    chosen_G = _fill_budgets(costs_G, rows_G, order_G, budgets_B, at_least_one=not faithful)
    chosen_T = np.repeat(chosen_G[: len(sizes_G)], sizes_G) & (columns_T > 0)
    where = np.flatnonzero(chosen_T)
    seeds, columns = seeds_B[rows_T[where]], columns_T[where]
    fate, random = _uniform(seeds, columns, FATE), _uniform(seeds, columns, REPLACEMENT) * special.num_tokens
    masked_ids_T, labels_T = token_ids_T.copy(), np.full(len(token_ids_T), IGNORED, np.int64)
    labels_T[where] = token_ids_T[where]
    masked_ids_T[where] = np.select(
        [fate < MASK_SHARE, fate < MASK_SHARE + RANDOM_SHARE], [special.mask, random.astype(np.int32)], labels_T[where]
    )
    return masked_ids_T, labels_T


def _fill_budgets(costs_G, rows_G, order_G, budgets_B, at_least_one: bool) -> np.ndarray:
    """Choose the groups that a walk through each row takes which skips what would overshoot.

    A pass takes all rows' groups up to the first that does not fit what is left; that one never will, as do all larger
    ones. What is left shrinks with each pass below the size of such a group, so a few passes do.
    """
    walk = np.lexsort((order_G, rows_G))
    chosen_G = np.zeros(len(costs_G), dtype=bool)
    left_B = budgets_B.copy()
    open_W = walk
    while len(open_W := open_W[costs_G[open_W] <= left_B[rows_G[open_W]]]):
        rows_W, costs_W = rows_G[open_W], costs_G[open_W]
        before_W = np.cumsum(costs_W) - costs_W
        before_row_W = np.maximum.accumulate(np.where(np.diff(rows_W, prepend=-1) > 0, before_W, 0))
        fits_W = before_W - before_row_W + costs_W <= left_B[rows_W]
        chosen_G[open_W[fits_W]] = True
        left_B -= np.bincount(rows_W[fits_W], costs_W[fits_W], len(left_B)).astype(np.int64)
        open_W = open_W[~fits_W]
    if at_least_one:
        bare = walk[(left_B == budgets_B)[rows_G[walk]]]
        bare = bare[np.lexsort((costs_G[bare], rows_G[bare]))]
        chosen_G[bare[np.diff(rows_G[bare], prepend=-1) > 0]] = True
    return chosen_G


def row_seeds(rows_B: np.ndarray, *parts: int | str) -> np.ndarray:
    """Return a random state (uint64) for each row that depends on `parts` and the row's own number alone."""
    return _mix(np.uint64(derive_seed(*parts)) + rows_B.astype(np.uint64) * _GOLDEN)


def _uniform(seeds_N: np.ndarray, columns_N: np.ndarray, stream: int) -> np.ndarray:
    """Return numbers of [0, 1) that depend on a row's seed, a column and a stream: SplitMix64 at that place."""
    place_N = columns_N.astype(np.uint64) + np.uint64(1 + (stream << 32))
    return (_mix(seeds_N + place_N * _GOLDEN) >> np.uint64(11)) * 2.0**-53


def _mix(x_N: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers (the output function of SplitMix64)."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))
