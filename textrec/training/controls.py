"""The controls as rows: each scorer of `textrec.evaluation.controls` on a prepared set, ranked like a trained model."""

import numpy as np

from textrec.data.prepared import PreparedSet
from textrec.evaluation import controls
from textrec.evaluation.ranking import Ranks, rank_targets


def evaluate_control(name: str, prepared: PreparedSet, seed: int, which: str = "test") -> Ranks:
    """Rank the targets by `popularity`, `last_item`, `markov` or `random`; counts come from the training part alone."""
    histories, split, num_items = prepared.histories, prepared.split, prepared.num_items
    users_U, ends_U = split.targets(which)
    last_items_U = np.where(ends_U > 0, histories.at(users_U, np.maximum(ends_U - 1, 0)), 0)
    training = histories.items_E, histories.offsets_U1, split.train_end_U

    def seen(rows: slice) -> tuple[np.ndarray, np.ndarray]:
        return histories.prefixes(users_U[rows], ends_U[rows])

    if name == "popularity":
        scorer = controls.popularity(*training, num_items=num_items)
    elif name == "random":
        scorer = controls.random_vectors(seen, num_items=num_items, seed=seed)
    else:
        maker = {"last_item": controls.last_item, "markov": controls.markov}[name]
        scorer = maker(*training, last_items_U, num_items=num_items)
    return rank_targets(scorer, users_U, histories.at(users_U, ends_U), seen, num_items=num_items)
