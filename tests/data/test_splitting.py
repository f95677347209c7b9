"""Splits by hand, and the properties every split must have."""

import numpy as np
import pytest

from textrec.data.histories import Histories, Split
from textrec.data.splitting import SPLITS, drop_cold_targets, split_histories, tie_statistics, training_counts
from textrec.schema import InputError


def histories_of(lists, times=None) -> Histories:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    items = np.concatenate([np.array(items, dtype=np.int32) for items in lists])
    seconds = np.zeros(len(items), dtype=np.int64) if times is None else np.concatenate(times).astype(np.int64)
    return Histories(items, seconds, offsets)


def parts(split: Split) -> list[tuple[int, int, int]]:
    return list(
        zip(split.train_end_U.tolist(), split.validation_target_U.tolist(), split.test_target_U.tolist(), strict=True)
    )


def test_leave_one_out_gives_the_last_two_away():
    histories = histories_of([[1, 2, 3, 4], [5, 6, 7], [8, 9], [10]])
    assert parts(split_histories(histories)) == [(2, 2, 3), (1, 1, 2), (2, -1, -1), (1, -1, -1)]


def test_without_validation_everything_but_the_last_is_trained_on():
    histories = histories_of([[1, 2, 3, 4], [5, 6, 7], [8, 9]])
    assert parts(split_histories(histories, validation="none")) == [(3, -1, 3), (2, -1, 2), (2, -1, -1)]


def test_some_users_give_up_a_validation_target():
    histories = histories_of([[1, 2, 3]] * 20 + [[4, 5]])
    first, again, other = (split_histories(histories, validation=5, seed=seed) for seed in (0, 0, 1))
    assert parts(first) == parts(again) != parts(other)
    chosen_U = first.validation_target_U >= 0
    assert chosen_U.sum() == 5 and not chosen_U[20]
    assert (first.train_end_U[chosen_U] == 1).all() and (first.train_end_U[:20][~chosen_U[:20]] == 2).all()
    with pytest.raises(InputError, match="validation is 21 users but only 20 have a validation target"):
        split_histories(histories, validation=21)


def test_global_time_cuts_at_one_instant_for_all():
    # 10 interactions at times 0..9: validation from 6 on, test from 8 on
    histories = histories_of([[1, 2, 3], [4, 5, 6, 7], [8, 9], [10]], [[0, 6, 8], [1, 2, 3, 7], [4, 9], [5]])
    split = split_histories(histories, split="global_time", test_share=0.2)
    # user 1's target of the validation period is at 7; user 2 has none there; user 3 only trains
    assert parts(split) == [(1, 1, 2), (3, 3, -1), (1, -1, 1), (1, -1, -1)]
    assert parts(split_histories(histories, split="global_time", test_share=0.2, validation="none"))[1] == (4, -1, -1)
    with pytest.raises(InputError, match="an order only, no times"):
        split_histories(histories_of([[1, 2, 3]]), split="global_time")


def test_ratio_predicts_the_first_of_the_held_out_part():
    histories = histories_of([list(range(1, 11)), [1, 2, 3], [1, 2]])
    split = split_histories(histories, split="ratio", test_share=0.2)
    assert parts(split) == [(6, 6, 8), (1, 1, 2), (2, -1, -1)]


def test_users_split_trains_on_nothing_of_a_tested_user():
    histories = histories_of([[1, 2, 3]] * 10)
    split = split_histories(histories, split="users", test_share=0.2, seed=3)
    assert sorted(parts(split)) == [(0, -1, 2)] * 2 + [(0, 2, -1)] * 2 + [(3, -1, -1)] * 6
    with pytest.raises(InputError, match="nobody of 3 is left to train on"):
        split_histories(histories_of([[1, 2, 3]] * 3), split="users", test_share=0.4)


@pytest.mark.parametrize("validation", ["all", "none", 7])
@pytest.mark.parametrize("split", SPLITS)
def test_no_target_is_trained_on_or_lacks_a_history(split, validation):
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(1, 15, size=80)
    lists = [numbers.integers(1, 30, size=length) for length in lengths]
    times = [np.sort(numbers.integers(1, 500, size=length)) for length in lengths]
    result = split_histories(histories_of(lists, times), split=split, validation=validation, test_share=0.15)
    validation_U, test_U = result.validation_target_U, result.test_target_U
    assert (test_U >= 0).sum() > 5 and ((validation_U >= 0).sum() > 0) == (validation != "none")
    for target_U in (validation_U, test_U):
        has_U = target_U >= 0
        assert (target_U[has_U] >= result.train_end_U[has_U]).all()
        assert (target_U[has_U] >= 1).all() and (target_U[has_U] < lengths[has_U]).all()
    both_U = (validation_U >= 0) & (test_U >= 0)
    assert (validation_U[both_U] < test_U[both_U]).all()


def test_cold_targets_are_those_nobody_is_trained_on():
    histories = histories_of([[1, 2, 3], [1, 3, 2], [1, 1, 4]])
    split = split_histories(histories)
    assert training_counts(histories, split).tolist() == [0, 3, 0, 0, 0]
    assert parts(drop_cold_targets(histories, split)) == [(1, -1, -1), (1, -1, -1), (1, 1, -1)]
    assert parts(split_histories(histories, cold_targets="drop")) == parts(drop_cold_targets(histories, split))


def test_ties_are_counted_within_a_user_only():
    histories = histories_of([[1, 2, 3], [4], [5, 6]], [[7, 7, 8], [8], [8, 8]])
    assert tie_statistics(histories) == {"interactions": round(4 / 6, 6), "last": round(1 / 3, 6)}
    assert tie_statistics(histories_of([[1, 2]])) is None
