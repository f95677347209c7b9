"""Training: learns what can be learnt, stops by validation, resumes bit for bit, refuses another run's checkpoint."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from textrec.evaluation.metrics import mean_metrics
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.module import TrainingConfig
from textrec.training.trainer import evaluate, fit

CONFIG = SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16, dropout=0.1)
TRAINING = TrainingConfig(batch_size=16, learning_rate=1e-2, max_epochs=6, patience=6)


def train(ring, folder, training=TRAINING, config=CONFIG):
    seed_everything(0)
    return fit(SASRec(config), ring, training, seed=0, folder=folder)


def test_the_ring_is_learnt_and_a_shuffled_one_is_not(ring, tmp_path):
    longer = replace(TRAINING, max_epochs=40, patience=40)
    fitted = train(ring, tmp_path / "a", longer)
    assert mean_metrics(evaluate(fitted.model, ring, "test").kept, ks=(1,))["recall@1"] > 0.7
    shuffled = np.random.default_rng(1).permutation(np.asarray(ring.histories.items_E))
    twin = replace(ring, histories=replace(ring.histories, items_E=shuffled))
    untaught = train(twin, tmp_path / "b", longer)
    assert mean_metrics(evaluate(untaught.model, twin, "test").kept, ks=(1,))["recall@1"] < 0.4


def test_evaluate_keeps_the_order_of_users_and_matches_a_plain_ranking(ring):
    seed_everything(0)
    model = SASRec(CONFIG).eval()
    ranks = evaluate(model, ring, "test")
    assert (ranks.users_U == np.arange(40)).all()
    user = 7
    items, _ = ring.histories.prefixes(np.array([user]), ring.split.test_target_U[[user]])
    scores = model.scores(model.encode(torch.tensor(items[None])), model.item_vectors())[0, 1:]
    target = int(ranks.targets_U[user])
    assert ranks.kept.higher_U[user] == int((scores > scores[target - 1]).sum())
    assert (evaluate(model, ring, "test", users=np.array([3, 9])).users_U == [3, 9]).all()


def test_the_checkpoint_of_another_run_is_refused(ring, tmp_path):
    train(ring, tmp_path / "parts", replace(TRAINING, max_epochs=3))
    with pytest.raises(InputError, match="was written for training="):
        train(ring, tmp_path / "parts")  # max_epochs differs, so it is another run


def test_a_killed_run_equals_the_uninterrupted_one(ring, tmp_path, monkeypatch):
    from textrec.training import strategies as module

    whole = train(ring, tmp_path / "whole")
    saves, real_save = [], module.AtomicCheckpoints.save_checkpoint

    def killed_at_the_third(self, checkpoint, path, storage_options=None):
        if len(saves) == 2:
            raise KeyboardInterrupt
        saves.append(path)
        real_save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(module.AtomicCheckpoints, "save_checkpoint", killed_at_the_third)
    with pytest.raises(BaseException):  # noqa: B017
        train(ring, tmp_path / "killed")
    monkeypatch.undo()
    resumed = train(ring, tmp_path / "killed")
    assert [e["epoch"] for e in resumed.curve] == list(range(6))
    for key in ("train_loss", "ndcg@10"):
        assert [e[key] for e in resumed.curve] == [e[key] for e in whole.curve]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    assert resumed.tokens == whole.tokens
    finished = train(ring, tmp_path / "killed")  # nothing left to do
    assert finished.curve == resumed.curve


def test_training_stops_after_patience_and_keeps_the_best(ring, tmp_path):
    frozen = replace(TRAINING, learning_rate=1e-12, max_epochs=30, patience=2)
    fitted = train(ring, tmp_path, frozen, replace(CONFIG, dropout=0.0))
    assert len(fitted.curve) == 3  # one best, two without a better value
    again = train(ring, tmp_path, frozen, replace(CONFIG, dropout=0.0))
    assert len(again.curve) == 3  # a finished run does not train on


def test_another_seed_is_another_model(ring, tmp_path):
    curves = []
    for seed in (0, 1):
        seed_everything(seed)
        curves.append(fit(SASRec(CONFIG), ring, TRAINING, seed=seed, folder=tmp_path / str(seed)).curve)
    assert curves[0][0]["train_loss"] != curves[1][0]["train_loss"]
