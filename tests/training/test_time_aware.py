"""Times on their way to a model that reads them: in batches, in the ranking, over processes, after a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from textrec.evaluation.metrics import mean_metrics
from textrec.models.hstu import HSTU, HSTUConfig
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.seeding import seed_everything
from textrec.training import strategies
from textrec.training.batches import HistoryBatches, InParts, next_item_targets, training_loader
from textrec.training.launch import fit_in_processes
from textrec.training.module import TrainingConfig
from textrec.training.trainer import evaluate, fit

CONFIG = HSTUConfig(
    num_items=30, max_sequence_length=8, embedding_dim=16, linear_dim=8, attention_dim=8, num_heads=2, dropout=0.0
)
every_block = pytest.mark.parametrize("block", ["hstu", "fuxi"])  # that reads times
TRAINING = TrainingConfig(batch_size=8, learning_rate=1e-3, max_epochs=1, patience=9, adam_betas=(0.9, 0.98))


def train(prepared, folder, training=TRAINING, config=CONFIG):
    seed_everything(0)
    return fit(HSTU(config), prepared, training, seed=0, folder=folder)


def test_a_batch_holds_the_inputs_times_and_those_of_the_last_targets(ring):
    dataset = HistoryBatches(ring.histories, ring.split.train_end_U, 8, next_item_targets, with_times=True)
    batch = dataset[0, 0, np.arange(40)]
    for user in range(40):
        end, start = ring.split.train_end_U[user], ring.histories.offsets_U1[user]
        times = ring.histories.times_E[start : start + end][-9:]
        length = int((batch["items"][user] != 0).sum())
        assert batch["times"][user, :length].tolist() == times[:-1].tolist()
        assert batch["requests"][user] == times[-1]
    halves = list(InParts(training_loader(dataset, 40, seed=0), 2))
    whole = next(iter(training_loader(dataset, 40, seed=0)))
    assert torch.equal(halves[1]["requests"], whole["requests"][1::2])


def test_models_that_read_no_times_get_none(ring, tmp_path, monkeypatch):
    for model in (SASRec(SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16)), HSTU(CONFIG)):
        seen = []
        monkeypatch.setattr(
            model, "forward", lambda *given, f=model.forward, seen=seen: seen.append(given) or f(*given)
        )
        fit(model, ring, TRAINING, seed=0, folder=tmp_path / type(model).__name__)
        assert {len(given) for given in seen} == ({3} if isinstance(model, HSTU) else {1})
        assert all(each is not None for given in seen for each in given)


@every_block
def test_a_target_is_ranked_at_the_time_it_was_consumed(ring, block):
    seed_everything(0)
    model = HSTU(replace(CONFIG, block=block)).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.buckets.mul_(100)
    ranks, user = evaluate(model, ring, "test"), 7
    start, end = ring.histories.offsets_U1[user], ring.split.test_target_U[user]
    items, times = (
        x[start : start + end + 1].astype(np.int64) for x in (ring.histories.items_E, ring.histories.times_E)
    )

    def higher(request) -> int:
        vectors = model.encode(*(torch.from_numpy(x) for x in (items[None, :-1], times[None, :-1], request)))
        scores = model.scores(vectors, model.item_vectors())[0, 1:]
        return int((scores > scores[items[-1] - 1]).sum())

    assert ranks.kept.higher_U[user] == higher(times[-1:])
    early = replace(ring, histories=replace(ring.histories, times_E=np.zeros_like(ring.histories.times_E)))
    assert (evaluate(model, early, "test").kept.higher_U != ranks.kept.higher_U).any()


@every_block
def test_the_ring_is_learnt_with_its_times(ring, tmp_path, block):
    training, config = replace(TRAINING, learning_rate=1e-2, max_epochs=12, patience=12), replace(CONFIG, block=block)
    everything = replace(ring, split=replace(ring.split, train_end_U=ring.split.test_target_U - 1))
    fitted = train(everything, tmp_path, training, config)
    assert mean_metrics(evaluate(fitted.model, ring, "test").kept, ks=(1,))["recall@1"] > 0.7
    assert HSTU.from_pretrained(tmp_path / "model").config == config


def test_two_processes_train_what_one_trains(ring, tmp_path):
    """Five steps on shared negatives, so that both see the same ones; the ranking is shared, too."""
    training = replace(TRAINING, loss="sampled_softmax", num_negatives=16)
    one = train(ring, tmp_path / "one", training)
    two = fit_in_processes("HSTU", CONFIG, training, ring, seed=0, folder=tmp_path / "two", device="cpu", devices=2)
    assert two.tokens == one.tokens
    for key in ("train_loss", "ndcg@10"):
        assert two.curve[0][key] == pytest.approx(one.curve[0][key], abs=1e-6)
    start = {name: value.clone() for name, value in _fresh().items()}
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5)
    assert (first["blocks.0.buckets"] - start["blocks.0.buckets"]).abs().max() > 1e-3  # five steps of 1e-3


def _fresh() -> dict[str, torch.Tensor]:
    seed_everything(0)
    return HSTU(CONFIG).state_dict()


def test_a_killed_run_equals_the_uninterrupted_one(ring, tmp_path, monkeypatch):
    training, config = replace(TRAINING, max_epochs=3), replace(CONFIG, dropout=0.2)
    whole = train(ring, tmp_path / "whole", training, config)
    saves, real_save = [], strategies.AtomicCheckpoints.save_checkpoint

    def killed_at_the_second(self, checkpoint, path, storage_options=None):
        if saves:
            raise KeyboardInterrupt
        saves.append(path)
        real_save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(strategies.AtomicCheckpoints, "save_checkpoint", killed_at_the_second)
    with pytest.raises(BaseException):  # noqa: B017
        train(ring, tmp_path / "killed", training, config)
    monkeypatch.undo()
    resumed = train(ring, tmp_path / "killed", training, config)
    for key in ("train_loss", "ndcg@10"):
        assert [entry[key] for entry in resumed.curve] == [entry[key] for entry in whole.curve]
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
