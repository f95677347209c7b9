"""Who is tested on what: splits as positions in each user's own row (see `histories.Split`)."""

import math

import numpy as np

from textrec.data.histories import Histories, Split
from textrec.schema import InputError
from textrec.seeding import generator

SPLITS = ("leave_one_out", "global_time", "ratio", "users")
BLOCK_USERS = 50_000


def split_histories(
    histories: Histories,
    *,
    split: str = "leave_one_out",
    validation: str | int = "all",
    test_share: float = 0.1,
    cold_targets: str = "keep",
    seed: int = 0,
) -> Split:
    """Choose each user's training end, validation target and test target.

    leave_one_out: the last interaction is the test target and the one before it the validation target; users with fewer
      than 3 interactions only train.
    global_time: interactions from the (1 - test_share) quantile of all times on are the test period, an equal share
      before it the validation period; the target is the user's last interaction in a period.
    ratio: the last `test_share` of each history (rounded up) is held out and its first interaction is the test target;
      the validation target opens an equal share before it.
    users: a random `test_share` of the users is never trained on and tested on the last interaction; as many others
      are validation users; everybody else trains on everything.

    `validation`: all, none, or the number of random users who give up a validation target; the interactions nobody
    gives up for validation are trained on. `cold_targets="drop"` removes targets whose item no training
    interaction has.
    """
    if split == "global_time" and not histories.times_E.any():
        raise InputError("split is 'global_time' but the source has an order only, no times")
    positions = {"leave_one_out": _leave_one_out, "global_time": _global_time, "ratio": _ratio, "users": _users}[split]
    test_start_U, test_U, train_end_U, validation_U = positions(histories, test_share, generator(seed, "split"))
    if validation != "all":
        chosen_U = np.zeros(histories.num_users, dtype=bool)
        if validation != "none":
            candidates = np.flatnonzero(validation_U >= 0)
            if validation > len(candidates):
                few = f"only {len(candidates)} have a validation target"
                raise InputError(f"validation is {validation} users but {few}")
            chosen_U[generator(seed, "validation").choice(candidates, validation, replace=False)] = True
        validation_U = np.where(chosen_U, validation_U, -1)
        train_end_U = np.where(chosen_U, train_end_U, test_start_U)
    result = Split(*(array.astype(np.int64) for array in (train_end_U, validation_U, test_U)))
    return drop_cold_targets(histories, result) if cold_targets == "drop" else result


def drop_cold_targets(histories: Histories, split: Split) -> Split:
    """Remove the targets whose item occurs in no training interaction."""
    seen_I = training_counts(histories, split) > 0
    kept = []
    for which in ("validation", "test"):
        users, positions = split.targets(which)
        target_U = np.full(histories.num_users, -1)
        warm = seen_I[histories.at(users, positions)]
        target_U[users[warm]] = positions[warm]
        kept.append(target_U)
    return Split(split.train_end_U, *kept)


def training_counts(histories: Histories, split: Split) -> np.ndarray:
    """Return how often each item id occurs in training; index 0 is the padding id. In blocks of users."""
    size = max(int(histories.items_E.max(initial=0)), 0) + 1
    counts_I = np.zeros(size, dtype=np.int64)
    for start in range(0, histories.num_users, BLOCK_USERS):
        users = np.arange(start, min(start + BLOCK_USERS, histories.num_users))
        items, _ = histories.prefixes(users, split.train_end_U[users])
        counts_I += np.bincount(items, minlength=size)
    return counts_I


def tie_statistics(histories: Histories) -> dict | None:
    """Return the shares of interactions and of users whose order the times do not decide; None without times.

    `interactions`: those that share their second with another of the same user; `last`: users whose newest interaction
    shares its second with the one before it, so that the test target is a matter of the tie rule.
    """
    if not histories.times_E.any():
        return None
    same_E = np.diff(histories.times_E) == 0  # position k compares row k with row k + 1
    inner = histories.offsets_U1[1:-1]
    same_E[inner[(inner > 0) & (inner < histories.offsets_U1[-1])] - 1] = False
    tied_E = np.concatenate([same_E, [False]]) | np.concatenate([[False], same_E])
    long_U = histories.lengths_U >= 2
    ends = histories.offsets_U1[1:][long_U]
    shares = {"interactions": tied_E.mean(), "last": same_E[ends - 2].sum() / histories.num_users}
    return {name: round(float(share), 6) for name, share in shares.items()}


# Each function returns, per user: where the held-out test part starts, the test target, where training ends if the user
# gives up a validation target, and that target. -1 where a user has none.


def _leave_one_out(histories: Histories, _share, _generator):
    lengths_U = histories.lengths_U
    enough_U = lengths_U >= 3
    test_U = np.where(enough_U, lengths_U - 1, -1)
    start_U = np.where(enough_U, lengths_U - 1, lengths_U)
    return start_U, test_U, np.where(enough_U, lengths_U - 2, lengths_U), np.where(enough_U, lengths_U - 2, -1)


def _global_time(histories: Histories, share: float, _generator):
    validation_time, test_time = np.quantile(histories.times_E, [max(1 - 2 * share, 0), 1 - share], method="higher")
    before_test_U = _counts_before(histories, test_time)
    before_validation_U = _counts_before(histories, validation_time)
    lengths_U = histories.lengths_U
    test_U = np.where((lengths_U > before_test_U) & (lengths_U >= 2), lengths_U - 1, -1)
    has_validation_U = (before_test_U > before_validation_U) & (before_test_U >= 2)
    return before_test_U, test_U, before_validation_U, np.where(has_validation_U, before_test_U - 1, -1)


def _counts_before(histories: Histories, time: float) -> np.ndarray:
    earlier = np.concatenate([[0], np.cumsum(histories.times_E < time)])
    return np.diff(earlier[histories.offsets_U1])


def _ratio(histories: Histories, share: float, _generator):
    lengths_U = histories.lengths_U
    held_U = np.ceil(lengths_U * share).astype(np.int64)
    enough_U = lengths_U > 2 * held_U
    test_U = np.where(enough_U, lengths_U - held_U, -1)
    validation_U = np.where(enough_U, lengths_U - 2 * held_U, -1)
    return np.where(enough_U, test_U, lengths_U), test_U, np.where(enough_U, validation_U, lengths_U), validation_U


def _users(histories: Histories, share: float, numbers: np.random.Generator):
    lengths_U = histories.lengths_U
    count = math.ceil(share * histories.num_users)
    if 2 * count >= histories.num_users:
        told = f"with as many validation users nobody of {histories.num_users} is left to train on"
        raise InputError(f"test_share is {share}: {told}")
    order = numbers.permutation(histories.num_users)
    group_U = np.zeros(histories.num_users, dtype=np.int8)
    group_U[order[:count]] = 1
    group_U[order[count : 2 * count]] = 2
    last_U = np.where(lengths_U >= 2, lengths_U - 1, -1)
    test_U, validation_U = (np.where(group_U == group, last_U, -1) for group in (1, 2))
    return np.where(group_U == 1, 0, lengths_U), test_U, np.where(group_U == 0, lengths_U, 0), validation_U
