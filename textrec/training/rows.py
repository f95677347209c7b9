"""The rows of a table: each is trained, evaluated once on the test targets, cached in the run folder and resumed there.

`run_dir/rows/<row>/` holds `row.json` (written last, so its presence means the row is finished), `ranks.parquet`,
`model/`, `last.ckpt` and the logs. A cached row is reused only for the same parameters, data, seed and code.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from textrec.data.choices import closest, configured
from textrec.data.files import write_text
from textrec.data.prepared import PreparedSet
from textrec.evaluation.ranking import Ranks
from textrec.paths import ROOT
from textrec.provenance import code_hash, commit_state
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.cost import Meter
from textrec.training.module import TrainingConfig
from textrec.training.presets import CONTROLS, PRESETS

LOGGER = logging.getLogger(__name__)
_SHARED_CODE = ("data/histories.py", "evaluation/metrics.py", "evaluation/ranking.py", "seeding.py")
_CONTROL_CODE = ("evaluation/controls.py", "training/controls.py")
_MODEL_CODE = ("models/mixture_of_logits.py", "models/sequence_model.py") + tuple(
    f"training/{name}.py" for name in ("batches", "losses", "module", "optimizers", "strategies", "trainer")
)


@dataclass(frozen=True)
class RowResult:
    """One row: what was run, the per-user test ranks, the validation curve and the cost."""

    row: str
    changed: str
    parameters: dict[str, Any]
    status: str  # ok | failed | out_of_memory | not_attempted
    reason: str | None
    ranks: Ranks | None = None
    curve: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)
    commit: str = ""


def run_rows(
    rows: Sequence[str], prepared: PreparedSet, *, seed: int, run_dir: Path, device: str = "cpu", devices: int = 1,
    overrides: Mapping[str, Mapping[str, Any]] | None = None, skipped: Mapping[str, str] | None = None,
    progress: bool = False,
) -> list[RowResult]:  # fmt: skip
    """Run the named rows on one data set and seed; finished ones are read back, interrupted ones resume.

    `overrides` maps a row, or "all", to settings of its model or training configuration; `skipped` maps a row that is
    not to be run to the reason, which becomes its result. A row that breaks becomes a result with its reason, too, and
    is tried again next time. Raises `InputError` for an unknown row or setting.
    """
    overrides, skipped = overrides or {}, skipped or {}
    for name, given in (("overrides", overrides), ("skipped", skipped)):
        for row in set(given) - {*rows, "all"}:
            raise InputError(f"{name} names the row {row!r}, which is not among the rows {list(rows)}")
    plans = [_plan(row, prepared, overrides) for row in rows]
    place = prepared, seed, Path(run_dir) / "rows", device, devices, progress
    return [_skipped(*plan, skipped[plan[0]]) if plan[0] in skipped else _run_row(*plan, *place) for plan in plans]


def _plan(row: str, prepared: PreparedSet, overrides: Mapping) -> tuple[str, Any, TrainingConfig | None]:
    """Resolve a row's preset and overrides to complete configurations."""
    if row not in PRESETS:
        raise InputError(f"row {row!r} is unknown{closest(row, PRESETS)}; expected one of {sorted(PRESETS)}")
    preset = PRESETS[row]
    if preset.model in CONTROLS:
        return row, None, None
    model_settings = {**preset.model_settings, "num_items": prepared.num_items}
    config_class = model_class(preset.model).config_class
    return row, *configurations(row, config_class, model_settings, preset.training_settings, overrides)


def configurations(
    row: str, config_class: type, model_settings: Mapping, training_settings: Mapping, overrides: Mapping,
    groups: Sequence[str] = ("all",),
) -> tuple[Any, TrainingConfig]:  # fmt: skip
    """Return the configurations of a model and its training, with the overrides of `groups` and then of the row."""
    model_names, training_names = ({f.name for f in fields(c)} for c in (config_class, TrainingConfig))
    model_settings, training_settings = dict(model_settings), dict(training_settings)
    for group in (*groups, row):
        for name, value in overrides.get(group, {}).items():
            if name not in model_names | training_names:
                hint = closest(name, model_names | training_names)
                raise InputError(f"overrides[{group!r}] sets {name!r}, which row {row!r} does not have{hint}")
            settings = model_settings if name in model_names else training_settings
            settings[name] = value
    kinds = (config_class, model_settings), (TrainingConfig, training_settings)
    model, training = (configured(kind, settings, f"setting of row {row!r}") for kind, settings in kinds)
    return model, training


