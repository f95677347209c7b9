"""From a training checkpoint, one file or ZeRO's folder of shards, to one set of weights and a model like any other."""

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from textrec.data.storage import staged_folder
from textrec.models.saving import load_exactly
from textrec.schema import InputError

_DEEPSPEEDS_OWN = {"module", "optimizer", "lr_scheduler", "data_sampler", "random_ltd"}


@dataclass(frozen=True)
class ZeroCheckpoint:
    """What the shards of a ZeRO checkpoint hold together."""

    weights: dict[str, Tensor]  # fp32, frozen parameters and buffers included
    moments: dict[str, dict[str, Tensor]]  # "exp_avg" and "exp_avg_sq": by parameter
    steps: Tensor  # of the optimizer
    groups: list[dict[str, Any]]  # its settings, such as the learning rate at hand
    rest: dict[str, Any]  # what Lightning stored: loops, callbacks, schedules


def consolidate(path: Path) -> dict[str, Tensor]:
    """Return the fp32 weights of a checkpoint by name in the network: ZeRO's folder or a single file.

    Raises `InputError` where `path` is neither, or where shards are missing.
    """
    return _weights_and_rest(Path(path))[0]


def _weights_and_rest(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.is_file():
        rest = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(rest, dict) or "state_dict" not in rest:
            raise InputError(f"{path} holds no state_dict: expected a checkpoint of a training")
        weights = rest["state_dict"]
    else:
        found = read_zero(path, moments=False)
        weights, rest = found.weights, found.rest
    return {name.removeprefix("model."): value for name, value in weights.items()}, rest


def convert(path: Path, folder: Path, like: Path | None = None) -> None:
    """Write the checkpoint `path` as a model that `from_pretrained(folder)` loads, with its tokenizer where it is near.

    `path` is the checkpoint of a training, or a RecFormer, Longformer, RoBERTa or BERT under its published names (see
    `load_recformer`). `like` is the folder of a saved sequence model of the same shape; by default the best one so far,
    which the training keeps beside its checkpoint. A text model's checkpoint knows its shape. Raises `InputError` where
    `folder` exists, where `path` cannot be read, or where names and shapes do not fit.
    """
    from safetensors import SafetensorError

    path, folder = Path(path), Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists: expected the name of a new folder")
    try:
        model = _read_model(path, like)
    except (RuntimeError, OSError, EOFError, LookupError, UnpicklingError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: expected a whole file of tensors alone") from error
    near = (place / "tokenizer.json" for place in (path, path.parent / "model", path.parent.parent / "model"))
    with staged_folder(folder) as partial:
        model.save_pretrained(partial)
        for tokenizer in [file for file in near if file.is_file()][:1]:
            shutil.copy(tokenizer, partial)


def _read_model(path: Path, like: Path | None):
    from textrec.models.pretrained import load_recformer, read_weights
    from textrec.models.recformer import RecFormer, RecFormerConfig, RecFormerForPretraining
    from textrec.models.sequence_model import SequenceModel

    published = not (path / "latest").is_file()
    if path.is_file():
        stored = read_weights(path)
        published = isinstance(stored, dict) and any(name.endswith("word_embeddings.weight") for name in stored)
    if published:
        return load_recformer(path)
    weights, rest = _weights_and_rest(path)
    weights.pop("trained_ID", None)  # the item vectors of a finetuning, which are no part of its encoder
    identities = [state["identity"] for state in rest.get("callbacks", {}).values() if "identity" in state]
    if "word_table.weight" in weights or "encoder.word_table.weight" in weights:
        kind = RecFormer if "word_table.weight" in weights else RecFormerForPretraining
        model = kind(RecFormerConfig(**identities[0]["model"]))
    else:
        model = SequenceModel.from_pretrained(like or path.parent / "model")
    load_exactly(model, weights, path)
    return model


def read_zero(folder: Path, moments: bool = True) -> ZeroCheckpoint:
    """Join the shards of a ZeRO checkpoint of any stage and number of processes; `moments` of AdamW cost twice more.

    The shards are DeepSpeed's pickles, which can run code when they are read: open none that you would not run.
    """
    folder = Path(folder)
    pointer = folder / "latest"
    if not pointer.is_file():
        raise InputError(f"{folder} is no checkpoint: expected a training's file or ZeRO's folder with `latest` in it")
    try:
        from deepspeed.utils import zero_to_fp32
    except ImportError as error:
        raise InputError(f"{folder} is a ZeRO checkpoint and needs the package deepspeed to be read: "
                         "pip install 'textrec[deepspeed]'") from error  # fmt: skip
    tag = folder / pointer.read_text().strip()
    try:
        files = zero_to_fp32.get_optim_files(str(tag))
        shards = [torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"] for file in files]
        model_files = zero_to_fp32.get_model_state_files(str(tag))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            weights = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder))
    except (OSError, ValueError) as error:
        raise InputError(f"{tag} is not whole: {error}") from error
    stored = torch.load(model_files[0], map_location="cpu", weights_only=False)
    for name, value in stored["module"].items():  # what the conversion leaves out: frozen parameters
        if name not in weights and value.numel():
            weights[name] = value
    weights = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    three = shards[0]["zero_stage"] == 3
    adams = [shard["optimizer_state_dict" if three else "base_optimizer_state"] for shard in shards]
    joined = _moments(tag, [adam["state"] for adam in adams], three) if moments else {}
    groups = [{key: group[key] for key in group if key != "params"} for group in adams[0]["param_groups"]]
    rest = {key: value for key, value in stored.items() if key not in _DEEPSPEEDS_OWN}
    return ZeroCheckpoint(weights, joined, torch.as_tensor(adams[0]["state"][0]["step"]), groups, rest)


def _moments(tag: Path, states: list[dict], three: bool) -> dict[str, dict[str, Tensor]]:
    """Join AdamW's moments: they are cut as the weights are, so DeepSpeed's own way of joining weights is theirs."""
    from deepspeed.utils import zero_to_fp32

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        models = zero_to_fp32.parse_model_states(zero_to_fp32.get_model_state_files(str(tag)))
        join = zero_to_fp32._get_fp32_state_dict_from_zero3_checkpoint if three else (
            zero_to_fp32._get_fp32_state_dict_from_zero2_checkpoint)  # fmt: skip
        return {
            key: zero_to_fp32.to_torch_tensor(join(
                len(states), [[state[group][key] for group in sorted(state)] for state in states], models, True
            )) for key in ("exp_avg", "exp_avg_sq")
        }  # fmt: skip
