"""What may be drawn as a negative, how often, and the same again for the same seed."""

import numpy as np
import pytest

from textrec.data.histories import Histories
from textrec.data.negatives import draw_negatives, legacy_uniform_negatives
from textrec.data.sources.synthetic import SyntheticConfig, generate
from textrec.schema import InputError

MADE = generate(SyntheticConfig(num_users=300))
HISTORIES = Histories(MADE.items_E, MADE.times_E, MADE.offsets_U1)
USERS = np.arange(HISTORIES.num_users)
LAST = HISTORIES.lengths_U - 1
TARGETS = HISTORIES.at(USERS, LAST)
SEEN = [
    set(MADE.items_E[start : end - 1].tolist())
    for start, end in zip(MADE.offsets_U1, MADE.offsets_U1[1:], strict=False)
]
POPULARITY = np.arange(60)  # item 1 is never drawn


def one_user(times: int) -> tuple[Histories, np.ndarray, np.ndarray]:
    """Many users alike: history 1, 2, target 3 of a catalogue of five."""
    items = np.tile(np.array([1, 2, 3], np.int32), times)
    histories = Histories(items, np.zeros(len(items), np.int64), np.arange(0, 3 * times + 1, 3))
    return histories, np.arange(times), np.full(times, 2)


@pytest.mark.parametrize("method", ["uniform", "popular"])
def test_strict_negatives_are_distinct_unseen_and_not_the_target(method):
    weights = np.ones(60) if method == "uniform" else POPULARITY
    drawn = draw_negatives(HISTORIES, USERS, LAST, weights_I=weights, num_negatives=30)
    assert drawn.shape == (300, 30)
    assert drawn.dtype == np.int64
    for user, row in enumerate(drawn.tolist()):
        assert len(set(row)) == 30
        assert not set(row) & (SEEN[user] | {int(TARGETS[user]), 0})
    assert method == "uniform" or 1 not in drawn


def test_every_allowed_item_is_equally_likely():
    histories, users, targets_at = one_user(8_000)
    drawn = draw_negatives(histories, users, targets_at, weights_I=np.ones(7), num_negatives=1)
    counts = np.bincount(drawn[:, 0], minlength=8)
    assert counts[:4].sum() == 0
    assert counts[4:] == pytest.approx(2_000, abs=4 * np.sqrt(8_000 * 0.25 * 0.75))


def test_popular_items_come_in_proportion():
    histories, users, targets_at = one_user(8_000)
    first = draw_negatives(histories, users, targets_at, weights_I=np.array([9, 9, 9, 1, 3]), num_negatives=1)
    assert (first == 5).mean() == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 8_000))


def test_legacy_popular_filters_seen_items_after_the_draw():
    drawn = draw_negatives(HISTORIES, USERS, LAST, weights_I=POPULARITY + 1, num_negatives=59, legacy=True)
    for user, row in enumerate(drawn.tolist()):  # 59 of 60 items are all but the target; the seen ones become 0
        assert {item for item in row if item} == set(range(1, 61)) - SEEN[user] - {int(TARGETS[user])}
        assert row.count(0) == len(SEEN[user])


def test_legacy_uniform_rejects_the_training_part_only():
    train_ends = HISTORIES.lengths_U - 2
    drawn = legacy_uniform_negatives(HISTORIES, USERS, train_ends, num_items=60, num_negatives=400)
    repeats = validation = target = 0
    for user, row in enumerate(drawn.tolist()):
        start = MADE.offsets_U1[user]
        assert not set(row) & set(MADE.items_E[start : start + train_ends[user]].tolist())
        assert 0 not in row
        repeats += len(row) - len(set(row))
        validation += int(MADE.items_E[start + train_ends[user]]) in row
        target += int(TARGETS[user]) in row
    assert repeats > 0
    assert validation > 290
    assert target > 290


def test_same_seed_same_negatives():
    first, again, other = (
        draw_negatives(HISTORIES, USERS, LAST, weights_I=np.ones(60), num_negatives=5, seed=seed) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_too_few_items_are_an_error_that_names_the_user():
    histories, users, targets_at = one_user(2)
    with pytest.raises(InputError, match="num_negatives is 3 but user 0 has only 2 items"):
        draw_negatives(histories, users, targets_at, weights_I=np.ones(5), num_negatives=3)
    with pytest.raises(InputError, match="user 0 has only 0 items"):
        legacy_uniform_negatives(histories, users, targets_at, num_items=2)
