"""The one LightningModule of the sequence models: a loss on the real positions, global loss means, parameter groups."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from textrec.schema import PADDING_ID
from textrec.seeding import derive_seed
from textrec.training import losses
from textrec.training.optimizers import adamw
from textrec.training.strategies import PRECISIONS, STRATEGIES, DistributedModule

LOSSES = ("full_softmax", "sampled_softmax", "gbce")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a sequence model is trained; the batch is global, so the number of processes changes nothing but speed."""

    objective: str = "next_item"  # next_item | masked_item (BERT4Rec)
    loss: str = "full_softmax"  # full_softmax | sampled_softmax | gbce
    num_negatives: int = 256  # of the sampled losses
    negatives: str = "uniform"  # uniform | in_batch: targets of the batch, logQ corrected | outside_history: per row
    share_negatives: bool = True  # one draw for the whole batch; else one per position
    reject_history: bool = False  # redraw negatives that occur in the row's own history (per position only)
    calibration: float = 0.0  # t of gBCE; 0 is plain binary cross-entropy
    mask_probability: float = 0.2  # masked_item: share of masked positions
    mask_last_probability: float = 0.1  # masked_item: share of rows where only the newest item is masked
    batch_size: int = 128  # histories per optimiser step, over all processes
    learning_rate: float = 1e-3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0  # on matrices only, decoupled
    warmup_steps: int = 0
    schedule: str = "constant"  # constant | cosine, to final_learning_rate at max_epochs
    final_learning_rate: float = 0.0
    gradient_clip: float | None = None  # global norm
    max_epochs: int = 100
    patience: int = 10  # validations without a better ndcg@10 before training stops
    validate_every: int = 1  # epochs
    validation_users: int | None = None  # a seeded sample for the validation curve; None: all
    precision: str = "auto"  # auto: 32 on CPU, bf16-mixed on CUDA | 32 | bf16-mixed | 16-mixed
    strategy: str = "auto"  # auto | ddp | fsdp | deepspeed_stage_1, _2, _3, each also with _offload
    accumulate: int = 1  # parts in which each process computes the gradient of its share of the batch
    compile: bool = False

    def __post_init__(self):
        allowed = {
            "objective": ("next_item", "masked_item"), "loss": LOSSES, "schedule": ("constant", "cosine"),
            "negatives": ("uniform", "in_batch", "outside_history"), "precision": PRECISIONS, "strategy": STRATEGIES,
        }  # fmt: skip
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {values}")
        if self.negatives != "uniform" and (self.loss != "sampled_softmax" or not self.share_negatives):
            raise ValueError(f"negatives={self.negatives!r} needs loss='sampled_softmax' and share_negatives=True")
        for name in ("batch_size", "accumulate", "max_epochs", "patience", "validate_every", "num_negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if not 0.0 <= self.final_learning_rate <= self.learning_rate:
            raise ValueError(f"{self.final_learning_rate=}: expected 0 to {self.learning_rate=}")


class SequenceModule(DistributedModule):
    """Trains any `SequenceModel`. Randomness is a function of (seed, epoch, step, rank), so a resumed run repeats it.

    `item_counts_I` (num_items + 1,) are training counts, needed by in-batch negatives alone.
    """

    def __init__(self, model, training: TrainingConfig, seed: int, item_counts_I=None):
        super().__init__()
        self.model, self.training_config, self.seed = model, training, seed
        self.start_counting()
        told = (training.loss, training.share_negatives, training.negatives)
        if model.similarity is not None and told != ("sampled_softmax", True, "uniform"):
            raise ValueError("a mixture of logits is trained with loss='sampled_softmax', share_negatives=True and "
                             f"negatives='uniform', not {told}")  # fmt: skip
        if training.negatives == "in_batch":
            expected_I = torch.as_tensor(item_counts_I, dtype=torch.float64)
            log_probability_I = (expected_I * training.num_negatives / expected_I.sum()).clamp_min(1e-12).log()
            self.register_buffer("log_probability_I", log_probability_I.float(), persistent=False)
        else:
            self.log_probability_I = None

    def start_counting(self) -> None:
        """Set what this process sums over an epoch to zero: real positions read; losses and targets."""
        self.tokens, self.sums = 0, torch.zeros(2, dtype=torch.float64)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Return the loss whose gradient, averaged over processes, is that of the mean over all their positions."""
        step, part = batch["step"], batch.get("part", 0)
        torch.manual_seed(self._derived("dropout", step, self.global_rank, part))
        items_BL, targets_BL = batch["items"], batch["targets"]
        hidden_TD = self.model(items_BL, *(batch[name] for name in ("times", "requests") if name in batch))
        targets_T = targets_BL[items_BL != PADDING_ID]
        chosen_T = targets_T != PADDING_ID  # every real position of next_item, the masked ones of masked_item
        if self.training_config.objective == "masked_item":
            hidden_TD, targets_T = hidden_TD[chosen_T], targets_T[chosen_T]
        self.tokens += len(chosen_T)
        total = self._loss(hidden_TD.float(), targets_T, items_BL, step, part)
        self.sums += torch.tensor([float(total.detach()), len(targets_T)], dtype=torch.float64)
        return self.mean_over_step(total, batch.get("targets_in_step", len(targets_T)))

    def _derived(self, purpose: str, step: int, rank: int, part: int) -> int:
        return derive_seed(self.seed, purpose, self.current_epoch, step, rank, *([part] if part else []))

    def _loss(self, hidden_TD: Tensor, targets_T: Tensor, items_BL: Tensor, step: int, part: int) -> Tensor:
        config, items_ID = self.training_config, self.model.item_vectors().float()
        if config.loss == "full_softmax":
            return losses.full_softmax(hidden_TD, items_ID, targets_T)
        with torch.autocast(hidden_TD.device.type, enabled=False):  # in fp32 under mixed precision, too
            return self._sampled_loss(hidden_TD, items_ID, targets_T, items_BL, step, part)

    def _sampled_loss(self, hidden_TD: Tensor, items_ID: Tensor, targets_T, items_BL: Tensor, step: int, part: int):
        config = self.training_config
        if config.negatives == "outside_history":
            rows_T = (items_BL != PADDING_ID).nonzero()[:, 0]
            drawn_BI = self._drawn_outside(targets_T, rows_T, items_BL, len(items_ID), step, part)
            return losses.full_softmax(hidden_TD, items_ID, targets_T, drawn_BI, rows_T)
        negatives = self._negatives(targets_T, items_BL, len(items_ID) - 1, step, part)
        if self.model.similarity is not None:
            return losses.mixture_softmax(self.model.similarity, hidden_TD, items_ID, targets_T, negatives)
        if config.loss == "gbce":
            return losses.gbce(hidden_TD, items_ID, targets_T, negatives, config.calibration)
        return losses.sampled_softmax(hidden_TD, items_ID, targets_T, negatives, self.log_probability_I)

    def _drawn_outside(self, targets_T, rows_T, items_BL: Tensor, num_rows: int, step: int, part: int) -> Tensor:
        """Mark `num_negatives` items per row (B, I), no item twice and none that the row reads or predicts."""
        source = torch.Generator(items_BL.device).manual_seed(self._derived("negatives", step, self.global_rank, part))
        clocks_BI = torch.rand(len(items_BL), num_rows, generator=source, device=items_BL.device)
        clocks_BI.scatter_(1, items_BL, 2.0)[rows_T, targets_T] = 2.0
        clocks_BI[:, PADDING_ID] = 2.0
        chosen_BN = clocks_BI.topk(min(self.training_config.num_negatives, num_rows), largest=False).indices
        return torch.zeros_like(clocks_BI, dtype=torch.bool).scatter_(1, chosen_BN, True) & (clocks_BI < 2.0)

    def _negatives(self, targets_T: Tensor, items_BL: Tensor, num_items: int, step: int, part: int = 0) -> Tensor:
        config, device = self.training_config, targets_T.device
        shared = config.share_negatives and config.loss != "gbce"
        rank = self.global_rank
        if shared and config.negatives == "uniform":
            rank = part = 0  # shared draws agree on all ranks and in all parts
        source = torch.Generator(device).manual_seed(self._derived("negatives", step, rank, part))
        shape = (config.num_negatives,) if shared else (len(targets_T), config.num_negatives)
        if config.negatives == "in_batch":
            return targets_T[torch.randint(len(targets_T), shape, generator=source, device=device)]
        negatives = torch.randint(1, num_items + 1, shape, generator=source, device=device)
        if config.reject_history and not shared:
            seen_BI = torch.zeros(len(items_BL), num_items + 1, dtype=torch.bool, device=device)
            seen_BI.scatter_(1, items_BL, True)
            rows_T = (items_BL != PADDING_ID).nonzero()[:, 0]
            again_P2 = seen_BI[rows_T[:, None], negatives].nonzero()
            for _ in range(8):  # a history of half the catalogue still leaves 1 in 256 draws inside it
                drawn_P = torch.randint(1, num_items + 1, (len(again_P2),), generator=source, device=device)
                negatives[again_P2[:, 0], again_P2[:, 1]] = drawn_P
                again_P2 = again_P2[seen_BI[rows_T[again_P2[:, 0]], drawn_P]]
        return negatives

    def configure_optimizers(self):
        """AdamW, with a warm-up and a schedule where the configuration has them."""
        config = self.training_config
        optimizer = adamw(self, config)
        if config.schedule == "constant" and not config.warmup_steps:
            return optimizer
        total = self.trainer.estimated_stepping_batches
        floor = config.final_learning_rate / config.learning_rate

        def factor(step: int) -> float:
            if step < config.warmup_steps:
                return (step + 1) / config.warmup_steps
            if config.schedule == "constant":
                return 1.0
            progress = (step - config.warmup_steps) / max(total - config.warmup_steps, 1)
            return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
