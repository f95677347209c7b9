"""Two-stage finetuning (RecFormer, section 2.5, Algorithm 1): train against a table of item vectors that is not learnt.

Stage 1 encodes all items with the current model at the start of every epoch; the best validation value keeps the model
and the very table it was trained against, M' and I'. Stage 2 goes on from M' with I' frozen and has to
beat that value.
"""

import copy
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from textrec.data.examples import FinetuningExamples
from textrec.data.files import replacing
from textrec.evaluation.metrics import per_user_metrics
from textrec.models.adapters import AdapterConfig, adapter_layers, merged, save_adapters, trained_state, with_adapters
from textrec.schema import InputError
from textrec.seeding import derive_seed, generator
from textrec.training import losses
from textrec.training.batches import GlobalBatches
from textrec.training.checkpoints import check_identity
from textrec.training.optimizers import adamw_with_linear_decay
from textrec.training.pretraining import save_tokenizer
from textrec.training.strategies import PRECISIONS, STRATEGIES, DistributedModule, trainer_for
from textrec.training.text_batches import ExampleBatches
from textrec.training.text_ranking import PACKED, TextSet, item_table, text_ranks, weights_digest
from textrec.training.trainer import LOGGER, SaveLast, loggers_of, quiet_lightning, sum_over_processes

