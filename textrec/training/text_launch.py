"""Pretrain and finetune in several processes: what `pretrain` and `two_stage` do in this one, started by torchrun.

The model, the tokenizer and the folders of the sets go through files, as do the results; see `launch.py` for several
machines, whose commands take the `launch.json` that is written here.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textrec.data.choices import configured
from textrec.data.prepared import PreparedSet
from textrec.models.recformer import RecFormer, RecFormerForPretraining
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.launch import launch, processes
from textrec.training.pretraining import Pretrained, PretrainingConfig, pretrain, save_tokenizer
from textrec.training.text_ranking import TextSet
from textrec.training.two_stage import Finetuned, TwoStageConfig, load_pair, two_stage


def pretrain_in_processes(
    model: RecFormerForPretraining, sets: Sequence[TextSet], training: PretrainingConfig, *, seed: int, folder: Path,
    held_out: TextSet, zero_shot: TextSet | None = None, device: str = "cpu", devices: int,
) -> Pretrained:  # fmt: skip
    """Train in `devices` processes of this machine what `pretrain` trains in this one."""
    folder = Path(folder).resolve()
    arguments = _written(model, sets[0], folder, training, seed, device) | {
        "sets": [_told(each) for each in sets], "held_out": _told(held_out),
        "zero_shot": _told(zero_shot) if zero_shot else None,
    }  # fmt: skip
    told = launch("textrec.training.text_launch:pretrain_here", arguments, folder, devices)
    return Pretrained(RecFormerForPretraining.from_pretrained(folder / "model"), **told)


def pretrain_here(
    folder: str, training: dict, seed: int, device: str, sets: list, held_out: dict, zero_shot: dict | None
) -> dict[str, Any]:
    """Pretrain as one of the processes; return the curve and the cost."""
    _, devices, num_nodes = processes()
    seed_everything(seed)
    start = Path(folder) / "start"
    found = pretrain(
        RecFormerForPretraining.from_pretrained(start), [_text_set(each, start) for each in sets],
        PretrainingConfig.of(training), seed=seed, folder=Path(folder), device=device, devices=devices,
        num_nodes=num_nodes, held_out=_text_set(held_out, start),
        zero_shot=_text_set(zero_shot, start) if zero_shot else None,
    )  # fmt: skip
    return {"curve": found.curve, "tokens": found.tokens, "cpu_s": found.cpu_s}


def two_stage_in_processes(
    model: RecFormer, texts: TextSet, training: TwoStageConfig, *, seed: int, folder: Path, device: str = "cpu",
    devices: int,
) -> Finetuned:  # fmt: skip
    """Train in `devices` processes of this machine what `two_stage` trains in this one."""
    folder = Path(folder).resolve()
    arguments = _written(model, texts, folder, training, seed, device) | {"texts": _told(texts)}
    told = launch("textrec.training.text_launch:two_stage_here", arguments, folder, devices)
    found, pair = RecFormer.from_pretrained(folder / "model"), Path(told.pop("pair"))
    return Finetuned(found, load_pair(pair, found), pair=pair, **told)


def two_stage_here(folder: str, training: dict, seed: int, device: str, texts: dict) -> dict[str, Any]:
    """Finetune as one of the processes; return the validation value, the pair, the curve and the cost."""
    _, devices, num_nodes = processes()
    seed_everything(seed)
    start = Path(folder) / "start"
    found = two_stage(
        RecFormer.from_pretrained(start), _text_set(texts, start),
        configured(TwoStageConfig, training, "setting of finetuning"), seed=seed,
        folder=Path(folder), device=device, devices=devices, num_nodes=num_nodes,
    )  # fmt: skip
    cost = {"tokens": found.tokens, "cpu_s": found.cpu_s}
    return {"best": found.best, "pair": str(found.pair), "curve": found.curve} | cost


def _written(model, texts: TextSet, folder: Path, training, seed: int, device: str) -> dict[str, Any]:
    model.save_pretrained(folder / "start")
    save_tokenizer(texts.tokenizer, folder / "start")
    return {"folder": str(folder), "training": asdict(training), "seed": seed, "device": device}


def _told(texts: TextSet) -> dict[str, Any]:
    return {"prepared": str(texts.prepared.folder.resolve()), "faithful": texts.faithful, "identity": texts.identity}


def _text_set(told: dict[str, Any], start: Path) -> TextSet:
    from tokenizers import Tokenizer

    prepared, tokenizer = PreparedSet.load(Path(told["prepared"])), Tokenizer.from_file(str(start / "tokenizer.json"))
    texts = TextSet.of(prepared, tokenizer, faithful=told["faithful"], folder=start.parent / "tokens")
    if texts.identity != told["identity"]:
        raise InputError(
            f"the set {prepared.name!r} was given other texts than its catalogue's: expected one process for such a run"
        )
    return texts
