"""Controls as rows: they see the training part alone, and a chain is found where there is one."""

from dataclasses import replace

import numpy as np
import pytest

from textrec.evaluation.metrics import mean_metrics
from textrec.training.controls import evaluate_control


def test_a_chain_is_found_and_popularity_is_not_enough(ring):
    first = {name: mean_metrics(evaluate_control(name, ring, 0).kept, ks=(1,))["recall@1"]
             for name in ("markov", "popularity", "random")}  # fmt: skip
    assert first["markov"] > 0.9
    assert first["popularity"] < 0.3 and first["random"] < 0.3


@pytest.mark.parametrize("name", ["popularity", "last_item", "markov"])
def test_held_out_interactions_change_nothing_but_the_question(ring, name):
    """Other users' targets are redrawn; the scores, and so the ranks of an untouched user, stay."""
    items = np.array(ring.histories.items_E)
    last = ring.histories.offsets_U1[1:] - 1
    items[last[1:]] = (items[last[1:]] + 11) % 30 + 1
    changed = replace(ring, histories=replace(ring.histories, items_E=items))
    before, after = evaluate_control(name, ring, 0), evaluate_control(name, changed, 0)
    assert before.kept.higher_U[0] == after.kept.higher_U[0]
    assert (before.targets_U[1:] != after.targets_U[1:]).all()
