"""The rows of RecFormer's tables: each changes one thing, is tested once, cached in the run folder and resumed there.

Laid out as by `rows.py`: `run_dir/rows/<row>/` with `row.json`, written last, `ranks.parquet` and the checkpoints.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from textrec.data.item_text import item_attributes, shuffled_texts
from textrec.evaluation.ranking import Ranks
from textrec.models.recformer import RecFormer
from textrec.paths import ROOT
from textrec.provenance import code_hash, commit_state
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.cost import Meter
from textrec.training.rows import LOGGER, RowResult, closest, forget_other_runs
from textrec.training.text_launch import two_stage_in_processes
from textrec.training.text_ranking import BagOfWords, TextSet, text_ranks, weights_digest, with_permuted_words
from textrec.training.two_stage import FAITHFUL, TwoStageConfig, two_stage

_CODE = [ROOT / "textrec" / name for name in (
    "data/histories.py", "data/tokenizing.py", "data/examples.py", "evaluation/ranking.py", "models/attention.py",
    "models/recformer.py", "seeding.py", "training/batches.py", "training/losses.py", "training/strategies.py",
    "training/text_batches.py", "training/text_ranking.py", "training/two_stage.py",
)]  # fmt: skip


@dataclass(frozen=True)
class TextRow:
    """What a row is, and the one thing in which it differs from `two_stage`, or from `zero_shot` where untrained."""

    changed: str
    start: str = "pretrained"  # pretrained | permuted_words | bag_of_words | random
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
}


def run_text_rows(
    rows: Sequence[str], texts: TextSet, start: RecFormer, *, seed: int, run_dir: Path, device: str = "cpu",
    devices: int = 1, overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skipped: Mapping[str, str] | None = None, progress: bool = False,
) -> list[RowResult]:  # fmt: skip
    """Run the named rows of `TEXT_ROWS` on one set, one pretrained encoder and one seed; finished ones are read back.

    `overrides` maps a row, or "all", to settings of `TwoStageConfig`; `skipped` maps a row that is not to be run to the
    reason. A row that breaks becomes a result with its reason. Raises `InputError` for an unknown row or setting.
    """
    overrides, skipped = overrides or {}, skipped or {}
    for row in [*rows, *(set(overrides) - {"all"}), *skipped]:
        if row not in TEXT_ROWS or row not in rows:
            raise InputError(f"row {row!r} is unknown{closest(row, rows)}; expected one of {sorted(TEXT_ROWS)}")
    plans = {row: _config(row, overrides) for row in rows}
    started, results = weights_digest(start), []
    for row, training in plans.items():
        settings = {"start": TEXT_ROWS[row].start, "texts": TEXT_ROWS[row].texts, "encoder": asdict(start.config)}
        parameters = json.loads(json.dumps(settings | (asdict(training) if training else {})))
        if row in skipped:
            results.append(_without_ranks(row, parameters, "not_attempted", skipped[row], {}, ""))
            continue
        key = {"row": row, "parameters": parameters, "seed": seed, "weights": started, "code": code_hash(_CODE)}
        folder = Path(run_dir) / "rows" / row
        results.append(_cached(
            row, parameters, key | texts.identity, folder,
            lambda row=row, training=training, folder=folder: _ranked(
                row, training, texts, start, seed, folder, device, devices, progress
            ),
        ))  # fmt: skip
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
        "pretrained": lambda: start, "permuted_words": lambda: with_permuted_words(start, seed),
        "random": lambda: RecFormer(start.config), "bag_of_words": lambda: BagOfWords(start),
    }  # fmt: skip
    model = make[preset.start]()
    if training is None:
        return text_ranks(model.to(device), texts, "test"), [], (0, 0.0)
    if devices > 1:
        found = two_stage_in_processes(model, texts, training, seed=seed, folder=folder, device=device, devices=devices)
        found.model.to(device)
    else:
        found = two_stage(model, texts, training, seed=seed, folder=folder, device=device, progress=progress)
    ranks = text_ranks(found.model, texts, "test", items_ID=found.items_ID.to(device))
    return ranks, found.curve, (found.tokens, found.cpu_s - found.here_cpu_s)


def _cached(row: str, parameters: dict, key: dict, folder: Path, run: Callable) -> RowResult:
    finished = folder / "row.json"
    if finished.is_file():
        stored = json.loads(finished.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return RowResult(**stored["result"], ranks=Ranks.load(folder / "ranks.parquet"))
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "stage1", folder / "stage2"):
        place.mkdir(exist_ok=True)
        forget_other_runs(place, key)
    commit, dirty = commit_state(_CODE)
    meter = Meter()
    try:
        ranks, curve, spent = run()
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a broken row is a row of the table
        LOGGER.exception("row %s failed", row)
        status = "out_of_memory" if isinstance(error, MemoryError) or "out of memory" in str(error) else "failed"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return _without_ranks(row, parameters, status, reason, meter.read(), commit)
    cost = meter.read(*spent)
    cost["wall_s"] = round(max(cost["wall_s"], sum(entry["seconds"] for entry in curve)), 2)
    result = {"row": row, "changed": TEXT_ROWS[row].changed, "parameters": parameters, "status": "ok", "reason": None,
              "curve": curve, "cost": cost, "commit": commit + ("-dirty" if dirty else "")}  # fmt: skip
    ranks.save(folder / "ranks.parquet")
    partial = folder / f"row.json.partial-{os.getpid()}"
    partial.write_text(json.dumps({"key": key, "result": result}, indent=1), encoding="utf-8")
    os.replace(partial, finished)
    return RowResult(**result, ranks=ranks)


def _without_ranks(row: str, parameters: dict, status: str, reason: str, cost: dict, commit: str) -> RowResult:
    return RowResult(row, TEXT_ROWS[row].changed, parameters, status, reason, None, [], cost, commit)
