"""Targets, views and masks of RecFormer's examples: their distributions, and the choice of words against a loop."""

import numpy as np
import pytest

from textrec.data.examples import (
    ORDER,
    FinetuningExamples,
    PretrainingExamples,
    _uniform,
    draw_positions,
    mask_words,
    row_seeds,
)
from textrec.data.histories import Histories
from textrec.data.tokenizing import ItemTokens, SpecialTokens, history_tokens

SPECIAL = SpecialTokens(start=0, mask=399, padding=1, num_tokens=400)


def random_items(num_items: int = 60, longest: int = 25, seed: int = 0) -> ItemTokens:
    numbers = np.random.default_rng(seed)
    offsets = np.concatenate([[0, 0], np.cumsum(numbers.integers(4, longest, num_items))])
    token_ids = numbers.integers(4, 399, offsets[-1]).astype(np.int32)
    word_starts = numbers.random(len(token_ids)) < 0.6
    word_starts[offsets[:-1]] = True
    return ItemTokens(token_ids, numbers.integers(1, 3, len(token_ids)).astype(np.int8), word_starts, offsets)


def random_histories(lengths, num_items: int = 60, seed: int = 0) -> Histories:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = np.random.default_rng(seed).integers(1, num_items + 1, offsets[-1]).astype(np.int32)
    return Histories(items, np.zeros(len(items), np.int64), offsets)


def examples_of(kind, lengths, **settings):
    lengths = np.asarray(lengths)
    return kind(
        item_tokens=random_items(), histories=random_histories(lengths), ends_U=lengths, special=SPECIAL,
        **{"seed": 1, **settings},
    )  # fmt: skip


def equal(first: dict, second: dict) -> bool:
    return all(
        equal(first[name], second[name]) if isinstance(first[name], dict) else np.array_equal(first[name], second[name])
        for name in first
    )


def rows_of(packed: dict, name: str) -> list[list[int]]:
    return [part.tolist() for part in np.split(packed[name], np.cumsum(packed["lengths_B"])[:-1])]


@pytest.mark.parametrize(("first", "end"), [(0, 1), (1, 4), (4, 9), (0, 13)])
def test_positions_are_uniform_over_their_range(first, end):
    drawn = draw_positions(first, np.full(60_000, end), row_seeds(np.arange(60_000), 0, "target", 3))
    counts = np.bincount(drawn, minlength=end)
    assert counts[:first].sum() == 0 and len(counts) == end
    expected = 60_000 / (end - first)
    assert ((counts[first:] - expected) ** 2 / expected).sum() < 40  # chi-squared, at most 12 degrees of freedom


def test_seeds_of_neighbouring_rows_and_epochs_have_nothing_in_common():
    draws = [
        draw_positions(0, np.full(5_000, 2**30), row_seeds(np.arange(5_000), *parts))
        for parts in ((0, "target", 0), (0, "target", 1), (1, "target", 0), (0, "mask", 0))
    ]
    assert len(np.unique(draws[0])) > 4_990
    correlations = np.corrcoef([*draws, np.roll(draws[0], 1)])
    assert np.abs(correlations[np.triu_indices(5, 1)]).max() < 0.06


@pytest.mark.parametrize(("length", "expected"), [(2, {0, 1}), (5, {2, 3, 4}), (8, {3, 4, 5, 6, 7})])
def test_pretraining_targets_lie_in_the_second_half(length, expected):
    examples = examples_of(PretrainingExamples, [length] * 40)
    histories = examples.histories.items_E.reshape(40, length)
    found = set()
    for epoch in range(30):
        batch = examples[epoch, 0, np.arange(40)]
        for row in range(40):
            positions = set(rows_of(batch["history"], "item_positions_T")[row])
            target_at = len(positions) - 1
            assert batch["targets_B"][row] == histories[row, target_at]
            found.add(target_at)
    assert found == expected


