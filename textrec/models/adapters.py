"""Low-rank adapters (Hu et al. 2021, "LoRA") on a `RecFormer`: which layers get them, merging, files of their own.

A layer's W h + b becomes (W + s B A) h + b with A of `rank` rows, s = alpha / rank, and B zero at first; W, b, norms
and tables stay as they are. peft does the work, inside the model, whose class and methods stay. A layer of the encoder
has nine linear maps: query, key, value and their global twins, the output of attention, both of the feed-forward net.
"""

import copy
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from textrec.schema import InputError

LOCAL, GLOBAL = ("query", "key", "value"), ("query_global", "key_global", "value_global")
ATTENTION, FORWARD = (*LOCAL, *GLOBAL, "attention_output"), ("enter", "leave")
TARGETS = {
    "attn_local": LOCAL, "attn_global": GLOBAL, "attn": ATTENTION, "ffn": FORWARD,
    "all": (*ATTENTION, *FORWARD, "dense"),  # `dense` is that of the head that guesses masked words
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is adapted and trained; the defaults are the study's, 1,769,472 parameters in 108 layers of `base`."""

    targets: str = "all"  # attn_local | attn_global | attn | ffn | all
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1  # on what A reads; for the folded global keys and values, of features of all tokens alike
    train_also: tuple[str, ...] = ()  # parts that are trained whole, e.g. word_table, type_table
    dora: bool = False  # a trained length per output, the adapted weight its direction (Liu et al. 2024)
    rslora: bool = False  # s = alpha / sqrt(rank) (Kalajdzievski 2023)

    def __post_init__(self):
        object.__setattr__(self, "train_also", tuple(self.train_also))  # YAML and JSON know lists alone
        if self.targets not in TARGETS:
            raise ValueError(f"targets={self.targets!r}: expected one of {', '.join(TARGETS)}")
        if self.rank < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"rank={self.rank}, dropout={self.dropout}: expected at least 1, and from 0 to below 1")


def with_adapters(model: nn.Module, config: AdapterConfig) -> nn.Module:
    """Return a copy with adapters, drawn by torch's generator, of which they and `train_also` alone are trained.

    Raises InputError where `train_also` names a part that the model does not have, or the model is adapted already.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if adapter_layers(model):
        raise InputError(f"the {type(model).__name__} has adapters already: expected one whose adapters are merged")
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, use_dora=config.dora,
        use_rslora=config.rslora, target_modules=list(TARGETS[config.targets]), bias="none",
    )  # fmt: skip
    adapted = inject_adapter_in_model(lora, copy.deepcopy(model))
    for name in config.train_also:
        parts = [part for path, part in adapted.named_modules() if f".{path}".endswith(f".{name}")]
        if not parts:
            raise InputError(f"train_also names {name!r}, which {type(model).__name__} does not have")
        for part in parts:
            part.requires_grad_(True)
    adapted.adapter_config = config
    return adapted


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted layers by their names in the model without adapters."""
    return {path: part for path, part in model.named_modules() if hasattr(part, "base_layer")}


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes, by name: adapters and `train_also`."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged(model: nn.Module) -> nn.Module:
    """Return a copy without adapters that computes the same; the model itself where it has none."""
    if not adapter_layers(model):
        return model
    plain = copy.deepcopy(model)
    for path, layer in adapter_layers(plain).items():
        layer.merge()
        plain.set_submodule(path, layer.get_base_layer())
    del plain.adapter_config
    return plain.requires_grad_(True)


def save_adapters(model: nn.Module, path: Path) -> None:
    """Write what is trained, alone, into one safetensors file, with its setting and the hash of what is not."""
    from safetensors.torch import save_file

    told = {"adapters": json.dumps(asdict(model.adapter_config)), "base": base_hash(model)}
    tensors = {name: weight.cpu().contiguous() for name, weight in trained_state(model).items()}
    partial = Path(f"{path}.partial-{os.getpid()}")
    save_file(tensors, str(partial), metadata=told)
    os.replace(partial, path)


def load_adapters(model: nn.Module, path: Path) -> nn.Module:
    """Return a copy of the plain `model` with the adapters of `path`, which must have been trained on its weights."""
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        told, names = file.metadata() or {}, list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    if "adapters" not in told:
        raise InputError(f"{path} holds no adapters: expected a file of `save_adapters`")
    adapted = with_adapters(model, AdapterConfig(**json.loads(told["adapters"])))
    if told["base"] != base_hash(adapted):
        raise InputError(
            f"{path} holds adapters of weights with the hash {told['base']}: expected those of the given "
            f"{type(model).__name__}, {base_hash(adapted)}"
        )
    adapted.load_state_dict(tensors, strict=False)
    return adapted.eval()


def base_hash(model: nn.Module) -> str:
    """Return a hash of the weights that a model with adapters keeps."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if not weight.requires_grad and ".lora_" not in name:
            digest.update(name.encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
