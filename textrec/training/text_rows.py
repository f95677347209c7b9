"""The rows of RecFormer's tables: each changes one thing, is tested once, cached in the run folder and resumed there.

Laid out as by `rows.py`: `run_dir/rows/<row>/` with `row.json`, written last, `ranks.parquet` and the checkpoints.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from textrec.data.choices import closest
from textrec.data.item_text import item_attributes, shuffled_texts
from textrec.models.recformer import RecFormer
from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.rows import RowResult, cached_row
from textrec.training.text_launch import two_stage_in_processes
from textrec.training.text_ranking import BagOfWords, TextSet, text_ranks, weights_digest, with_permuted_words
from textrec.training.two_stage import FAITHFUL, TwoStageConfig, two_stage

_CODE = [ROOT / "textrec" / name for name in (
    "data/histories.py", "data/item_text.py", "data/tokenizing.py", "data/examples.py", "evaluation/metrics.py",
    "evaluation/ranking.py", "models/attention.py", "models/recformer.py", "seeding.py", "training/batches.py",
    "training/losses.py", "training/optimizers.py", "training/strategies.py", "training/text_batches.py",
    "training/text_ranking.py", "training/two_stage.py",
)]  # fmt: skip


@dataclass(frozen=True)
class TextRow:
    """What a row is, and the one thing in which it differs from `two_stage`, or from `zero_shot` where untrained."""

    changed: str
    start: str = "pretrained"  # pretrained | backbone | permuted_words | bag_of_words | random
    texts: str = "own"  # own | shuffled: each item gets some item's text
    finetuned: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


TABLES = ("item_position_table", "type_table")
TEXT_ROWS = {
    "zero_shot": TextRow("reference of the untrained rows", finetuned=False),
    "bag_of_words": TextRow("mean word vector, no encoder", start="bag_of_words", finetuned=False),
    "permuted_words": TextRow("word vectors exchanged", start="permuted_words", finetuned=False),
    "shuffled_texts": TextRow("texts exchanged between items", texts="shuffled", finetuned=False),
    "random_encoder": TextRow("no pretraining", start="random", finetuned=False),
    "language_model": TextRow("no pretraining on histories", start="backbone", finetuned=False),
    "two_stage": TextRow("reference"),
    "two_stage_faithful": TextRow("the published code's habits", settings=FAITHFUL),
    "no_two_stage": TextRow("items of the pretrained model, frozen", settings={"stages": (2,)}),
    "no_two_stage_frozen_words": TextRow(
        "items of the pretrained model and word table, frozen", settings={"stages": (2,), "freeze": ("word_table",)}
    ),
    "stage_one_alone": TextRow("no second stage", settings={"stages": (1,)}),
    "frozen_words": TextRow("word table frozen", settings={"freeze": ("word_table",)}),
    "no_item_positions_and_types": TextRow("two tables switched off", settings={"switched_off": TABLES}),
    "no_pretraining": TextRow("random weights", start="random"),
    "language_model_two_stage": TextRow("no pretraining on histories", start="backbone"),
}


def run_text_rows(
    rows: Sequence[str], texts: TextSet, start: RecFormer, *, seed: int, run_dir: Path, device: str = "cpu",
    devices: int = 1, overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skipped: Mapping[str, str] | None = None, progress: bool = False, backbone: RecFormer | None = None,
) -> list[RowResult]:  # fmt: skip
    """Run the named rows of `TEXT_ROWS` on one set, one pretrained encoder and one seed; finished ones are read back.

    `overrides` maps a row, or "all", to settings of `TwoStageConfig`; `skipped` maps a row that is not to be run to the
    reason. `backbone` is the language model as it was before pretraining, which the rows `language_model*` start from.
    A row that breaks becomes a result with its reason. Raises `InputError` for an unknown row or setting, and for a row
    that lacks its backbone.
    """
    overrides, skipped = overrides or {}, skipped or {}
    for row in [*rows, *(set(overrides) - {"all"}), *skipped]:
        if row not in TEXT_ROWS or row not in rows:
            raise InputError(f"row {row!r} is unknown{closest(row, rows)}; expected one of {sorted(TEXT_ROWS)}")
        if TEXT_ROWS[row].start == "backbone" and backbone is None and row not in skipped:
            raise InputError(f"row {row!r} needs backbone=..., the language model as it was before pretraining")
    plans = {row: _config(row, overrides) for row in rows}
    digests, results = {id(each): weights_digest(each) for each in (start, backbone) if each is not None}, []
    for row, training in plans.items():
        preset = TEXT_ROWS[row]
        model = backbone if preset.start == "backbone" and backbone is not None else start
        settings = {"start": preset.start, "texts": preset.texts, "encoder": asdict(model.config)}
        parameters = json.loads(json.dumps(settings | (asdict(training) if training else {})))
        if row in skipped:
            results.append(RowResult(row, preset.changed, parameters, "not_attempted", skipped[row]))
            continue
        key = {"seed": seed, "weights": digests[id(model)]} | texts.identity
        folder = Path(run_dir) / "rows" / row
        run = partial(_ranked, row, training, texts, model, seed, folder, device, devices, progress)
        stages = ("stage1", "stage2")
        results.append(cached_row(row, preset.changed, parameters, key, folder, _CODE, run, parts=stages))
    return results


def _config(row: str, overrides: Mapping) -> TwoStageConfig | None:
    settings, known = dict(TEXT_ROWS[row].settings), {each.name for each in fields(TwoStageConfig)}
    for group in ("all", row):
        for name, value in overrides.get(group, {}).items():
            if name not in known:
                hint = closest(name, known)
                raise InputError(f"overrides[{group!r}] sets {name!r}, which row {row!r} does not have{hint}")
            settings[name] = tuple(value) if isinstance(value, list) else value
    try:
        return TwoStageConfig(**settings) if TEXT_ROWS[row].finetuned else None
    except (ValueError, TypeError) as error:
        raise InputError(f"row {row!r}: {error}") from error


def _ranked(row, training, texts: TextSet, start: RecFormer, seed, folder, device, devices, progress):
    """Return the test ranks, the curve, and what other processes and earlier runs spent on it: tokens, seconds."""
    preset = TEXT_ROWS[row]
    if preset.texts == "shuffled":
        attributes = shuffled_texts(item_attributes(texts.prepared.catalogue), seed)
        texts = TextSet.of(texts.prepared, texts.tokenizer, attributes=attributes, faithful=texts.faithful)
    if preset.start == "random":
        seed_everything(seed)
    make: dict[str, Callable] = {
        "permuted_words": lambda: with_permuted_words(start, seed), "random": lambda: RecFormer(start.config),
        "bag_of_words": lambda: BagOfWords(start),
    }  # fmt: skip
    model = make.get(preset.start, lambda: start)()
    if training is None:
        return text_ranks(model.to(device), texts, "test"), [], (0, 0.0)
    if devices > 1:
        found = two_stage_in_processes(model, texts, training, seed=seed, folder=folder, device=device, devices=devices)
        found.model.to(device)
    else:
        found = two_stage(model, texts, training, seed=seed, folder=folder, device=device, progress=progress)
    ranks = text_ranks(found.model, texts, "test", items_ID=found.items_ID.to(device))
    return ranks, found.curve, (found.tokens, found.cpu_s - found.here_cpu_s)