def test_both_views_are_the_packed_tokens_of_their_items():
    lengths = np.array([6, 2, 1, 9, 3])
    examples = examples_of(PretrainingExamples, lengths, last_targets=True, max_items=4, max_tokens=50)
    assert examples.users.tolist() == [0, 1, 3, 4] and len(examples) == 4
    batch = examples[0, 0, np.array([2, 0, 3])]
    users = [3, 0, 4]
    starts = examples.histories.offsets_U1
    before = [examples.histories.items_E[starts[user] : starts[user + 1] - 1] for user in users]
    flat = np.concatenate(before), np.cumsum([0, *map(len, before)])
    expected = history_tokens(examples.item_tokens, flat, start_token=0, max_items=4, max_tokens=50)
    assert all(np.array_equal(batch["history"][name], expected[name]) for name in expected)
    targets = examples.histories.items_E[starts[np.array(users) + 1] - 1]
    alone = history_tokens(examples.item_tokens, targets[:, None], start_token=0, max_tokens=50)
    assert batch["targets_B"].tolist() == targets.tolist()
    assert all(np.array_equal(batch["item"][name], alone[name]) for name in alone)
    again = examples[0, 0, np.array([2, 0, 3])]
    assert equal(batch, again)


@pytest.mark.parametrize("kind", [PretrainingExamples, FinetuningExamples])
def test_an_example_depends_on_seed_epoch_and_user_not_on_batch_or_process(kind):
    examples = examples_of(kind, np.random.default_rng(0).integers(1, 20, 50))
    rows = np.random.default_rng(1).permutation(len(examples))
    whole = examples[2, 0, rows]
    for rank in range(3):
        part = examples[2, 7, rows[rank::3]]
        assert np.array_equal(part["targets_B"], whole["targets_B"][rank::3])
        for name in part["history"]:
            if name.endswith("_T"):
                assert rows_of(part["history"], name) == rows_of(whole["history"], name)[rank::3]
    other_epoch, other_seed = examples[3, 0, rows], examples_of(kind, examples.ends_U, seed=2)[2, 0, rows]
    assert not np.array_equal(other_epoch["targets_B"], whole["targets_B"])
    assert not np.array_equal(other_seed["targets_B"], whole["targets_B"])


def test_finetuning_targets_leave_out_the_first_interaction_unless_the_original_is_copied():
    lengths = [4, 1, 2]
    for faithful, users, expected in ((False, [0, 2], {1, 2, 3}), (True, [0, 1, 2], {0, 1, 2, 3})):
        examples = examples_of(FinetuningExamples, lengths, faithful=faithful)
        assert examples.users.tolist() == users
        row = np.zeros(200, np.int64)
        drawn = [examples[epoch, 0, row[:1]]["history"]["item_positions_T"].max() for epoch in range(200)]
        assert set(drawn) == expected


def masked(seed: int = 0, num_rows: int = 40, faithful: bool = False, longest: int = 12):
    histories = random_histories(np.random.default_rng(seed).integers(0, longest, num_rows), seed=seed)
    examples = examples_of(PretrainingExamples, histories.lengths_U)
    items, _, _ = histories.windows(np.arange(num_rows), histories.lengths_U, 50)
    packed, word_starts = examples._view(items)
    seeds = row_seeds(np.arange(num_rows), seed, "mask")
    masked_ids, labels = mask_words(
        packed["token_ids_T"], word_starts, packed["lengths_B"], seeds, special=SPECIAL, faithful=faithful
    )
    return packed, word_starts, seeds, masked_ids, labels


def words_of(word_starts: np.ndarray) -> list[list[int]]:
    """Return the word groups of one row as lists of columns, the start token left out."""
    groups = []
    for column in range(1, len(word_starts)):
        if column == 1 or word_starts[column]:
            groups.append([])
        groups[-1].append(column)
    return groups


