"""Flat histories give the windows, prefixes and targets that a loop over lists gives."""

import numpy as np
import pytest

from textrec.data.histories import Histories, Split


def histories_of(lists, times=None) -> Histories:
    offsets = np.cumsum([0, *map(len, lists)])
    items = np.array([item for items in lists for item in items], dtype=np.int32)
    seconds = np.zeros(len(items), dtype=np.int64) if times is None else np.concatenate([*times, []]).astype(np.int64)
    return Histories(items, seconds, offsets.astype(np.int64))


LISTS = [[5, 3, 9], [2], [], [7, 7, 1, 4]]


def test_windows_take_the_newest_items_and_pad_behind():
    histories = histories_of(LISTS, [[10, 20, 30], [5], [], [1, 2, 3, 4]])
    items, times, lengths = histories.windows(np.array([3, 0, 1]), np.array([4, 2, 0]), max_length=3)
    assert items.tolist() == [[7, 1, 4], [5, 3, 0], [0, 0, 0]]
    assert times.tolist() == [[2, 3, 4], [10, 20, 0], [0, 0, 0]]
    assert lengths.tolist() == [3, 2, 0]


def test_a_batch_of_empty_histories_is_one_column_of_padding():
    items, _, lengths = histories_of(LISTS).windows(np.array([2, 1]), np.array([0, 0]), max_length=50)
    assert items.tolist() == [[0], [0]] and lengths.tolist() == [0, 0]


def test_the_last_user_may_be_empty():
    items, _, _ = histories_of([[1, 2], []]).windows(np.array([1, 0]), np.array([0, 2]), max_length=2)
    assert items.tolist() == [[0, 0], [1, 2]]


def test_prefixes_are_the_items_before_a_position():
    flat, offsets = histories_of(LISTS).prefixes(np.array([3, 2, 0]), np.array([2, 0, 3]))
    assert flat.tolist() == [7, 7, 5, 3, 9] and offsets.tolist() == [0, 2, 2, 5]


@pytest.mark.parametrize("seed", range(5))
def test_windows_and_prefixes_equal_a_loop_over_lists(seed):
    numbers = np.random.default_rng(seed)
    lists = [numbers.integers(1, 99, size=size).tolist() for size in numbers.integers(0, 12, size=30)]
    histories = histories_of(lists)
    users = numbers.permutation(30)[:17]
    ends = np.array([numbers.integers(0, len(lists[user]) + 1) for user in users])
    items, _, lengths = histories.windows(users, ends, max_length=5)
    for row, (user, end) in enumerate(zip(users, ends, strict=True)):
        expected = lists[user][max(end - 5, 0) : end]
        assert items[row].tolist() == expected + [0] * (items.shape[1] - len(expected))
        assert lengths[row] == len(expected)
    flat, _ = histories.prefixes(users, ends)
    assert flat.tolist() == [item for user, end in zip(users, ends, strict=True) for item in lists[user][:end]]


def test_targets_leave_out_users_without_one():
    split = Split(np.array([1, 1, 0, 2]), np.array([1, -1, -1, 2]), np.array([2, -1, -1, 3]))
    users, positions = split.targets("test")
    assert users.tolist() == [0, 3] and positions.tolist() == [2, 3]
    assert histories_of(LISTS).at(users, positions).tolist() == [9, 4]


def test_loading_maps_the_files(tmp_path):
    histories = histories_of(LISTS)
    for name, array in (("items", histories.items_E), ("times", histories.times_E), ("offsets", histories.offsets_U1)):
        np.save(tmp_path / f"{name}.npy", array)
    loaded = Histories.load(tmp_path)
    assert isinstance(loaded.items_E, np.memmap)
    assert loaded.lengths_U.tolist() == [3, 1, 0, 4]
