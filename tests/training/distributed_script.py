"""What the launched processes of the tests do; each function is named in a `launch.json`."""

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from textrec.data.prepared import PreparedSet
from textrec.evaluation.metrics import per_user_metrics
from textrec.models.hstu import HSTU, HSTUConfig
from textrec.models.llama import Llama, LlamaConfig
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.seeding import seed_everything
from textrec.training import strategies, text_launch, trainer
from textrec.training.launch import processes
from textrec.training.module import TrainingConfig

CONFIG = SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=15, dropout=0.0, attention_dropout=0.0)
TRAINING = TrainingConfig(
    batch_size=16,
    learning_rate=1e-3,
    weight_decay=0.1,
    gradient_clip=0.5,
    max_epochs=3,
    patience=9,
    warmup_steps=2,
    schedule="cosine",
)
MODELS = {
    "SASRec": (SASRec, CONFIG),
    "HSTU": (HSTU, HSTUConfig(num_items=30, max_sequence_length=8, embedding_dim=15, linear_dim=5, attention_dim=5,
                              num_heads=3, dropout=0.0)),
    "Llama": (Llama, LlamaConfig(num_items=30, max_sequence_length=8, embedding_dim=12, num_heads=2,
                                 num_key_value_heads=1, feed_forward_dim=9, dropout=0.0)),
}  # fmt: skip


def mean_of_means(self, total, count):
    """A mutant: every process divides by its own positions."""
    return total * (self.trainer.accumulate_grad_batches / max(count, 1))


def mean_over_processes(self, trainer_, model):
    """A mutant: the validation values of all processes weigh the same, however few users they stand for."""
    ranks = trainer.evaluate(
        model, self.prepared, "validation", self.users[trainer_.global_rank :: trainer_.world_size]
    )
    mean = float(per_user_metrics(ranks.filtered, ks=(10,))["ndcg@10"].mean())
    return trainer.sum_over_processes(trainer_, mean)[0] / trainer_.world_size


def filled_up(self, trainer_, model):
    """A mutant: users are repeated until all processes have equally many, as torch's DistributedSampler does."""
    users = self.users
    self.users = np.resize(users, -(-len(users) // trainer_.world_size) * trainer_.world_size)
    value = VALIDATE(self, trainer_, model)
    self.users = users
    return value


def cut_all(*args):
    """Have ZeRO 3 cut small parameters, all of a test, which it would leave whole in every process."""
    written = ZERO_CONFIG(*args)
    if written["zero_optimization"]["stage"] == 3:
        written["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return written


def text_here(target: str, **arguments):
    """Do what `text_launch` does in a process of its own, with every parameter cut."""
    with patch.object(strategies, "zero_config", cut_all):
        return getattr(text_launch, target)(**arguments)


ZERO_CONFIG = strategies.zero_config
VALIDATE = trainer.RankingMonitor._validate
MUTANTS = {
    "mean_of_means": (strategies.DistributedModule, "mean_over_step", mean_of_means),
    "mean_over_processes": (trainer.RankingMonitor, "_validate", mean_over_processes),
    "filled_up": (trainer.RankingMonitor, "_validate", filled_up),
}


def train_all(calls: list[dict]) -> list[dict]:
    """Do several trainings, of which each may have a `mutant`, in the processes that one launch starts."""
    told = []
    for call in calls:
        mutant = MUTANTS.get(call.pop("mutant", None))
        with patch.object(*mutant) if mutant else nullcontext():
            told.append(train(**call))
    return told


def train(
    prepared: str, folder: str, names: list[str], keep: int | None = None, frozen: bool = False, model: str = "SASRec",
    **settings,
):  # fmt: skip
    """Fit with one strategy after the other, `keep` a second checkpoint of that epoch; return the curves."""
    save_last, (cls, config) = trainer.SaveLast.on_train_epoch_end, MODELS[model]

    def keep_one(self, of, module):
        save_last(self, of, module)
        if of.current_epoch == keep:
            of.save_checkpoint(self.path.with_name("kept.ckpt"))

    strategies.zero_config, trainer.SaveLast.on_train_epoch_end = cut_all, keep_one
    _, devices, num_nodes = processes()
    curves = {}
    for name in names:
        seed_everything(0)
        network = cls(config)
        network.item_table.weight.requires_grad_(not frozen)
        fitted = trainer.fit(
            network, PreparedSet.load(Path(prepared)), replace(TRAINING, strategy=name, **settings), seed=0,
            folder=Path(folder) / name, devices=devices, num_nodes=num_nodes,
        )  # fmt: skip
        curves[name] = fitted.curve
    strategies.zero_config, trainer.SaveLast.on_train_epoch_end = ZERO_CONFIG, save_last
    return {"curves": curves, "tokens": fitted.tokens, "world_size": devices * num_nodes, "cpu_s": fitted.cpu_s}


def fail(message: str):
    """Process 1 makes a mistake while process 0 waits for it."""
    rank, _, _ = processes()
    if rank == 1:
        raise ValueError(message)
    time.sleep(600)


def wait(folder: str):
    """Say who this is, then wait to be ended."""
    rank, _, _ = processes()
    (Path(folder) / f"pid{rank}").write_text(str(os.getpid()))
    time.sleep(600)
