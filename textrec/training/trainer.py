"""Fit a sequence model with Lightning, evaluate it by full ranking; the validation part alone decides when to stop."""

import logging
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

from textrec.data.prepared import PreparedSet
from textrec.evaluation.metrics import per_user_metrics
from textrec.evaluation.ranking import Ranks, VectorScorer, rank_targets
from textrec.seeding import generator
from textrec.training.batches import HistoryBatches, MaskedItems, next_item_targets, training_loader
from textrec.training.checkpoints import check_identity
from textrec.training.module import SequenceModule, TrainingConfig
from textrec.training.strategies import trainer_for

LOGGER = logging.getLogger(__name__)


@torch.no_grad()
def evaluate(
    model, prepared: PreparedSet, which: str, users: np.ndarray | None = None, block_users: int = 256
) -> Ranks:
    """Rank the `validation` or `test` target of `users` (all that have one by default) over the whole catalogue.

    A model that reads times is told when the target was consumed: "request time known", the published protocol of HSTU.
    """
    histories = prepared.histories
    with_target, positions = prepared.split.targets(which)
    if users is not None:
        chosen = np.isin(with_target, users)
        with_target, positions = with_target[chosen], positions[chosen]
    by_length = np.argsort(positions, kind="stable")  # neighbours of equal length waste no padding
    users_U, ends_U = with_target[by_length], positions[by_length]
    was_training, device = model.training, next(model.parameters()).device
    model.eval()

    def user_vectors(rows: slice) -> torch.Tensor:
        items_BL, times_BL, _ = histories.windows(users_U[rows], ends_U[rows], model.config.max_sequence_length)
        given = [items_BL]
        if model.reads_times:
            given += [times_BL, histories.times_E[histories.offsets_U1[users_U[rows]] + ends_U[rows]]]
        return model.encode(*(torch.from_numpy(each).to(device) for each in given)).float()

    items_ID = model.item_vectors()[1:].float()
    by = VectorScorer if model.similarity is None else model.similarity.scorer
    ranks = rank_targets(
        by(user_vectors, items_ID), users_U, histories.at(users_U, ends_U),
        lambda rows: histories.prefixes(users_U[rows], ends_U[rows]),
        num_items=prepared.num_items, block_users=block_users,
    )  # fmt: skip
    model.train(was_training)
    return ranks.subset(np.argsort(by_length, kind="stable"))


class RankingMonitor(Callback):
    """After an epoch: full-ranking validation, the best model to disk, a checkpoint, and the decision to stop.

    `curve` holds {"epoch", "train_loss", "ndcg@10", "seconds"} per epoch and travels in the checkpoint, as do the best
    value, the epochs since, and the positions read and processor seconds spent by all processes; a run killed anywhere
    replays at most one epoch, with the same numbers. Every user is ranked by one process.
    """

    def __init__(
        self, prepared: PreparedSet, training: TrainingConfig, seed: int, folder: Path, identity: dict[str, Any]
    ):
        self.prepared, self.training, self.folder, self.identity = prepared, training, folder, identity
        users, _ = prepared.split.targets("validation")
        if training.validation_users is not None and training.validation_users < len(users):
            users = np.sort(generator(seed, "validation users").choice(users, training.validation_users, replace=False))
        self.users = users
        self.curve: list[dict[str, float]] = []
        self.best, self.since_best, self.tokens, self.cpu_s = -1.0, 0, 0, 0.0
        self.started, self.cpu_started, self.earlier_cpu_s = 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "best": self.best, "since_best": self.since_best, "tokens": self.tokens,
                "cpu_s": self.cpu_s, "identity": self.identity}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state.pop("identity"), self.identity, self.folder / "last.ckpt")
        vars(self).update(state)
        self.earlier_cpu_s = self.cpu_s

    def on_train_start(self, trainer, module) -> None:
        trainer.should_stop = self.since_best >= self.training.patience  # resumed behind its own end

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        module.start_counting()

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch = trainer.current_epoch
        loss, num_targets = sum_over_processes(trainer, *module.sums.tolist())
        entry = {"epoch": epoch, "train_loss": loss / num_targets}
        last_epoch = epoch + 1 >= self.training.max_epochs
        validates = len(self.users) and ((epoch + 1) % self.training.validate_every == 0 or last_epoch)
        improved = not len(self.users) and last_epoch  # nothing to select by: the last epoch's model
        if validates or improved:
            with module.whole_model() as model:
                if validates:
                    entry["ndcg@10"] = self._validate(trainer, model)
                    improved = entry["ndcg@10"] > self.best
                    self.best, self.since_best = (entry["ndcg@10"], 0) if improved else (self.best, self.since_best + 1)
                if improved and trainer.is_global_zero:
                    model.save_pretrained(self.folder / "model")
        entry["seconds"] = time.perf_counter() - self.started
        tokens, cpu_s = sum_over_processes(trainer, module.tokens, time.process_time() - self.cpu_started)
        self.tokens, self.cpu_s = self.tokens + int(tokens), self.cpu_s + cpu_s
        self.curve.append(entry)
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in entry.items() if name != "epoch"}, step=epoch)
        if trainer.is_global_zero:
            LOGGER.info("%s: %s", self.folder.name, ", ".join(f"{k} {v:.4g}" for k, v in entry.items()))
        if self.since_best >= self.training.patience:
            trainer.should_stop = True

    def on_train_end(self, trainer, module) -> None:
        trainer.strategy.barrier()

    def _validate(self, trainer, model) -> float:
        ranks = evaluate(model, self.prepared, "validation", self.users[trainer.global_rank :: trainer.world_size])
        gains_U = per_user_metrics(ranks.filtered, ks=(10,))["ndcg@10"]
        total, num_users = sum_over_processes(trainer, float(gains_U.sum()), len(gains_U))
        return total / num_users


