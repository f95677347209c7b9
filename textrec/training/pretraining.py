"""Pretrain a RecFormer (section 2.4): item-item contrast plus masked words, on the histories of several sets at once.

Lightning's epoch is a round of `checkpoint_every_steps` optimizer steps, so that a killed run replays at most one. What
a step reads depends on the seed and its number alone: reshuffled passes over all sequences, cut into contrast batches.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import default_convert

from textrec.data.choices import configured
from textrec.data.examples import PretrainingExamples
from textrec.evaluation.metrics import per_user_metrics
from textrec.models.adapters import AdapterConfig, merged, with_adapters
from textrec.models.recformer import RecFormerConfig, RecFormerForPretraining
from textrec.schema import InputError
from textrec.seeding import derive_seed, generator
from textrec.training.checkpoints import check_identity
from textrec.training.contrastive import SUMS, pretraining_sums
from textrec.training.optimizers import adamw_with_linear_decay
from textrec.training.strategies import PRECISIONS, STRATEGIES, DistributedModule, trainer_for
from textrec.training.text_batches import ContrastBatches, joined
from textrec.training.text_ranking import TextSet, evaluating, item_table, text_ranks, weights_digest
from textrec.training.trainer import LOGGER, SaveLast, loggers_of, quiet_lightning, sum_over_processes

FAITHFUL = {"mask_duplicates": False, "faithful_masking": True}  # the published code's habits
NEW_TABLES = ("type_table", "item_position_table")  # which no language model brings
YOUNGER = ("adapters", "one_set_batches")  # settings that checkpoints of before do not name
SELECTIONS = ("in_batch", "zero_shot", "last")
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # bf16, dense, of the SXM cards


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """How a RecFormer is pretrained; the batch is global, so the number of processes changes nothing but speed."""

    max_steps: int = 4000
    max_real_tokens: int | None = None  # ends at the first checkpoint after so many tokens; the schedule goes by steps
    batch_size: int = 64  # sequences per optimizer step, over all processes
    accumulate: int = 1  # contrast batches per step; other rows of the same one are the negatives
    learning_rate: float = 5e-5
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    gradient_clip: float | None = 1.0  # global norm
    mlm_weight: float = 0.1  # of the masked words of either view
    mask_share: float = 0.15
    one_set_batches: bool = False  # negatives of one's own set alone; else, as published, of all sets
    mask_duplicates: bool = True  # copies of one's own target are no negatives
    faithful_masking: bool = False  # see `mask_words`
    freeze_word_table: bool = True  # as the published script does
    adapters: AdapterConfig | None = None  # also given as a mapping; they and NEW_TABLES alone are trained
    interactions: str = "all"  # all (the published rule) | train: the training part alone
    validate_every_steps: int = 500
    checkpoint_every_steps: int | None = None  # by default with every validation
    validation_batch: int = 64  # candidates of the in-batch accuracy
    validation_sequences: int = 2048  # a seeded sample of the held-out set
    validation_users: int | None = None  # a seeded sample for the zero-shot curve; None: all
    select_by: str = "in_batch"  # which model is kept: the best by in-batch accuracy | zero_shot ndcg@10 | last
    precision: str = "auto"  # see `TrainingConfig`
    strategy: str = "auto"

    def __post_init__(self):
        if self.adapters is not None:
            given = AdapterConfig(**self.adapters) if isinstance(self.adapters, Mapping) else self.adapters
            train_also = tuple(dict.fromkeys((*given.train_also, *NEW_TABLES)))
            object.__setattr__(self, "adapters", replace(given, train_also=train_also))
        allowed = {"precision": PRECISIONS, "strategy": STRATEGIES, "select_by": SELECTIONS,
                   "interactions": ("all", "train")}  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {values}")
        for whole, part in (("batch_size", self.accumulate), ("max_steps", self.round_steps),
                            ("validate_every_steps", self.round_steps)):  # fmt: skip
            if part < 1 or getattr(self, whole) < 1 or getattr(self, whole) % part:
                unit = "accumulate" if whole == "batch_size" else "checkpoint_every_steps"
                raise ValueError(f"{whole}={getattr(self, whole)}: expected a multiple of {unit}={part}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "PretrainingConfig":
        """Build from a notebook's parameter `pretraining`; raises `InputError` for a misspelt name or a wrong value."""
        return configured(cls, settings, "setting of pretraining")

    @property
    def round_steps(self) -> int:
        return self.checkpoint_every_steps or self.validate_every_steps

    @property
    def max_epochs(self) -> int:
        """Lightning's word for rounds."""
        return self.max_steps // self.round_steps


