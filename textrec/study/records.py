"""record.json: what one execution of a notebook measured, on which data, with which code, at which cost.

One record per notebook, variant (mostly a data set) and seed. Everything that tables, verdicts and the report say is
read from records; a run that failed or ran out of memory is a record, too. Timings stand under `cost` and `environment`
only, so that the rest of two records of the same run is equal to the bit.
"""

import importlib.metadata
import json
import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np

from textrec.data.audit import Audit
from textrec.data.files import write_text
from textrec.data.prepared import PreparedSet
from textrec.data.splitting import training_counts
from textrec.paths import ROOT, RUNS
from textrec.provenance import commit_state
from textrec.schema import InputError
from textrec.study.parameters import SCALES

STATUSES = ("ok", "failed", "out_of_memory", "not_attempted")
METRIC = re.compile(r"(recall|ndcg|coverage|novelty|popularity_lift)@[1-9]\d*|mrr|auc")
STATISTICS = {"users", "items", "interactions", "mean_length", "median_length", "density", "tied_share", "target_churn"}
ROW_KEYS = ("row", "changed", "parameters", "metrics", "slices", "cost")
SOURCES = ("textrec", "notebooks", "papermill_runs/parameters", "pyproject.toml", "constraints.txt")
PACKAGES = ("numpy", "torch", "lightning", "transformers", "pandas", "duckdb", "pyarrow", "papermill")
RARE, POPULAR = 5, 50  # training occurrences: a rare item has at most 5, a popular one more than 50
MAIN_KS, SLICE_KS = (1, 5, 10, 20, 50, 100, 200), (10,)
SAMPLED = 100  # uniform negatives of the sampled ranking that older papers report