# The published code's habits, where the defaults correct them. Two are not copied: micro-batches that an epoch leaves
# over go into the next one's first step, and behind the warm-up the rate jumps from .99 of its peak to .90.
FAITHFUL = {
    "optimistic_ties": True, "batch_means": True, "empty_histories": True, "shared_schedule": True,
    "evaluate_every": 3, "gradient_clip": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TwoStageConfig:
    """How a pretrained encoder is finetuned; the batch is global, so the number of processes changes nothing."""

    stages: tuple[int, ...] = (1, 2)  # (2,): "no two-stage", against the items of the pretrained model
    max_epochs: int = 128  # of either stage
    patience: tuple[int, int] = (5, 3)  # validations without a better ndcg@10 that end stage 1 and stage 2
    evaluate_every: int = 1  # epochs
    batch_size: int = 128  # users per optimizer step, over all processes
    accumulate: int = 1  # parts in which each process computes the gradient of its share of the batch
    learning_rate: float = 5e-5
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    gradient_clip: float | None = 1.0  # global norm
    shared_schedule: bool = False  # one optimizer and one decay over both stages: the rate of stage 2 may be zero
    num_negatives: int = 0  # uniform ones, with the logQ correction; 0: the softmax over all items
    adapters: AdapterConfig | None = None  # also given as a mapping; they and their `train_also` alone are trained
    freeze: tuple[str, ...] = ()  # parts that are not trained, e.g. word_table, blocks.*.attention
    train_items: bool = False  # the table is a parameter that begins as the pretrained model's: table 4, (3) and (4)
    switched_off: tuple[str, ...] = ()  # tables set to zero and kept there, e.g. item_position_table, type_table
    train_share: float = 1.0  # of the users with training interactions; a smaller share is part of a larger one
    empty_histories: bool = False  # the first item of a history may be the target, too
    optimistic_ties: bool = False  # validation by the best rank of tied items; else by the expected one
    batch_means: bool = False  # validation by the mean of the means of batches
    validation_users: int | None = None  # a seeded sample for the validation curve; None: all
    precision: str = "auto"  # see `TrainingConfig`
    strategy: str = "auto"

    def __post_init__(self):
        if isinstance(self.adapters, Mapping):
            object.__setattr__(self, "adapters", AdapterConfig(**self.adapters))
        allowed = {"precision": PRECISIONS, "strategy": STRATEGIES, "stages": ((1, 2), (1,), (2,))}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {values}")
        for name in ("max_epochs", "evaluate_every", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0 < self.train_share <= 1:
            raise ValueError(f"train_share={self.train_share}: expected more than 0 and at most 1")
        for name in ("shared_schedule", "train_items"):
            if getattr(self, name) and self.strategy not in ("auto", "ddp"):
                raise ValueError(f"{name}=True with strategy={self.strategy!r}: expected 'auto' or 'ddp'")
        if self.train_items and self.stages != (2,):
            raise ValueError(f"train_items=True with stages={self.stages}: expected (2,), stage 1 encodes its table")


@dataclass
class Stage:
    """Where one stage stands: the decisions of Algorithm 1 without what they decide about."""

    number: int  # 1 or 2
    patience: int
    max_epochs: int
    evaluate_every: int = 1
    best: float = -1.0  # carried over from stage 1
    since_best: int = 0
    best_epoch: int | None = None  # of this stage; None: what stage 2 began with is still the best

    @property
    def encodes_items(self) -> bool:
        return self.number == 1

    @property
    def is_over(self) -> bool:
        return self.since_best >= self.patience

    def evaluates(self, epoch: int) -> bool:
        """Tell whether validation follows this epoch (from 0); it always follows the last one."""
        return (epoch + 1) % self.evaluate_every == 0 or epoch + 1 >= self.max_epochs

    def observe(self, epoch: int, value: float) -> bool:
        """Take a validation value; return whether the model and its table are to be saved."""
        if value > self.best:
            self.best, self.since_best, self.best_epoch = value, 0, epoch
            return True
        self.since_best += 1
        return False


class TwoStageModule(DistributedModule):
    """Softmax over cosines with the item table `items_ID`: unit vectors, row 0 padding, fixed or from `trained_ID`."""

    items_ID: Tensor

    def __init__(
        self, model: nn.Module, training: TwoStageConfig, seed: int, stage: int, total_steps: int,
        carried: tuple[int, dict | None], trained_ID: Tensor | None = None,
    ):  # fmt: skip
        super().__init__()
        self.trained_ID = None if trained_ID is None else nn.Parameter(trained_ID.clone())
        self.model, self.training_config, self.seed, self.stage = model.train(), training, seed, stage
        self.total_steps, self.carried = total_steps, carried  # steps and optimizer state of an earlier stage
        self.start_counting()

    def table(self) -> Tensor:
        """Return the unit vectors (I, D) of the items; row 0, padding, is zero."""
        return self.items_ID if self.trained_ID is None else F.normalize(self.trained_ID, dim=-1, eps=1e-8)

    def start_counting(self) -> None:
        """Set the sums of an epoch to zero: losses, targets, real tokens."""
        self.sums: Tensor | float = 0.0

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the loss whose gradient, averaged over processes, is that of the mean over the users of a step."""
        where = self.stage, self.current_epoch, batch["step"]
        torch.manual_seed(derive_seed(self.seed, "dropout", *where, self.global_rank, batch["part"]))
        history, targets_B = batch["history"], batch["targets_B"]
        vectors_BD = self.model.encode(*(history[name] for name in PACKED)).float()
        users_BD = F.normalize(vectors_BD, dim=-1, eps=1e-8) / self.model.config.temperature
        with torch.autocast(users_BD.device.type, enabled=False):  # losses are fp32 under mixed precision, too
            total = self._loss(users_BD, targets_B, where)
        counts = total.detach(), len(targets_B), len(history["token_ids_T"])
        self.sums = self.sums + torch.stack([torch.as_tensor(x, device=total.device).double() for x in counts])
        return self.mean_over_step(total, batch["rows_in_step"])

    def _loss(self, users_BD: Tensor, targets_B: Tensor, where: tuple[int, int, int]) -> Tensor:
        items_ID, num_negatives = self.table(), self.training_config.num_negatives
        if not num_negatives:
            return losses.full_softmax(users_BD, items_ID, targets_B)
        num_items = len(items_ID) - 1
        source = torch.Generator(users_BD.device).manual_seed(derive_seed(self.seed, "negatives", *where))
        negatives = torch.randint(1, num_items + 1, (num_negatives,), generator=source, device=users_BD.device)
        expected = losses.uniform_log_probability(num_items, num_negatives, users_BD.device)
        return losses.sampled_softmax(users_BD, items_ID, targets_B, negatives, expected)

    def configure_optimizers(self):
        """AdamW, warm-up and a linear decay to zero at the end of the stage, or of both."""
        return adamw_with_linear_decay(self, self.training_config, self.total_steps, *self.carried)


class StageMonitor(Callback):
    """Drive one stage: encode the items, validate with the table that was trained against, save M' and I' together.

    `curve` holds {"stage", "epoch", "train_loss", "ndcg@10" where validated, "seconds"}; it travels in the checkpoint.
    """

    def __init__(
        self, stage: Stage, texts: TextSet, training: TwoStageConfig, seed: int, folder: Path, identity: dict,
        items_ID: Tensor | None,
    ):  # fmt: skip
        self.stage, self.texts, self.training, self.folder, self.identity = stage, texts, training, folder, identity
        self.items_ID = items_ID
        users, _ = texts.prepared.split.targets("validation")
        if training.validation_users is not None and training.validation_users < len(users):
            users = np.sort(generator(seed, "validation users").choice(users, training.validation_users, replace=False))
        self.users = users
        self.curve: list[dict[str, float]] = []
        self.tokens, self.cpu_s = 0, 0.0
        self.started, self.cpu_started, self.earlier_cpu_s = 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "stage": asdict(self.stage), "tokens": self.tokens, "cpu_s": self.cpu_s,
                "identity": self.identity}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state["identity"], self.identity, self.folder / "last.ckpt")
        self.stage = Stage(**state["stage"])
        self.curve, self.tokens, self.cpu_s = state["curve"], state["tokens"], state["cpu_s"]
        self.earlier_cpu_s = self.cpu_s

    def on_train_start(self, trainer, module) -> None:
        trainer.should_stop = self.stage.is_over  # resumed behind its own end

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        module.start_counting()
        if self.stage.encodes_items:
            with module.whole_model() as model:
                self.items_ID = encode_items(model, self.texts, trainer)
        module.items_ID = self.items_ID = self.items_ID.to(trainer.strategy.root_device)

    def on_train_epoch_end(self, trainer, module) -> None:
        epoch = trainer.current_epoch
        module.items_ID = self.items_ID = module.table().detach()
        loss, num_targets, tokens = sum_over_processes(trainer, *module.sums.tolist())
        entry = {"stage": self.stage.number, "epoch": epoch, "train_loss": loss / num_targets}
        if self.stage.evaluates(epoch):
            with module.whole_model() as model:
                if len(self.users):
                    entry["ndcg@10"] = validate(model, self.texts, module.items_ID, self.training, self.users, trainer)
                value = entry.get("ndcg@10", self.stage.best + 1.0)  # nobody to validate with: later is better
                if self.stage.observe(epoch, value) and trainer.is_global_zero:
                    save_pair(self.folder / "best.safetensors", model, module.items_ID)
        entry["seconds"] = time.perf_counter() - self.started
        self.tokens += int(tokens)
        self.cpu_s += sum_over_processes(trainer, time.process_time() - self.cpu_started)[0]
        self.curve.append(entry)
        for logger in trainer.loggers:
            logger.log_metrics({k: v for k, v in entry.items() if k not in ("stage", "epoch")}, step=epoch)
        if trainer.is_global_zero:
            LOGGER.info("%s: %s", self.folder.name, ", ".join(f"{k} {v:.4g}" for k, v in entry.items()))
        trainer.should_stop = self.stage.is_over

    def on_train_end(self, trainer, module) -> None:
        trainer.strategy.barrier()


def encode_items(model: nn.Module, texts: TextSet, trainer) -> Tensor:
    """Return I, encoded by all processes together."""
    return item_table(model, texts, rank=trainer.global_rank, world_size=trainer.world_size)


def validate(model, texts: TextSet, items_ID: Tensor, training: TwoStageConfig, users: np.ndarray, trainer) -> float:
    """Return ndcg@10 over all items, those of the history included, as the published protocol has it."""
    shared = not training.batch_means
    mine = users[trainer.global_rank :: trainer.world_size] if shared else users
    ranks = text_ranks(model, texts, "validation", items_ID=items_ID, users=mine)
    ties = "optimistic" if training.optimistic_ties else "expected"
    gains_U = per_user_metrics(ranks.kept, ks=(10,), ties=ties)["ndcg@10"]
    if shared:
        total, num_users = sum_over_processes(trainer, float(gains_U.sum()), len(gains_U))
        return total / num_users
    size = max(training.batch_size // training.accumulate, 1)
    return float(np.mean([gains_U[start : start + size].mean() for start in range(0, len(gains_U), size)]))


def save_pair(path: Path, model: nn.Module, items_ID: Tensor) -> None:
    """Write M' and I' into one file that appears whole or not at all: neither is of use with another's partner.

    Adapters are written merged, as the M' that others load, and as they are, for stage 2 to go on from.
    """
    from safetensors.torch import save_file

    parts = {"model": merged(model).state_dict(), "adapters": trained_state(model) if adapter_layers(model) else {}}
    pair = {f"{part}.{name}": weight.detach().cpu().clone() for part in parts for name, weight in parts[part].items()}
    with replacing(path) as partial:
        save_file(pair | {"items_ID": items_ID.cpu().contiguous()}, partial)


def load_pair(path: Path, model: nn.Module) -> Tensor:
    """Fill `model` with M', or with its adapters where it has any, and return I'."""
    from safetensors.torch import load_file

    pair = load_file(path)
    items_ID = pair.pop("items_ID")
    part = "adapters." if adapter_layers(model) else "model."
    weights = {name.removeprefix(part): weight for name, weight in pair.items() if name.startswith(part)}
    model.load_state_dict(weights, strict=part == "model.")
    return items_ID


@dataclass
class Finetuned:
    """A finished finetuning: M', I' and how they came about; `text_ranks(model, texts, "test", items_ID=...)` tests."""

    model: nn.Module
    items_ID: Tensor
    best: float  # ndcg@10 of validation
    pair: Path | None = None  # the file of M' and I'
    curve: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0  # real ones that gradients were computed of
    cpu_s: float = 0.0
    here_cpu_s: float = 0.0  # the part of them that this very process spent


def two_stage(
    model: nn.Module, texts: TextSet, training: TwoStageConfig, *, seed: int, folder: Path, device: str = "cpu",
    devices: int = 1, num_nodes: int = 1, progress: bool = False,
) -> Finetuned:  # fmt: skip
    """Finetune a copy of `model` (a `RecFormer`), resuming from the last epoch that `folder` holds.

    The model found is in `folder/model`, beside its tokenizer and its adapters, if any, which are merged into it; its
    table is in the `best.safetensors` of its stage. Raises `InputError` where a checkpoint belongs to another run, or
    where there is nothing to train on.
    """
    folder, model = Path(folder), copy.deepcopy(model).cpu()
    for table in _parts(model, training.switched_off):
        table.weight.data.zero_()
    identity = texts.identity | {
        "model": asdict(model.config), "training": asdict(training), "start": weights_digest(model), "seed": seed
    }  # fmt: skip
    examples = FinetuningExamples(
        item_tokens=texts.tokens, histories=texts.prepared.histories, ends_U=training_ends(texts, training, seed),
        special=texts.special, seed=seed, max_items=model.config.max_items, max_tokens=model.config.max_tokens,
        faithful=training.empty_histories,
    )  # fmt: skip
    result, carried = Finetuned(copy.deepcopy(model), torch.empty(0), best=-1.0), (0, None)
    for number in training.stages:
        torch.manual_seed(derive_seed(seed, "adapters"))
        current, place = trainable(model, training), folder / f"stage{number}"
        items_ID = load_pair(result.pair, current) if result.pair else None
        if number == 2 and not result.pair:
            whole = result.model.to(_own_device(device))
            items_ID = item_table(whole, texts)
        stage = Stage(number, training.patience[number - 1], training.max_epochs, training.evaluate_every, result.best)
        monitor = StageMonitor(stage, texts, training, seed, place, identity | {"stage": number}, items_ID)
        of_stage = replace(examples, seed=derive_seed(seed, "stage", number))
        _run_stage(current, of_stage, training, monitor, carried, (device, devices, num_nodes), progress)
        if monitor.stage.best_epoch is not None:
            result.pair = place / "best.safetensors"
        if training.shared_schedule:
            last = torch.load(place / "last.ckpt", map_location="cpu", weights_only=True)
            carried = last["global_step"], last["optimizer_states"][0]
        result.best, result.curve = monitor.stage.best, result.curve + monitor.curve
        result.tokens, result.cpu_s = result.tokens + monitor.tokens, result.cpu_s + monitor.cpu_s
        result.here_cpu_s += monitor.cpu_s - monitor.earlier_cpu_s
    items_ID = load_pair(result.pair, result.model.cpu())
    result.model.eval().save_pretrained(folder / "model")
    save_tokenizer(texts.tokenizer, folder / "model")
    if training.adapters:
        load_pair(result.pair, adapted := trainable(model, training))
        save_adapters(adapted, folder / "model" / "adapters.safetensors")
    result.model, result.items_ID = (each.to(_own_device(device)) for each in (result.model, items_ID))
    return result


def trainable(model: nn.Module, training: TwoStageConfig) -> nn.Module:
    """Return a copy with its adapters, if any, and without gradients for what is frozen or switched off."""
    model = with_adapters(model, training.adapters) if training.adapters else copy.deepcopy(model)
    for part in _parts(model, training.freeze + training.switched_off):
        part.requires_grad_(False)
    return model


def _parts(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    found = {name: [part for path, part in model.named_modules() if fnmatchcase(path, name)] for name in names}
    for name in (name for name, parts in found.items() if not parts):
        raise InputError(f"freeze or switched_off names {name!r}, which {type(model).__name__} does not have")
    return [part for parts in found.values() for part in parts]


def _own_device(device: str) -> torch.device:
    return torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)


def training_ends(texts: TextSet, training: TwoStageConfig, seed: int) -> np.ndarray:
    """Return where each user's training part ends; 0 for those outside the share that is trained on."""
    ends_U = texts.prepared.split.train_end_U
    usable = np.flatnonzero(ends_U >= (1 if training.empty_histories else 2))
    order = generator(seed, "training share").permutation(usable)
    chosen = order[: max(round(training.train_share * len(usable)), 1)]
    return np.where(np.isin(np.arange(len(ends_U)), chosen), ends_U, 0)


def _run_stage(
    model, examples, training, monitor: StageMonitor, carried: tuple[int, dict | None], where: tuple[str, int, int],
    progress: bool,
) -> None:  # fmt: skip
    last, (device, devices, num_nodes) = monitor.folder / "last.ckpt", where
    with quiet_lightning():
        trainer = trainer_for(
            training, device, devices, [monitor, SaveLast(last)], monitor.folder, num_nodes=num_nodes,
            enable_progress_bar=progress, logger=loggers_of(monitor.folder), log_every_n_steps=1,
        )  # fmt: skip
        rank, world_size = trainer.global_rank, trainer.world_size
        batches = GlobalBatches(
            len(examples), training.batch_size, examples.seed, rank, world_size, training.accumulate
        )
        if not len(batches):
            raise InputError(f"{len(examples)} users have training histories: too few for {world_size} processes")
        total_steps = len(batches) * training.max_epochs
        trained_ID = monitor.items_ID if training.train_items else None
        module = TwoStageModule(model, training, examples.seed, monitor.stage.number, total_steps, carried, trained_ID)
        resumes = last.is_file() or (last / "latest").is_file()
        loader = ExampleBatches(examples, batches)
        trainer.fit(module, loader, ckpt_path=str(last) if resumes else None, weights_only=True)