class PretrainingModule(DistributedModule):
    """Contrast + `mlm_weight` (masked words of the history + masked words of the item), each a mean over its rows.

    The means are those of a contrast batch over all processes; an optimizer step averages its contrast batches.
    """

    def __init__(self, model: RecFormerForPretraining, training: PretrainingConfig, seed: int):
        super().__init__()
        self.model, self.training_config, self.seed = model.train(), training, seed
        if training.freeze_word_table:
            model.encoder.word_table.requires_grad_(False)
        if not training.mlm_weight:
            model.head.requires_grad_(False)
        self.start_counting()

    def start_counting(self) -> None:
        """Set the sums of a round to zero."""
        self.sums: Tensor | float = 0.0

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the loss whose gradient, averaged over processes, is that of the whole contrast batch."""
        training = self.training_config
        torch.manual_seed(derive_seed(self.seed, "dropout", batch["step"], self.global_rank))
        sums = pretraining_sums(
            self.model, batch, mask_duplicates=training.mask_duplicates, masked_words=bool(training.mlm_weight)
        )
        self.sums = self.sums + torch.stack([value.detach().double() for value in sums.values()])
        loss = self._mean(sums, "contrast", "rows")
        if training.mlm_weight:
            masked = self._mean(sums, "mlm_history", "masked_history") + self._mean(sums, "mlm_item", "masked_item")
            loss = loss + training.mlm_weight * masked
        return loss

    def _mean(self, sums: dict[str, Tensor], total: str, count: str) -> Tensor:
        return self.mean_over_step(sums[total], int(sums[count]) * self.training_config.accumulate)

    def configure_optimizers(self):
        """AdamW, warm-up and a linear decay to zero at `max_steps`."""
        return adamw_with_linear_decay(self, self.training_config, self.training_config.max_steps)


def training_flops(config: RecFormerConfig, tokens: int, masked: int, passes: int = 2) -> float:
    """Return the floating-point operations of forward and backward passes over both views, clean and masked (2 passes).

    Matrix products alone, two operations a multiplication, the backward pass twice the forward; the attention is that
    of a full window. The work of the start tokens' own attention is left out.
    """
    width = config.hidden_size
    layer = 2 * width * (4 * width + 2 * config.intermediate_size) + 4 * (config.attention_window + 2) * width
    return 3.0 * (passes * tokens * config.num_layers * layer + 2 * masked * width * (width + config.vocabulary_size))


class PretrainingMonitor(Callback):
    """After a round: validation where it is due, the best model to disk, an entry of the curve.

    `curve` holds {"step", "tokens", "seconds", "train_contrast", "train_mlm", "train_in_batch", "tokens_per_s"}, with a
    known peak "peak_share" (0 to 1), and at validations "in_batch", "validation_contrast", "validation_mlm" and, with a
    zero-shot set, "ndcg@10". Its first entry is the untrained model. It travels in the checkpoint.
    """

    def __init__(self, training, seed, folder, identity, held_out: list[dict], zero_shot: TextSet | None, peak_flops):
        self.training, self.folder, self.identity, self.peak_flops = training, folder, identity, peak_flops
        self.held_out, self.zero_shot = held_out, zero_shot
        if zero_shot is not None:
            users, _ = zero_shot.prepared.split.targets("validation")
            if training.validation_users is not None and training.validation_users < len(users):
                chosen = generator(seed, "validation users").choice(users, training.validation_users, replace=False)
                users = np.sort(chosen)
            self.users = users
        self.curve: list[dict[str, float]] = []
        self.best, self.tokens, self.cpu_s = -1.0, 0, 0.0
        self.started, self.cpu_started, self.earlier_cpu_s = 0.0, 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("curve", "best", "tokens", "cpu_s", "identity")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_identity(state.pop("identity"), self.identity, self.folder / "last.ckpt")
        vars(self).update(state)
        self.earlier_cpu_s = self.cpu_s

    def on_train_start(self, trainer, module) -> None:
        trainer.should_stop = self._is_spent()  # resumed behind its own end
        if not self.curve:
            self._close(trainer, module, {"step": 0, "tokens": 0, "seconds": 0.0})

    def _is_spent(self) -> bool:
        return self.training.max_real_tokens is not None and self.tokens >= self.training.max_real_tokens

    def on_train_epoch_start(self, trainer, module) -> None:
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        module.start_counting()

    def on_train_epoch_end(self, trainer, module) -> None:
        summed = dict(zip(SUMS, sum_over_processes(trainer, *module.sums.tolist()), strict=True))
        seconds = time.perf_counter() - self.started
        self.tokens += int(summed["tokens"])
        entry = {"step": trainer.global_step, "tokens": self.tokens, "seconds": seconds} | _means(summed, "train_")
        entry["train_in_batch"] = summed["correct"] / summed["rows"]
        entry["tokens_per_s"] = summed["tokens"] / seconds
        if self.peak_flops:
            masked = summed["masked_history"] + summed["masked_item"]
            passes = 1 + bool(self.training.mlm_weight)
            spent = training_flops(module.model.config, int(summed["tokens"]), int(masked), passes)
            entry["peak_share"] = spent / seconds / (self.peak_flops * trainer.world_size)
        self._close(trainer, module, entry)
        trainer.should_stop = self._is_spent()

    def on_train_end(self, trainer, module) -> None:
        trainer.strategy.barrier()

    def _close(self, trainer, module, entry: dict[str, float]) -> None:
        step = int(entry["step"])
        ends = step == self.training.max_steps or step > 0 and self._is_spent()
        validates = step % self.training.validate_every_steps == 0 or ends
        if validates:
            with module.whole_model() as model, evaluating(model):
                entry |= self._validate(trainer, model)
                value = {"in_batch": entry["in_batch"], "zero_shot": entry.get("ndcg@10", 0.0), "last": step}
                if step and value[self.training.select_by] > self.best:
                    self.best = value[self.training.select_by]
                    if trainer.is_global_zero:
                        merged(model).save_pretrained(self.folder / "model")
        if step:
            cpu_s = time.process_time() - self.cpu_started
            self.cpu_s += sum_over_processes(trainer, cpu_s)[0]
        self.curve.append(entry)
        for logger in trainer.loggers:
            logger.log_metrics({name: value for name, value in entry.items() if name != "step"}, step=step)
        if trainer.is_global_zero:
            LOGGER.info("%s: %s", self.folder.name, ", ".join(f"{k} {v:.4g}" for k, v in entry.items()))

    @torch.no_grad()
    def _validate(self, trainer, model: RecFormerForPretraining) -> dict[str, float]:
        rank, world_size, device = trainer.global_rank, trainer.world_size, trainer.strategy.root_device
        total = torch.zeros(len(SUMS), dtype=torch.float64)
        for batch in self.held_out[rank::world_size]:
            batch = trainer.strategy.batch_to_device(batch, device)
            sums = pretraining_sums(model, batch, gather=False, masked_words=bool(self.training.mlm_weight))
            total += torch.stack([value.double().cpu() for value in sums.values()])
        summed = dict(zip(SUMS, sum_over_processes(trainer, *total.tolist()), strict=True))
        found = {"in_batch": summed["correct"] / summed["rows"]} | _means(summed, "validation_")
        if self.zero_shot is not None:
            items_ID = item_table(model.encoder, self.zero_shot, rank=rank, world_size=world_size)
            ranks = text_ranks(
                model.encoder, self.zero_shot, "validation", items_ID=items_ID, users=self.users[rank::world_size]
            )
            gains_U = per_user_metrics(ranks.kept, ks=(10,))["ndcg@10"]
            gain, num_users = sum_over_processes(trainer, float(gains_U.sum()), len(gains_U))
            found["ndcg@10"] = gain / num_users
        return found


def _means(summed: dict[str, float], prefix: str) -> dict[str, float]:
    """Return the losses per row; the masked words' is the sum of both views' means, as in the training loss."""
    masked = (summed[f"mlm_{view}"] / max(summed[f"masked_{view}"], 1.0) for view in ("history", "item"))
    return {f"{prefix}contrast": summed["contrast"] / summed["rows"], f"{prefix}mlm": sum(masked)}


@dataclass(frozen=True)
class Pretrained:
    """A finished pretraining: the chosen model, the curve, and what all processes read and spent."""

    model: RecFormerForPretraining
    curve: list[dict[str, float]]
    tokens: int  # real tokens of both views
    cpu_s: float
    here_cpu_s: float = 0.0  # the part of them that this very process spent


def pretrain(
    model: RecFormerForPretraining, sets: Sequence[TextSet], training: PretrainingConfig, *, seed: int, folder: Path,
    held_out: TextSet, zero_shot: TextSet | None = None, device: str = "cpu", devices: int = 1, num_nodes: int = 1,
    peak_flops: float | None = None, progress: bool = False,
) -> Pretrained:  # fmt: skip
    """Pretrain `model` on the histories of `sets`, resuming from `folder/last.ckpt` where it exists.

    `held_out` gives the in-batch accuracy, `zero_shot` its validation targets; the chosen model and its tokenizer are
    in `folder/model`. `peak_flops` of one device turns speed into a share of it. Raises `InputError` where a set is
    tested on what it was trained on, or where the checkpoint belongs to another run.
    """
    folder = Path(folder)
    _refuse_leaks(sets, training, held_out, zero_shot)
    # earlier checkpoints do not know these, and go on where there are none
    told = {name: value for name, value in asdict(training).items() if name not in YOUNGER or value}
    identity = {
        "sets": [each.identity for each in sets], "held_out": held_out.identity,
        "zero_shot": zero_shot and zero_shot.identity, "model": asdict(model.config), "training": told,
        "start": weights_digest(model), "seed": seed,
    }  # fmt: skip
    peak_flops = peak_flops or _known_peak(device)
    monitor = PretrainingMonitor(
        training,
        seed,
        folder,
        identity,
        _held_out_batches(held_out, model.config, training, seed),
        zero_shot,
        peak_flops,
    )
    if training.adapters:
        torch.manual_seed(derive_seed(seed, "adapters"))
        model = with_adapters(model, training.adapters)
    module, last = PretrainingModule(model, training, seed), folder / "last.ckpt"
    with quiet_lightning():
        trainer = trainer_for(
            training, device, devices, [monitor, SaveLast(last)], folder, num_nodes=num_nodes,
            enable_progress_bar=progress, logger=loggers_of(folder), log_every_n_steps=1,
        )  # fmt: skip
        examples = _examples(sets, model.config, training, seed)
        first_users = np.cumsum([0] + [each.prepared.histories.num_users for each in sets[:-1]])
        batches = ContrastBatches(
            examples, training.batch_size // training.accumulate, training.round_steps * training.accumulate, seed,
            trainer.global_rank, trainer.world_size,
            first_users if training.one_set_batches else (0,),
        )  # fmt: skip
        resumes = last.is_file() or (last / "latest").is_file()
        trainer.fit(module, batches, ckpt_path=str(last) if resumes else None, weights_only=True)
        if trainer.is_global_zero:
            save_tokenizer(sets[0].tokenizer, folder / "model")
    best = RecFormerForPretraining.from_pretrained(folder / "model").to(module.device if device == "cuda" else "cpu")
    return Pretrained(best, monitor.curve, monitor.tokens, monitor.cpu_s, monitor.cpu_s - monitor.earlier_cpu_s)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write `tokenizer.json`, which `tokenizers.Tokenizer.from_file` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    getattr(tokenizer, "backend_tokenizer", tokenizer).save(str(folder / "tokenizer.json"))


def _refuse_leaks(sets, training: PretrainingConfig, held_out: TextSet, zero_shot: TextSet | None) -> None:
    read = {each.prepared.fingerprint: each.prepared.name for each in sets}
    if held_out.prepared.fingerprint in read:
        raise InputError(f"held_out is {held_out.prepared.name!r}, which is among the sets that are trained on")
    read[held_out.prepared.fingerprint] = held_out.prepared.name
    if zero_shot is not None and training.interactions == "all" and zero_shot.prepared.fingerprint in read:
        raise InputError(
            f"zero_shot is {zero_shot.prepared.name!r}, whose test targets would be read: expected a set of its own, "
            "or interactions='train'"
        )


def _examples(sets: Sequence[TextSet], config: RecFormerConfig, training: PretrainingConfig, seed: int, **more):
    tokens, histories, ends_U = joined(sets, training.interactions)
    return PretrainingExamples(
        item_tokens=tokens, histories=histories, ends_U=ends_U, special=sets[0].special, seed=seed,
        max_items=config.max_items, max_tokens=config.max_tokens, mask_share=training.mask_share,
        faithful=training.faithful_masking, **more,
    )  # fmt: skip


def _held_out_batches(held_out: TextSet, config: RecFormerConfig, training: PretrainingConfig, seed: int) -> list[dict]:
    """Return the batches of the in-batch accuracy: the last item of a seeded sample of sequences, masked once."""
    examples = _examples([held_out], config, training, seed, last_targets=True)
    rows = generator(seed, "held-out sequences").permutation(len(examples))[: training.validation_sequences]
    batches = rows[: len(rows) // training.validation_batch * training.validation_batch]
    if not len(batches):
        raise InputError(
            f"the held-out set {held_out.prepared.name!r} gives {len(rows)} sequences: expected at least "
            f"validation_batch={training.validation_batch}"
        )
    return [default_convert(examples[0, 0, part]) for part in batches.reshape(-1, training.validation_batch)]


def _known_peak(device: str) -> float | None:
    if device != "cuda":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
