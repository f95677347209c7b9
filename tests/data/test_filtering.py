"""Filters against hand counts and a plain loop."""

from collections import Counter

import duckdb
import numpy as np
import pytest

from textrec.data.filtering import FilterSteps, drop_duplicates, keep_core, keep_ratings
from textrec.schema import InputError


def steps_of(pairs, ratings=None) -> FilterSteps:
    connection = duckdb.connect()
    connection.execute("CREATE TABLE log (u INTEGER, i INTEGER, time DOUBLE, row BIGINT, rating DOUBLE)")
    ratings = ratings or [None] * len(pairs)
    rows = [(u, i, float(row), row, rating) for row, ((u, i), rating) in enumerate(zip(pairs, ratings, strict=True))]
    connection.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?)", rows)
    return FilterSteps(connection)


def left(steps: FilterSteps) -> list[tuple[int, int]]:
    return steps.connection.execute("SELECT u, i FROM log ORDER BY row").fetchall()


# item 9 has two users; user 3 has items 1 and 9. With at least 2 each: user 4 (one interaction) goes, then item 9 has
# one user left, then user 3 has one interaction left, then item 1 has users 1 and 2 left.
CHAIN = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 9), (4, 9)]


def test_one_pass_counts_both_before_dropping_any():
    steps = steps_of(CHAIN)
    keep_core(steps, min_user=2, min_item=2, order="together", repeat=False)
    assert left(steps) == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 9)]


def test_the_second_count_sees_what_the_first_left():
    steps = steps_of(CHAIN)
    keep_core(steps, min_user=2, min_item=2, order="users_first", repeat=False)
    assert left(steps) == [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]
    items_first = steps_of([(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (3, 9)])
    keep_core(items_first, min_user=2, min_item=2, order="items_first", repeat=False)  # item 9, then user 3
    assert left(items_first) == [(1, 1), (1, 2), (2, 1), (2, 2)]


def test_repeating_ends_at_the_core_and_every_pass_is_recorded():
    steps = steps_of(CHAIN)
    keep_core(steps, min_user=2, min_item=2, order="together", repeat=True)
    assert left(steps) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert [step["interactions"] for step in steps.counts] == [7, 6, 5, 4]
    assert steps.counts[0] == {"step": "read", "users": 4, "items": 3, "interactions": 7}
    assert steps.counts[-1] == {
        "step": "interactions of users >= 2, items >= 2, pass 3",
        "users": 2,
        "items": 2,
        "interactions": 4,
    }


@pytest.mark.parametrize("order", ["together", "users_first", "items_first"])
@pytest.mark.parametrize("seed", range(3))
def test_the_core_equals_a_plain_loop_and_does_not_depend_on_the_order(seed, order):
    numbers = np.random.default_rng(seed)
    pairs = [(int(u), int(i)) for u, i in zip(numbers.integers(40, size=300), numbers.zipf(1.6, 300) % 60, strict=True)]
    expected = pairs
    while True:
        users, items = Counter(u for u, _ in expected), Counter(i for _, i in expected)
        kept = [(u, i) for u, i in expected if users[u] >= 4 and items[i] >= 3]
        if kept == expected:
            break
        expected = kept
    steps = steps_of(pairs)
    keep_core(steps, min_user=4, min_item=3, order=order, repeat=True)
    assert left(steps) == expected and 0 < len(expected) < 300


def test_a_threshold_of_one_or_less_drops_nobody_and_records_nothing():
    steps = steps_of(CHAIN)
    keep_core(steps, min_user=0, min_item=1, order="together", repeat=True)
    assert len(left(steps)) == 7 and len(steps.counts) == 1


def test_duplicates_keep_the_first_or_the_last_in_time():
    pairs = [(1, 1), (1, 2), (1, 1), (2, 1), (1, 1)]
    for rule, rows in (("keep_first", [0, 1, 3]), ("keep_last", [1, 3, 4])):
        steps = steps_of(pairs)
        drop_duplicates(steps, rule, "time, row")
        assert [row for (row,) in steps.connection.execute("SELECT row FROM log ORDER BY row").fetchall()] == rows


def test_a_blank_rating_reaches_no_minimum():
    steps = steps_of(CHAIN[:4], ratings=[5, None, 4, 3])
    keep_ratings(steps, 4)
    assert left(steps) == [(1, 1), (2, 1)]
    with pytest.raises(InputError, match="min_rating is 4 but the source has no ratings"):
        keep_ratings(steps_of(CHAIN), 4)


def test_nothing_left_is_the_users_mistake():
    with pytest.raises(InputError, match="no interaction is left after the step 'interactions of users >= 50'"):
        keep_core(steps_of(CHAIN), min_user=50, min_item=0, order="together", repeat=False)


def test_progress_hears_every_step():
    said = []
    steps = steps_of(CHAIN)
    FilterSteps(steps.connection, said.append)
    assert said == ["read: 4 users, 3 items, 7 interactions"]
