"""Batches: the same histories whatever the number of processes, the right targets, a new order every epoch."""

import numpy as np
import pytest

from textrec.training.batches import GlobalBatches, HistoryBatches, MaskedItems, next_item_targets, training_loader


def rows_of(batches: GlobalBatches) -> list[np.ndarray]:
    return [rows for _, _, rows in batches]


def test_two_processes_share_each_global_batch():
    whole = rows_of(GlobalBatches(13, 4, seed=3))
    halves = [rows_of(GlobalBatches(13, 4, seed=3, rank=rank, world_size=2)) for rank in (0, 1)]
    assert [len(rows) for rows in whole] == [4, 4, 4, 1]
    for step, (first, second) in enumerate(zip(*halves, strict=True)):
        assert sorted([*first, *second]) == sorted(whole[step])
    assert len(halves[0]) == 3  # the last batch, of one history, cannot be shared by two processes


def test_epochs_differ_and_repeat():
    batches = GlobalBatches(50, 8, seed=1)
    first = np.concatenate(rows_of(batches))
    batches.set_epoch(1)
    second = np.concatenate(rows_of(batches))
    batches.set_epoch(0)
    assert sorted(first) == list(range(50)) == sorted(second)
    assert (first != second).any()
    assert (np.concatenate(rows_of(batches)) == first).all()


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(ValueError, match="batch_size=2 histories cannot be shared by 4 processes"):
        GlobalBatches(10, 2, seed=0, world_size=4)


def test_targets_are_the_next_items_and_no_held_out_item_is_among_them(ring):
    dataset = HistoryBatches(ring.histories, ring.split.train_end_U, 4, next_item_targets)
    batch = next(iter(training_loader(dataset, 40, seed=0)))
    items, targets = batch["items"].numpy(), batch["targets"].numpy()
    assert items.shape == targets.shape and items.shape[1] <= 4
    real = items > 0
    assert (real == (targets > 0)).all()
    assert (targets[real] == items[real] % 30 + 1).all()  # the ring's successor
    trained = np.minimum(ring.split.train_end_U - 1, 4)
    assert sorted(real.sum(1)) == sorted(trained)


def test_users_with_one_training_interaction_are_left_out(ring):
    train_end = ring.split.train_end_U.copy()
    train_end[[0, 5]] = [1, 0]
    assert len(HistoryBatches(ring.histories, train_end, 4, next_item_targets)) == 38


def test_masks_change_with_the_epoch_and_repeat_with_the_seed(ring):
    items, _, _ = ring.histories.windows(np.arange(40), ring.split.train_end_U, 6)
    mask = MaskedItems(30, 0.4, 0.1, seed=0, rank=0)
    first, again, later = mask(items, 0, 0), mask(items, 0, 0), mask(items, 1, 0)
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert (first[0] != later[0]).any()
    assert (first[1][first[1] > 0] == items[first[1] > 0]).all()
