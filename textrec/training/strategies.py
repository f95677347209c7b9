"""How a training is spread over processes: one setting, on CPU (gloo) and CUDA (nccl) alike.

| strategy | what each process holds |
|---|---|
| `auto` | `ddp` where there are several processes |
| `ddp` | everything; gradients are averaged |
| `fsdp` | its share of weights, gradients and optimizer state (torch's `fully_shard`) |
| `deepspeed_stage_1` | its share of the optimizer state (ZeRO, Rajbhandari et al. 2020) |
| `deepspeed_stage_2` | its share of the optimizer state and the gradients |
| `deepspeed_stage_3` | its share of all three |
| `..._offload` | the same, its optimizer state (stage 3: its weights, too) in host memory |

A LightningModule that derives from `DistributedModule` runs under all of them. `launch.py` says how several machines
are started.
"""

import copy
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn

from textrec.data.files import write_text
from textrec.schema import InputError
from textrec.training.checkpoints import AtomicCheckpoints
from textrec.training.consolidation import ZeroCheckpoint, read_zero

# oneDNN keeps a kernel for every shape that it has met, by default 1,024 of them: packed batches, each of another
# length, grow to 10 GiB that way. Read at its first use, so set before.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

STRATEGIES = (
    "auto", "ddp", "fsdp",
    *(f"deepspeed_stage_{stage}{offload}" for stage in (1, 2, 3) for offload in ("", "_offload")),
)  # fmt: skip
PRECISIONS = ("auto", "32", "32-true", "bf16-mixed", "16-mixed")


def trainer_for(
    training, device: str, devices: int, callbacks: list, folder: Path, *, num_nodes: int = 1, **more
) -> lightning.Trainer:
    """Build the Trainer of `devices` processes on each of `num_nodes` machines.

    `training` is any configuration with `strategy`, `precision`, `accumulate`, `gradient_clip`, `batch_size` and
    `max_epochs`; `more` goes to `lightning.Trainer`. Raises `InputError` for what the device or an absent package rules
    out.
    """
    precision, plugins = precision_of(training, device), [AtomicCheckpoints()]
    strategy = _strategy(training, device, devices * num_nodes, Path(folder))
    if precision.endswith("-mixed") and not isinstance(strategy, ZeRO):
        scaler = torch.amp.GradScaler("cuda") if precision == "16-mixed" else None
        plugins.append(Autocast(precision, device, scaler))
        precision = None
    return lightning.Trainer(
        accelerator="gpu" if device == "cuda" else device, devices=devices, num_nodes=num_nodes,
        strategy=strategy, precision=precision, max_epochs=training.max_epochs,
        gradient_clip_val=training.gradient_clip, accumulate_grad_batches=training.accumulate,
        callbacks=callbacks, plugins=plugins,
        use_distributed_sampler=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=folder, **more,
    )  # fmt: skip


def precision_of(training, device: str) -> str:
    """Resolve `auto`: fp32 on the CPU, where bf16 is slower, and bf16-mixed on CUDA."""
    if training.precision == "16-mixed" and (device != "cuda" or training.strategy == "fsdp"):
        raise InputError(f"precision='16-mixed' needs CUDA and another strategy than fsdp, this run has "
                         f"device={device!r} and strategy={training.strategy!r}: use bf16-mixed or 32")  # fmt: skip
    if training.precision == "auto":
        return "bf16-mixed" if device == "cuda" else "32-true"
    return training.precision


def _strategy(training, device: str, world_size: int, folder: Path):
    name, backend = training.strategy, "nccl" if device == "cuda" else "gloo"
    if name == "auto" and world_size == 1:
        return "auto"
    if name in ("auto", "ddp"):
        return DDPStrategy(process_group_backend=backend)
    if name == "fsdp":
        return FullySharded(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False,
            process_group_backend=backend,
        )  # fmt: skip
    histories = training.batch_size // (world_size * training.accumulate)
    return ZeRO(zero_config(name, device, histories), folder / "deepspeed.json", backend)