def _skipped(row, config, training, reason: str) -> RowResult:
    preset = PRESETS[row]
    return RowResult(row, preset.changed, _parameters(preset.model, config, training), "not_attempted", reason)


def _parameters(model: str, config, training) -> dict[str, Any]:
    """Return every setting, defaults included, as a record holds it."""
    settings = asdict(config) | asdict(training) if config else {}
    return json.loads(json.dumps({"model": model} | settings))


def _run_row(row, config, training, prepared, seed, folder, device, devices, progress) -> RowResult:
    model = PRESETS[row].model

    def run():
        seed_everything(seed)
        if config is None:
            from textrec.training.controls import evaluate_control

            return evaluate_control(model, prepared, seed), [], (0, 0.0)
        place = folder / row, device, devices, progress
        ranks, fitted = _train_and_evaluate(model, config, training, prepared, seed, *place)
        return ranks, fitted.curve, (fitted.tokens, fitted.cpu_s - fitted.here_cpu_s, fitted.peaks)

    what = row, PRESETS[row].changed, _parameters(model, config, training)
    key = {"fingerprint": prepared.fingerprint, "seed": seed}
    return cached_row(*what, key, folder / row, code_files(model), run)


def cached_row(
    row: str, changed: str, parameters: dict[str, Any], key: dict[str, Any], folder: Path, code: Sequence[Path],
    run: Callable[[], tuple[Ranks, list[dict], tuple]], parts: Sequence[str] = (),
) -> RowResult:  # fmt: skip
    """Read the row back from `folder` if it was finished with this key and code, else run it and store it there.

    `run` gives the test ranks, the curve, and what other processes and earlier runs spent on it, as `Meter.read` takes
    it. It resumes what checkpoints in `folder` and its `parts` hold; those of another key or code are removed first.
    """
    key = {"row": row, "parameters": parameters, **key, "code": code_hash(code)}
    finished = folder / "row.json"
    if finished.is_file():
        stored = json.loads(finished.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return RowResult(**stored["result"], ranks=Ranks.load(folder / "ranks.parquet"))
    for place in (folder, *(folder / part for part in parts)):
        place.mkdir(parents=True, exist_ok=True)
        forget_other_runs(place, key)
    commit, dirty = commit_state(code)
    meter = Meter()
    try:
        ranks, curve, spent = run()
    except InputError:
        raise
    except Exception as error:  # a broken row is a row of the table; the traceback goes to the log
        LOGGER.exception("row %s failed", row)
        status = "out_of_memory" if isinstance(error, MemoryError) or "out of memory" in str(error) else "failed"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return RowResult(row, changed, parameters, status, reason, cost=meter.read(), commit=commit)
    cost = meter.read(*spent)
    if curve:  # epochs of an interrupted run count, too
        cost["wall_s"] = round(max(cost["wall_s"], sum(entry["seconds"] for entry in curve)), 2)
    result = {"row": row, "changed": changed, "parameters": parameters, "status": "ok", "reason": None,
              "curve": curve, "cost": cost, "commit": commit + ("-dirty" if dirty else "")}  # fmt: skip
    ranks.save(folder / "ranks.parquet")
    write_text(finished, json.dumps({"key": key, "result": result}, indent=1))
    return RowResult(**result, ranks=ranks)


def _train_and_evaluate(model_name, config, training, prepared, seed, folder, device, devices, progress):
    if devices > 1:
        from textrec.training.launch import fit_in_processes

        fitted = fit_in_processes(
            model_name, config, training, prepared, seed=seed, folder=folder, device=device, devices=devices
        )
    else:
        from textrec.training.trainer import fit

        model = model_class(model_name)(config)
        fitted = fit(model, prepared, training, seed=seed, folder=folder, device=device, progress=progress)
    from textrec.training.trainer import evaluate

    return evaluate(fitted.model, prepared, "test"), fitted


def model_class(name: str) -> type:
    """Return the sequence model of that class name."""
    from textrec.models.item_table import MODELS

    return MODELS[name]


def code_files(model: str) -> list[Path]:
    own = _CONTROL_CODE if model in CONTROLS else (f"models/{model.lower()}.py", *_MODEL_CODE)
    return [ROOT / "textrec" / name for name in _SHARED_CODE + own]


def forget_other_runs(folder: Path, key: dict) -> None:
    """Remove checkpoint and results of other code, parameters, data or seed: going on from them would mix two runs."""
    marker = folder / "started.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) != key:
        for stale in (folder / "last.ckpt", folder / "row.json", folder / "ranks.parquet"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
    write_text(marker, json.dumps(key, indent=1))
