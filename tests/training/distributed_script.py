"""What the launched processes of the tests do; each function is named in a `launch.json`."""

import os
import time
from dataclasses import replace
from pathlib import Path

from textrec.data.prepared import PreparedSet
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.seeding import seed_everything
from textrec.training import strategies, trainer
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


def train(prepared: str, folder: str, names: list[str], keep: int | None = None, frozen: bool = False, **settings):
    """Fit with one strategy after the other, `keep` a second checkpoint of that epoch; return the curves."""
    plain_config, save_last = strategies.zero_config, trainer.SaveLast.on_train_epoch_end

    def cut_all(*args):
        config = plain_config(*args)
        if config["zero_optimization"]["stage"] == 3:  # or small parameters, all of a test, stay whole everywhere
            config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return config

    def keep_one(self, of, module):
        save_last(self, of, module)
        if of.current_epoch == keep:
            of.save_checkpoint(self.path.with_name("kept.ckpt"))

    strategies.zero_config, trainer.SaveLast.on_train_epoch_end = cut_all, keep_one
    _, devices, num_nodes = processes()
    curves = {}
    for name in names:
        seed_everything(0)
        model = SASRec(CONFIG)
        model.item_table.weight.requires_grad_(not frozen)
        fitted = trainer.fit(
            model, PreparedSet.load(Path(prepared)), replace(TRAINING, strategy=name, **settings), seed=0,
            folder=Path(folder) / name, devices=devices, num_nodes=num_nodes,
        )  # fmt: skip
        curves[name] = fitted.curve
    strategies.zero_config, trainer.SaveLast.on_train_epoch_end = plain_config, save_last
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
