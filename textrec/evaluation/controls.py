"""Scorers that know little: what a model must beat before its number means anything.

Training interactions come as flat arrays: user u's items are items_E[offsets[u] : offsets[u + 1]], oldest first, of
which the first train_end[u] are training. Scores are made one block at a time; no users x items table ever exists.
"""

from collections.abc import Callable

import numpy as np
import torch

from textrec.evaluation.ranking import Scorer, Seen, VectorScorer
from textrec.seeding import derive_seed, generator


def popularity(items_E: np.ndarray, offsets_U1: np.ndarray, train_end_U: np.ndarray, *, num_items: int) -> Scorer:
    """Score every item by its number of training interactions, for everybody alike."""
    items_T, _ = _training(items_E, offsets_U1, train_end_U)
    counts_I = torch.from_numpy(np.bincount(items_T, minlength=num_items + 1)[1:])
    return lambda rows: counts_I.double().expand(rows.stop - rows.start, -1)


def last_item(
    items_E: np.ndarray, offsets_U1: np.ndarray, train_end_U: np.ndarray, last_items_R: np.ndarray, *, num_items: int
) -> Scorer:
    """Score items by the cosine of the sets of training users they share with a row's last item (0: no history)."""
    from scipy.sparse import csr_array

    items_T, users_T = _training(items_E, offsets_U1, train_end_U)
    shape = (len(offsets_U1) - 1, num_items + 1)
    bought_UI = csr_array((np.ones(len(items_T), dtype=np.float32), (users_T, items_T)), shape=shape)
    bought_UI.sum_duplicates()
    bought_UI.data[:] = 1
    bought_IU = bought_UI.T.tocsr()
    norms_I = np.sqrt(np.maximum(np.diff(bought_IU.indptr), 1)).astype(np.float32)

    def scores(rows: slice) -> torch.Tensor:
        shared_BI = (bought_IU[last_items_R[rows]] @ bought_UI).toarray()
        return torch.from_numpy((shared_BI / norms_I / norms_I[last_items_R[rows], None])[:, 1:])

    return scores


def markov(
    items_E: np.ndarray, offsets_U1: np.ndarray, train_end_U: np.ndarray, last_items_R: np.ndarray, *, num_items: int
) -> Scorer:
    """Score items by how often they follow a row's last item (0: no history) in training, then by popularity.

    The order is that of a first-order chain smoothed by a popularity prior: a share of training is less than one step.
    """
    from scipy.sparse import csr_array

    items_T, users_T = _training(items_E, offsets_U1, train_end_U)
    steps = np.flatnonzero(users_T[1:] == users_T[:-1])
    pairs, shape = (items_T[steps], items_T[steps + 1]), (num_items + 1, num_items + 1)
    follows_II = csr_array((np.ones(len(steps), dtype=np.float32), pairs), shape=shape)
    shares_I = (np.bincount(items_T, minlength=num_items + 1) / (len(items_T) + 1)).astype(np.float32)

    def scores(rows: slice) -> torch.Tensor:
        return torch.from_numpy((follows_II[last_items_R[rows]].toarray() + shares_I)[:, 1:])

    return scores


def random_vectors(seen: Seen, *, num_items: int, width: int = 64, seed: int = 0) -> VectorScorer:
    """Score by inner products of random item vectors of length 1 with the mean over a row's history."""
    vectors_ID = generator(seed, "random vectors").normal(size=(num_items, width)).astype(np.float32)
    vectors_ID = torch.nn.functional.normalize(torch.from_numpy(vectors_ID))

    def user_vectors(rows: slice) -> torch.Tensor:
        items_E, offsets_B1 = (torch.from_numpy(np.asarray(part, dtype=np.int64)) for part in seen(rows))
        return torch.nn.functional.embedding_bag(items_E - 1, vectors_ID, offsets_B1[:-1], mode="mean")

    return VectorScorer(user_vectors, vectors_ID)


def shuffled_history(windows: Callable, seed: int = 0) -> Callable:
    """Return `windows` (users_B, ends_B, max_length -> items_BL, times_BL, lengths_B) with the items in random order.

    Windows are left-aligned; times keep their place. An order is a function of the seed, the user and the end of the
    window, not of the batch.
    """

    def shuffled(users_B: np.ndarray, ends_B: np.ndarray, max_length: int):
        items_BL, times_BL, lengths_B = windows(users_B, ends_B, max_length)
        columns_L = np.arange(items_BL.shape[1])
        start = np.uint64(derive_seed(seed, "shuffled history"))
        rows_B = _mixed(_mixed(start + users_B.astype(np.uint64)) + ends_B.astype(np.uint64))
        keys_BL = _mixed(rows_B[:, None] + columns_L.astype(np.uint64)) >> np.uint64(1)
        keys_BL[columns_L >= lengths_B[:, None]] = np.iinfo(np.uint64).max  # the filling stays behind the end
        order_BL = np.argsort(keys_BL, axis=1, kind="stable")
        return np.take_along_axis(items_BL, order_BL, axis=1), times_BL, lengths_B

    return shuffled


def _training(items_E: np.ndarray, offsets_U1: np.ndarray, train_end_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the items and users of the training interactions, users one after another, each oldest first."""
    users_T = np.repeat(np.arange(len(train_end_U)), train_end_U)
    within_T = np.arange(len(users_T)) - np.repeat(np.cumsum(train_end_U) - train_end_U, train_end_U)
    return items_E[np.asarray(offsets_U1)[users_T] + within_T].astype(np.int64), users_T


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits of each 64-bit integer (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