@pytest.mark.parametrize("seed", range(4))
def test_words_are_chosen_as_a_walk_in_random_order_that_skips_overshooting_ones(seed):
    packed, word_starts, seeds, _, labels = masked(seed)
    bounds = np.cumsum([0, *packed["lengths_B"]])
    skipped = 0
    for row, length in enumerate(packed["lengths_B"]):
        at = slice(bounds[row], bounds[row + 1])
        groups = words_of(word_starts[at])
        columns = np.array([group[0] for group in groups], dtype=np.int64)
        order = np.argsort(_uniform(np.repeat(seeds[row], len(columns)), columns, ORDER))
        budget, chosen = max(1, round(0.15 * int(length))), []
        for group in (groups[index] for index in order):
            if len(chosen) >= budget:
                break
            if len(chosen) + len(group) <= budget:
                chosen += group
            else:
                skipped += 1
        if not chosen and groups:
            chosen = min((groups[index] for index in order), key=len)
        assert set(np.flatnonzero(labels[at] != -100)) == set(chosen)
    assert skipped > 10


def test_a_share_of_every_rows_real_length_is_masked_and_never_its_start():
    packed, _, _, masked_ids, labels = masked(num_rows=3_000)
    lengths = packed["lengths_B"]
    starts = np.cumsum(lengths) - lengths
    assert (labels[starts] == -100).all() and (masked_ids[starts] == 0).all()
    chosen = labels != -100
    assert len(labels) > 100_000 and abs(chosen.mean() - 0.15) < 0.005
    counts = np.add.reduceat(chosen, starts)
    assert (counts[lengths > 1] >= 1).all() and (counts[lengths == 1] == 0).all()
    assert np.array_equal(labels[chosen], packed["token_ids_T"][chosen])
    assert np.array_equal(masked_ids[~chosen], packed["token_ids_T"][~chosen])


def test_chosen_tokens_become_mask_random_or_stay_in_the_published_shares():
    packed, _, _, masked_ids, labels = masked(num_rows=4_000)
    chosen = labels != -100
    became = masked_ids[chosen]
    assert abs((became == SPECIAL.mask).mean() - 0.8) < 0.01
    assert abs((became == labels[chosen]).mean() - 0.1) < 0.01
    replaced = became[(became != SPECIAL.mask) & (became != labels[chosen])]
    assert len(np.unique(replaced)) == 399 and abs(replaced.mean() - 199.5) < 12  # any token, special ones included
    hidden = became == SPECIAL.mask
    assert abs(np.corrcoef(hidden[:-1], hidden[1:])[0, 1]) < 0.03  # drawn per token, not per word


def test_whole_words_only():
    packed, word_starts, _, _, labels = masked(num_rows=300)
    columns = np.arange(len(labels)) - np.repeat(
        np.cumsum(packed["lengths_B"]) - packed["lengths_B"], packed["lengths_B"]
    )
    group = np.cumsum(word_starts | (columns <= 1))
    chosen = labels != -100
    sizes, picked = np.bincount(group), np.bincount(group, chosen)
    assert set(picked[sizes > 0] / sizes[sizes > 0]) == {0.0, 1.0}


def test_masks_of_a_row_do_not_depend_on_its_neighbours_unless_the_original_is_copied():
    lengths = [3] * 30
    for faithful in (False, True):
        short = examples_of(PretrainingExamples, lengths, faithful=faithful)[0, 0, np.arange(30)]["history"]
        beside = examples_of(PretrainingExamples, [*lengths, 60], faithful=faithful)[0, 0, np.arange(31)]["history"]
        same = rows_of(short, "labels_T") == rows_of(beside, "labels_T")[:30]
        assert same != faithful


def test_copying_the_original_leaves_short_rows_bare_at_times_but_the_share_holds_on_average():
    packed, _, _, _, labels = masked(num_rows=6_000, faithful=True, longest=6)
    lengths = packed["lengths_B"]
    starts = np.cumsum(lengths) - lengths
    counts = np.add.reduceat(labels != -100, starts)
    assert (counts[lengths > 1] == 0).any() and (labels[starts] == -100).all()
    assert abs(counts.sum() / lengths.sum() - 0.15) < 0.02
    corrected = masked(num_rows=6_000, longest=6)[4]
    spread = [np.std(np.add.reduceat(each != -100, starts) - 0.15 * lengths) for each in (labels, corrected)]
    assert spread[0] > 1.5 * spread[1]
