"""Controls on five users whose counts can be done by hand."""

import numpy as np
import pytest
import torch

from textrec.evaluation.controls import last_item, markov, popularity, random_vectors, shuffled_history
from textrec.evaluation.metrics import chance_metrics, mean_metrics
from textrec.evaluation.ranking import rank_targets
from textrec.seeding import generator

# each user's last item lies behind the training part and must not count
HISTORIES = [[1, 2, 3, 5], [1, 2, 4, 5], [2, 3, 1, 5], [4, 4, 2, 5]]
ITEMS = np.array(sum(HISTORIES, []), dtype=np.int32)
OFFSETS = np.array([0, 4, 8, 12, 16])
TRAIN_END = np.array([3, 3, 3, 3])
TRAINING = (ITEMS, OFFSETS, TRAIN_END)


def test_popularity_counts_training_only():
    scores = popularity(*TRAINING, num_items=6)(slice(0, 2))
    assert scores.tolist() == [[3, 4, 2, 3, 0, 0]] * 2


def test_last_item_scores_shared_users():
    scores = last_item(*TRAINING, np.array([3, 4, 0, 6]), num_items=6)(slice(0, 4))
    # users of item 3: {0, 2}; 1: {0, 1, 2}; 2: all; 4: {1, 3}, the repeat in one history counts once
    assert scores[0].tolist() == pytest.approx([2 / 6**0.5, 2 / 8**0.5, 1, 0, 0, 0])
    assert scores[1].tolist() == pytest.approx([1 / 6**0.5, 2 / 8**0.5, 0, 1, 0, 0])
    assert not scores[2:].any()  # no history, and an item that training never saw


def test_markov_counts_steps_and_backs_off_to_popularity():
    scores = markov(*TRAINING, np.array([1, 2, 0]), num_items=6)(slice(0, 3)).numpy()
    shares = np.array([3, 4, 2, 3, 0, 0]) / 13
    assert scores[0] == pytest.approx(shares + [0, 2, 0, 0, 0, 0])  # 1 -> 2 twice, never across users
    assert scores[1] == pytest.approx(shares + [0, 0, 2, 1, 0, 0])
    assert scores[2] == pytest.approx(shares)


def planted_chain(num_users=300, num_items=40, length=12, order=0.9):
    rng = generator("planted chain")
    chain = rng.permutation(num_items)
    items = [rng.integers(0, num_items, num_users)]
    for _ in range(length - 1):
        follow = rng.random(num_users) < order
        items.append(np.where(follow, chain[items[-1]], rng.integers(0, num_items, num_users)))
    items_UL = np.stack(items, axis=1) + 1
    return items_UL, items_UL.ravel(), np.arange(0, num_users * length + 1, length), np.full(num_users, length - 2)


def nothing_seen(rows):
    return np.zeros(0, dtype=np.int64), np.zeros(rows.stop - rows.start + 1, dtype=np.int64)


def ndcg(scorer, targets):
    ranks = rank_targets(scorer, np.arange(300), targets, nothing_seen, num_items=40)
    return mean_metrics(ranks.kept)["ndcg@10"]


def test_only_order_helps_on_a_planted_chain_and_shuffling_takes_it_away():
    items_UL, *training = planted_chain()
    targets, last = items_UL[:, -1], items_UL[:, -2]
    assert ndcg(markov(*training, last, num_items=40), targets) > 0.85
    assert ndcg(popularity(*training, num_items=40), targets) < 0.25

    def windows(users, ends, max_length):
        return items_UL[users][:, : ends[0]], np.zeros((len(users), ends[0])), np.full(len(users), ends[0])

    ends = np.full(300, 11)
    shuffled, _, _ = shuffled_history(windows)(np.arange(300), ends, 11)
    assert ndcg(markov(*training, shuffled[:, -1], num_items=40), targets) < 0.4


def test_random_vectors_are_chance_and_have_one_length():
    items_UL, *_ = planted_chain()

    def seen(rows):
        part = items_UL[rows, :-1]
        return part.ravel(), np.arange(0, part.size + 1, part.shape[1])

    scorer = random_vectors(seen, num_items=40)
    assert torch.allclose(scorer.item_vectors.norm(dim=1), torch.ones(40))
    mean = scorer.item_vectors[items_UL[7, :-1] - 1].mean(0)
    assert torch.allclose(scorer.users(slice(7, 8))[0], mean, atol=1e-6)
    ranks = rank_targets(scorer, np.arange(300), items_UL[:, -1], seen, num_items=40)
    new = ranks.subset((items_UL[:, :-1] != items_UL[:, -1:]).all(axis=1)).filtered  # a repeated target is no guess
    chance = chance_metrics(new.candidates_U)["ndcg@10"]
    assert mean_metrics(new)["ndcg@10"] == pytest.approx(chance, abs=0.06)


def ragged_windows(users, ends, max_length):
    lengths = np.minimum(ends, max_length)
    real = np.arange(lengths.max()) < lengths[:, None]
    items = np.where(real, 100 * users[:, None] + np.arange(lengths.max()) + 1, 0)
    return items, items * 10, lengths


def test_shuffling_keeps_the_items_the_filling_and_the_times():
    users, ends = np.arange(20), np.arange(1, 21)
    items, times, lengths = ragged_windows(users, ends, 12)
    shuffled, same_times, same_lengths = shuffled_history(ragged_windows)(users, ends, 12)
    assert np.array_equal(np.sort(shuffled, axis=1), np.sort(items, axis=1))
    assert np.array_equal(shuffled == 0, items == 0)
    assert np.array_equal(times, same_times) and np.array_equal(lengths, same_lengths)
    assert (shuffled != items).any(axis=1)[5:].all()


def test_an_order_depends_on_seed_and_user_not_on_the_batch():
    shuffle = shuffled_history(ragged_windows, seed=3)
    users, ends = np.arange(20), np.full(20, 12)
    whole, alone = shuffle(users, ends, 12)[0], shuffle(users[7:9], ends[7:9], 12)[0]
    assert np.array_equal(whole[7:9], alone)
    assert not np.array_equal(whole, shuffled_history(ragged_windows, seed=4)(users, ends, 12)[0])
    assert not np.array_equal(whole[0] % 100, whole[1] % 100)


def test_every_position_is_equally_likely():
    users, ends = np.arange(4000), np.full(4000, 4)
    shuffled, _, _ = shuffled_history(ragged_windows)(users, ends, 4)
    shares = np.stack([(shuffled % 100 == place).mean(0) for place in range(1, 5)])
    assert np.allclose(shares, 0.25, atol=0.035)