def zero_config(name: str, device: str, histories: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration; Lightning adds precision, accumulation and clipping before it is written.

    `histories` is the batch of one process between two backward passes.
    """
    stage, offload = int(name.removesuffix("_offload")[-1]), name.endswith("_offload")
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": device == "cuda"}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device == "cuda"}
    if offload and stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": device == "cuda"}
    return {
        "train_micro_batch_size_per_gpu": max(histories, 1),
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does: DeepSpeed's is compiled for minutes
    }


class Autocast(MixedPrecision):
    """Mixed precision that clips a fused optimizer's gradients, too; Lightning's refuses to, scaled or not."""

    def clip_gradients(self, optimizer, clip_val: float = 0.0, gradient_clip_algorithm="norm") -> None:
        if clip_val > 0 and self.scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self.scaler.unscale_(optimizer)
        super(MixedPrecision, self).clip_gradients(optimizer, clip_val, gradient_clip_algorithm)


class FullySharded(ModelParallelStrategy):
    """FSDP2 over all processes; its checkpoint is one file of whole tensors, for any number of processes to read."""

    def training_step(self, *args, **kwargs):
        """Go through the module's own `forward`, where `fully_shard` gathers what belongs to no inner block."""
        with self.precision_plugin.train_step_context():
            return self._forward_redirection(self.model, self.lightning_module, "training_step", *args, **kwargs)


class ZeRO(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, on the CPU, too; its checkpoints are whole or absent and fit any world size."""

    def __init__(self, config: dict[str, Any], written: Path, backend: str):
        if backend == "gloo":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            raise InputError("a strategy deepspeed_stage_* needs the package deepspeed, which is not installed: "
                             "pip install 'textrec[deepspeed]'") from error  # fmt: skip
        if backend == "gloo":
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled for half a minute
        super().__init__(config=config, process_group_backend=backend)
        self.written = written

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device  # DeepSpeed asks for an index

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu":
            DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's refuses all but CUDA
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.root_device.type == "cpu":
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    def setup(self, trainer: lightning.Trainer) -> None:
        super().setup(trainer)
        if self.is_global_zero:
            write_text(self.written, json.dumps(self.config, indent=1))

    def backward(self, closure_loss: Tensor, optimizer, *args, **kwargs) -> Tensor:
        """Lightning has divided the loss by the accumulated batches already."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath, storage_options: Any = None) -> None:
        """Write a new tag beside the previous one, then point `latest` at it: a kill leaves one of the two."""
        folder = Path(self.broadcast(str(filepath)))
        pointer = folder / "latest"
        tag = f"save{int(pointer.read_text().removeprefix('save')) + 1 if pointer.is_file() else 0}"
        self.barrier()
        if self.is_global_zero:
            shutil.rmtree(folder / tag, ignore_errors=True)  # shards of a save that was killed
        self.barrier()
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        self.deepspeed_engine.save_checkpoint(str(folder), tag=tag, client_state=rest, save_latest=False)
        if self.is_global_zero:
            write_text(pointer, tag)
            for stale in folder.glob("save*"):
                if stale.name != tag:
                    shutil.rmtree(stale)
        self.barrier()

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote; shards of another number of processes are cut anew."""
        folder = Path(checkpoint_path)
        tag = folder / (folder / "latest").read_text()
        if len(list(tag.glob("*_optim_states.pt"))) == self.world_size:
            return super().load_checkpoint(checkpoint_path, weights_only)
        found = read_zero(folder)
        self._restore(found)
        return found.rest

    @torch.no_grad()
    def _restore(self, found: ZeroCheckpoint) -> None:
        """Fill this process's shares of weights, their fp32 copies and AdamW's moments from whole tensors."""
        import deepspeed

        weights, moments = found.weights, found.moments
        zero, three = self.deepspeed_engine.optimizer, self.zero_stage_3
        for group, settings in zip(zero.optimizer.param_groups, found.groups, strict=True):
            group.update(settings)
        for flat in zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {"step": found.steps.to(flat.device, copy=True)}
            zero.optimizer.state[flat] |= {key: torch.zeros_like(flat) for key in moments}
        if not three:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self.lightning_module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=three):
                parameter.data.copy_(weights[name])
            if not parameter.requires_grad:
                continue
            for key, whole in {None: weights[name], **{key: moments[key][name] for key in moments}}.items():
                if three:
                    share, _ = zero._get_fp32_opt_state_partition(parameter, False, optim_state_key=key)
                    first = share.numel() * self.global_rank
                    mine = whole.flatten()[first : first + share.numel()]
                    share[: len(mine)].copy_(mine)
                elif parameter._hp_mapping is not None:
                    parameter.set_full_hp_param(whole.to(parameter.device), key)
        for name, buffer in self.lightning_module.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])


class DistributedModule(lightning.LightningModule):
    """A LightningModule with one network, `model`, that any strategy can spread.

    A subclass divides its loss by `mean_over_step` and reads weights outside of training through `whole_model`.
    """

    model: nn.Module
    _whole: tuple[nn.Module, ...] = ()  # a tuple hides the copy from torch's registry of submodules

    def configure_model(self) -> None:
        """Cut the network into shares where the strategy wants them; Lightning calls this ahead of the optimizer."""
        strategy = self.trainer.strategy
        if self._whole or not isinstance(strategy, FullySharded | ZeRO):
            return
        self._whole = (copy.deepcopy(self.model),)
        if isinstance(strategy, FullySharded):
            from torch.distributed.fsdp import fully_shard

            mesh = strategy.device_mesh["data_parallel"]
            for block in _blocks(self.model):
                fully_shard(block, mesh=mesh)
            fully_shard(self, mesh=mesh)

    def mean_over_step(self, total: Tensor, count: int) -> Tensor:
        """Return the loss whose gradient is that of the mean over the positions of a whole optimizer step.

        `total` is this process's sum over the batch at hand, `count` this process's positions in all the batches that
        are accumulated to the step. Strategies average gradients over processes and batches; a mean of such means would
        weigh a position of a short batch more than one of a long batch.
        """
        positions = torch.tensor(float(count), device=total.device)
        world_size = self.trainer.world_size
        if world_size > 1:
            torch.distributed.all_reduce(positions)
        return total * (world_size * self.trainer.accumulate_grad_batches / positions.clamp_min(1.0))

    @contextmanager
    def whole_model(self) -> Iterator[nn.Module]:
        """Give the network with all its weights in fp32, to rank with and to save. Every process has to ask for it.

        It is `model` itself where each process holds all of it, else a copy that is kept in host memory.
        """
        if not self._whole:
            yield self.model
            return
        whole = self._whole[0].to(self.trainer.strategy.root_device).train(self.model.training)
        with torch.no_grad():
            for share, target in zip(self.model.parameters(), whole.parameters(), strict=True):
                target.copy_(_gathered(share))
            for buffer, target in zip(self.model.buffers(), whole.buffers(), strict=True):
                target.copy_(buffer)
        yield whole
        whole.cpu()


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the outermost members of module lists: the layers of a stack, gathered one at a time."""
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if next(block.parameters(), None) is not None)
        else:
            yield from _blocks(child)


def _gathered(share: Tensor) -> Tensor:
    """Return the whole of a parameter, in fp32 where an optimizer keeps an fp32 copy; collective."""
    from torch.distributed.tensor import DTensor

    if isinstance(share, DTensor):
        return share.full_tensor()
    if hasattr(share, "ds_id") or hasattr(share, "_hp_mapping"):
        import deepspeed

        if share.requires_grad:
            return deepspeed.utils.safe_get_full_fp32_param(share)
        with deepspeed.zero.GatheredParameters([share], enabled=hasattr(share, "ds_id")):
            return share.data.clone()
    return share