def source_state() -> tuple[str, bool]:
    """Return the commit and whether what decides a result differs from it."""
    return commit_state(ROOT / name for name in SOURCES)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The common block of a notebook, checked; remembers the commit that was checked out when the run began."""

    scale: str
    dataset: str
    seed: int
    device: str
    run_dir: str  # <anything>/<NN>[-variant]/seed<k>, absolute or from the project's root
    state: tuple[str, bool] = field(default_factory=source_state, repr=False)

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise InputError(f"scale is {self.scale!r}; expected one of {', '.join(SCALES)}")
        if not re.fullmatch(rf".*[/\\]?\d\d(-[\w.-]+)?[/\\]seed{self.seed}", self.run_dir):
            raise InputError(f"run_dir is {self.run_dir}; expected it to end in <NN>[-variant]/seed{self.seed}")
        if self.state[1] and self.scale != "smoke":  # numbers that may be published, from code nobody can look up
            raise InputError(f"scale {self.scale} runs committed code only, so that its record can name it: in a git "
                             f"checkout, commit or revert the changes in {', '.join(SOURCES)}")  # fmt: skip

    @property
    def folder(self) -> Path:
        return ROOT / self.run_dir

    @property
    def label(self) -> str:
        return self.folder.parent.name

    @property
    def notebook(self) -> str:
        return self.label[:2]

    @property
    def variant(self) -> str | None:
        return self.label[3:] or None


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of one record.json; the fields are its keys, in this order."""

    schema: int = 1
    notebook: str
    variant: str | None
    scale: str
    seed: int
    status: str
    reason: str | None = None
    dataset: dict
    protocol: dict
    rows: list[dict]
    claims: list[dict]
    environment: dict
    commit: str
    dirty: bool
    deviations: list[str]

    @classmethod
    def of(cls, run: Run, **content) -> "Record":
        """Return the record of a run with this content."""
        commit, dirty = run.state
        return cls(notebook=run.notebook, variant=run.variant, scale=run.scale, seed=run.seed, commit=commit,
                   dirty=dirty, **content)  # fmt: skip

    @property
    def label(self) -> str:
        """The name of the run folder: `01` or `01-ml-1m-w1`."""
        return f"{self.notebook}-{self.variant}" if self.variant else self.notebook

    @property
    def folder(self) -> Path:
        return RUNS / self.scale / self.label / f"seed{self.seed}"

    def write(self, path: Path) -> None:
        """Check the record and write it atomically."""
        plain = _plain(asdict(self), path.name)
        _check(plain, path)
        write_text(path, json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Record":
        """Read and check a record.json."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is no readable record: {error}") from None
        _check(values, path)
        return cls(**values)


def _check(values: dict, path: Path) -> None:
    keys = tuple(Record.__dataclass_fields__)
    if not isinstance(values, dict) or tuple(values) != keys:
        raise InputError(f"{path}: the keys of a record are {', '.join(keys)}, in this order")
    _plain(values, path.name)
    for key, allowed in (("schema", (1,)), ("scale", SCALES), ("status", STATUSES)):
        if values[key] not in allowed:
            raise InputError(f"{path}: {key} is {values[key]!r}; expected one of {', '.join(map(str, allowed))}")
    if (values["status"] == "ok") != (values["reason"] is None):
        raise InputError(f"{path}: status is {values['status']} and reason {values['reason']!r}; all but ok need one")
    if values["dirty"] and values["scale"] != "smoke":
        raise InputError(f"{path}: scale {values['scale']} was run from uncommitted code")
    names = [row.get("row") for row in values["rows"]]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: the rows {', '.join(map(str, names))} are not all different")
    for row in values["rows"]:
        if tuple(row)[: len(ROW_KEYS)] != ROW_KEYS:
            raise InputError(f"{path}: row {row.get('row')} has the keys {', '.join(row)}, not {', '.join(ROW_KEYS)}")
        for name, numbers in chain(row["metrics"].items(), *(part.items() for part in row["slices"].values())):
            if not (METRIC.fullmatch(name) or name in STATISTICS):
                raise InputError(f"{path}: row {row['row']} has the unknown metric {name}")
            if tuple(numbers) != ("value", "low", "high"):
                raise InputError(f"{path}: row {row['row']}: {name} is {numbers}; expected value, low, high")


def _plain(value: object, where: str) -> object:
    """Return `value` in JSON's own types; raise where a number is not finite."""
    if isinstance(value, dict):
        return {str(key): _plain(part, f"{where}: {key}") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{where}[{place}]") for place, part in enumerate(value)]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}; a record holds finite numbers only")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def load_records(scale: str, notebook: str | None = None, variant: str | None = None) -> list[Record]:
    """Return the records of a scale, or of one notebook, or of one of its variants, seeds in order."""
    label = f"{notebook}-{variant}" if variant else f"{notebook or ''}*"
    records = [Record.read(path) for path in (RUNS / scale).glob(f"{label}/seed*/record.json")]
    return sorted(records, key=lambda record: (record.label, record.seed))


def num_cores() -> int:
    """Return the cores that this process may use; not every system tells more than how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: str) -> dict:
    """Return versions, device and cores of this machine."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device.startswith("cuda"):
        import torch

        device = torch.cuda.get_device_name(device)
    return {"versions": versions, "device": device, "cores": num_cores()}


def protocol(prepared: PreparedSet) -> dict:
    """Return who is tested on what, and how the ranks behind `metrics` are counted."""
    choices = prepared.details["choices"]
    return {"split": choices["split"], "validation": choices["validation"], "ranking": "full", "seen": "filtered",
            "ties": "expected", "time_tie_rule": choices["time_tie_rule"]}  # fmt: skip


def write_record(
    run: Run, prepared: PreparedSet, rows: list[dict], claims: Iterable[dict] = (), deviations: Iterable[str] = ()
) -> Record:
    """Write `record.json` into the run folder and return it.

    The worst row that was tried gives the status; rows that were not are named among the deviations.
    """
    missing = [row for row in rows if row.get("status", "ok") != "ok"]
    skipped = [row for row in missing if row["status"] == "not_attempted"]
    tried = [row["status"] for row in missing if row not in skipped]
    record = Record.of(
        run,
        status=max(tried, key=("out_of_memory", "failed").index, default="ok"),
        reason="; ".join(f"{row['row']}: {row['reason']}" for row in missing) if tried else None,
        dataset={"name": prepared.name, "fingerprint": prepared.fingerprint},
        protocol=protocol(prepared),
        rows=rows,
        claims=list(claims),
        environment=environment(run.device),
        deviations=[*deviations, *(f"{row['row']} was not attempted: {row['reason']}" for row in skipped)],
    )
    record.write(run.folder / "record.json")
    return record


def measured_row(result, prepared: PreparedSet) -> dict:
    """Return the record's row of a `RowResult`: metrics with 95 % intervals over users, overall and by slice.

    The slice `sampled_uniform_100` is what ranking against 100 sampled items is expected to give, from the full ranks.
    """
    from textrec.evaluation.conventions import expected_sampled_metrics

    row = {"row": result.row, "changed": result.changed, "parameters": result.parameters, "metrics": {}, "slices": {},
           "cost": result.cost}  # fmt: skip
    if result.status != "ok":
        return row | {"status": result.status, "reason": result.reason}
    row["metrics"] = intervals(result.ranks.filtered, MAIN_KS)
    row["slices"] = {"seen_kept": intervals(result.ranks.kept, MAIN_KS)}
    if result.ranks.filtered.candidates_U.min() > SAMPLED:
        sampled = expected_sampled_metrics(result.ranks.filtered, SAMPLED)
        row["slices"][f"sampled_uniform_{SAMPLED}"] = _with_intervals(sampled)
    for name, mask_U in slices(result.ranks, prepared).items():
        counts = result.ranks.filtered.subset(mask_U)
        row["slices"][name] = exact(users=len(counts.higher_U)) | intervals(counts, SLICE_KS)
    return row


def statistics_row(name: str, prepared: PreparedSet, findings: Audit) -> dict:
    """Return a data set as a row: sizes, lengths, density and, where times are known, ties and what they decide.

    The interval of `target_churn` is the range over the draws of the audit.
    """
    lengths_U, ties = prepared.histories.lengths_U, prepared.details["ties"]
    metrics = exact(**prepared.details["counts"], mean_length=lengths_U.mean(), median_length=np.median(lengths_U),
                    density=lengths_U.mean() / prepared.num_items)  # fmt: skip
    if ties and findings.draws:
        users, positions = prepared.split.targets("test")
        churn_R = (findings.redrawn["test"] != prepared.histories.at(users, positions)).mean(axis=1)
        metrics |= exact(tied_share=ties["interactions"])
        metrics["target_churn"] = {"value": churn_R.mean(), "low": churn_R.min(), "high": churn_R.max()}
    return {"row": name, "changed": f"data set {prepared.name}", "parameters": prepared.details["choices"],
            "metrics": metrics, "slices": {}, "cost": {}}  # fmt: skip


def exact(**numbers: float) -> dict:
    """Return counts and other exact statistics in the form of metrics: the interval is the value."""
    return {name: {"value": value, "low": value, "high": value} for name, value in numbers.items()}


def intervals(counts, ks: tuple[int, ...]) -> dict:
    """Return `{metric: {value, low, high}}` of a `Counts`: expected ties, 95 % bootstrap interval over users."""
    from textrec.evaluation.metrics import per_user_metrics

    return _with_intervals(per_user_metrics(counts, ks=ks))


def _with_intervals(per_user: dict[str, np.ndarray]) -> dict:
    from textrec.evaluation.significance import bootstrap_interval

    found = {name: (float(values_U.mean()), *bootstrap_interval(values_U[None])) for name, values_U in per_user.items()}
    return {name: dict(zip(("value", "low", "high"), numbers, strict=True)) for name, numbers in found.items()}


def slices(ranks, prepared: PreparedSet) -> dict[str, np.ndarray]:
    """Return masks over the ranked users by training count of the target and length of the history; none is empty.

    Short histories are those of at most the median length.
    """
    occurrences_U = training_counts(prepared.histories, prepared.split)[ranks.targets_U]
    lengths_U = prepared.split.test_target_U[ranks.users_U]
    short_U = lengths_U <= np.median(lengths_U)
    masks = {
        "cold_items": occurrences_U == 0,
        "rare_items": (occurrences_U > 0) & (occurrences_U <= RARE),
        "middle_items": (occurrences_U > RARE) & (occurrences_U <= POPULAR),
        "popular_items": occurrences_U > POPULAR,
        "short_histories": short_U,
        "long_histories": ~short_U,
    }
    return {name: mask_U for name, mask_U in masks.items() if mask_U.any()}