def sum_over_processes(trainer, *values: float) -> list[float]:
    if trainer.world_size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


class SaveLast(Callback):
    """Write last.ckpt after the monitor has closed its epoch (Lightning calls checkpoint callbacks last)."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_epoch_end(self, trainer, module) -> None:
        trainer.save_checkpoint(self.path)


@dataclass(frozen=True)
class Fit:
    """A finished training: the model of the best validation epoch, the curve, and what all processes read and spent."""

    model: Any
    curve: list[dict[str, float]]
    tokens: int  # real positions
    cpu_s: float  # processor seconds of all epochs, those before a resumption included
    here_cpu_s: float = 0.0  # the part of them that this very process spent
    peaks: dict[str, float] | None = None  # of several processes: `cost.peak_memory` of the first


def fit(
    model, prepared: PreparedSet, training: TrainingConfig, *, seed: int, folder: Path, device: str = "cpu",
    progress: bool = False, devices: int = 1, num_nodes: int = 1,
) -> Fit:  # fmt: skip
    """Train `model`, resuming from `folder/last.ckpt` where it exists; the caller has seeded and built the model.

    Raises `InputError` where the checkpoint belongs to other data, another model or other settings.
    """
    folder = Path(folder)
    identity = {"fingerprint": prepared.fingerprint, "model": asdict(model.config), "training": asdict(training)}
    identity["seed"] = seed
    monitor = RankingMonitor(prepared, training, seed, folder, identity)
    module = SequenceModule(model, training, seed, _training_counts(prepared))
    if training.compile:
        module.model.compile(dynamic=True)
    last = folder / "last.ckpt"
    with quiet_lightning():
        trainer = trainer_for(
            training, device, devices, [monitor, SaveLast(last)], folder, num_nodes=num_nodes,
            enable_progress_bar=progress, logger=loggers_of(folder), log_every_n_steps=1,
        )  # fmt: skip
        rank, world_size = trainer.global_rank, trainer.world_size
        batches = _batches(model, prepared, training, seed, rank)
        loader = training_loader(batches, training.batch_size, seed, rank, world_size, training.accumulate)
        resumes = last.is_file() or (last / "latest").is_file()  # a folder without it was killed in its first save
        trainer.fit(module, loader, ckpt_path=str(last) if resumes else None, weights_only=True)
    best = type(model).from_pretrained(folder / "model").to(module.device if device == "cuda" else "cpu")
    return Fit(best, monitor.curve, monitor.tokens, monitor.cpu_s, monitor.cpu_s - monitor.earlier_cpu_s)


def _training_counts(prepared: PreparedSet) -> np.ndarray:
    """Return how often each item id (0..num_items) occurs in the training part."""
    users = np.arange(prepared.histories.num_users)
    items, _ = prepared.histories.prefixes(users, prepared.split.train_end_U)
    return np.bincount(items, minlength=prepared.num_items + 1)


def _batches(model, prepared: PreparedSet, training: TrainingConfig, seed: int, rank: int) -> HistoryBatches:
    """Next-item training shifts a window one longer than the model reads; masking needs no shift."""
    make, window = next_item_targets, model.config.max_sequence_length
    if training.objective == "masked_item":
        probabilities = training.mask_probability, training.mask_last_probability
        make, window = MaskedItems(prepared.num_items, *probabilities, seed, rank), window - 1
    return HistoryBatches(prepared.histories, prepared.split.train_end_U, window, make, model.reads_times)


def loggers_of(folder: Path) -> list:
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    return [each(folder, name="", version="logs") for each in (CSVLogger, TensorBoardLogger)]


@contextmanager
def quiet_lightning():
    """Silence what Lightning says of every small run; its warnings about results still pass."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in ("does not have many workers", "Experiment logs directory", "isinstance.treespec",
                        "`torch.distributed.* is deprecated"):  # fmt: skip
            warnings.filterwarnings("ignore", f".*{message}.*")
        yield
    logger.setLevel(level)
