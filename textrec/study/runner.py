"""Execute notebooks headless: papermill plus strict parameters, a run folder, a record, and no work done twice.

A run is left out when a good record exists whose inputs (code without comments, parameters, fingerprints of the
data) are those of now. A run that failed or was killed leaves its finished rows and its checkpoints in the run
folder, and the next attempt goes on from there.
"""

import ast
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from textrec.data.files import NO_SPACE, naming_full_disk, remove_partials
from textrec.data.preparing import prepare
from textrec.data.storage import sha256_of
from textrec.paths import FIGURES, NOTEBOOKS, ROOT, RUNS
from textrec.provenance import code_hash
from textrec.schema import InputError
from textrec.study import parameters
from textrec.study.claims import load_claims
from textrec.study.records import Record, Run, load_records, num_cores, write_record

REPORT = "11"  # reads the records of all others: it runs last, once, always, and is no measurement itself
OUT_OF_MEMORY = re.compile(r"MemoryError|out of memory|can't allocate memory|bad_alloc", re.IGNORECASE)
UNITS = {"s": 1, "min": 60, "h": 3600}
LOOK_EVERY_S = 0.5
# runs in the kernel before the first cell: a handler of its own, as what a kernel prints ends up in the notebook
LOG_TO_FILE = """import logging
_handler = logging.FileHandler({path!r}, encoding="utf-8")
_handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
logging.getLogger("textrec").addHandler(_handler)
logging.getLogger("textrec").setLevel(logging.INFO)
logging.getLogger("textrec").propagate = False
del _handler, logging"""
ONE_AT_A_TIME = threading.Lock()  # partial folders are told apart by process, not by thread
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """What became of an execution; `status` is a record's status, or `skipped`."""

    label: str  # <NN>[-variant]
    seed: int
    status: str
    reason: str | None
    seconds: float


def run_notebook(
    number: str,
    *,
    scale: str = "smoke",
    variant: str | None = None,
    seed: int = 0,
    overrides: dict[str, object] | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Outcome:
    """Execute notebook `number` into its run folder and return what became of it.

    `progress` is called with a sentence for every cell and every line that the training logs; the notebook holds none
    of them. A mistake in the parameters, a dirty tree above the smoke scale and missing data raise `InputError` before
    anything runs; an error inside the notebook is an outcome and, on disk, a record with its reason.
    """
    run, values = _prepare_run(number, scale, variant, seed, overrides)
    inputs = _inputs(run, values) if number != REPORT else {}
    earlier = _record_of(run) if inputs and not force else None
    if earlier and (earlier.status, earlier.environment.get("inputs")) == ("ok", inputs):
        return Outcome(run.label, run.seed, "skipped", None, 0.0)
    started = time.perf_counter()
    tell = (lambda line: progress(f"{run.label} seed {run.seed}: {line}")) if progress else (lambda line: None)
    with naming_full_disk(run.folder, f"run {run.label} again; its finished rows are kept"):
        try:
            status, reason = _execute(parameters.notebook_path(number), values, run.folder, tell)
        finally:  # of this run and of killed ones before it
            remove_partials(run.folder)
            remove_partials(FIGURES / scale, f"{run.notebook}_*")
        seconds = time.perf_counter() - started
        if number != REPORT:
            record = _final_record(run, status, reason, {"inputs": inputs, "wall_s": round(seconds, 1)})
            status, reason = record.status, record.reason
        if NO_SPACE.search(reason or ""):  # met by the notebook, not by the runner
            raise OSError(reason)
    return Outcome(run.label, run.seed, status, reason, seconds)


def _prepare_run(number: str, scale: str, variant: str | None, seed: int, overrides: dict | None) -> tuple[Run, dict]:
    folder = RUNS / scale / (f"{number}-{variant}" if variant else number) / f"seed{seed}"
    run_dir = folder.relative_to(ROOT).as_posix() if folder.is_relative_to(ROOT) else folder.as_posix()
    common = {"scale": scale, "seed": seed, "run_dir": run_dir}
    if taken := common.keys() & (overrides or {}):
        raise InputError(f"{min(taken)} is no parameter to override: the scale and the seed of a run decide it")
    values = parameters.resolve_parameters(number, scale, variant, (overrides or {}) | common)
    return Run(**{name: values[name] for name in parameters.COMMON}), values


def _inputs(run: Run, values: dict[str, object]) -> dict:
    """Return what decides a record: digests of code, given weights, claims and parameters, fingerprints of the data."""
    cells = [ast.dump(ast.parse(source)) for source, _ in parameters.code_cells(parameters.notebook_path(run.notebook))]
    judged_by = [str(claim) for claim in load_claims().values() if claim.notebook == run.notebook]
    described = json.dumps([cells, judged_by, values], sort_keys=True)
    names = [run.dataset, *(name for key, value in values.items() if key.endswith("datasets") for name in value)]
    names += [values["held_out"]] if values.get("held_out") and not values.get("pretrained") else []
    folders = [ROOT / str(values[key]) for key in ("pretrained", "finetuned") if values.get(key)]
    with ONE_AT_A_TIME:
        fingerprints = {name: prepare(name).fingerprint for name in names}
    return {
        "package": code_hash((ROOT / "textrec").rglob("*.py")),
        "weights": [sha256_of(file) for folder in folders for file in sorted(folder.rglob("*.safetensors"))],
        "notebook": hashlib.sha256(described.encode()).hexdigest()[:16],
        "data": fingerprints,
    }


def _record_of(run: Run) -> Record | None:
    path = run.folder / "record.json"
    return Record.read(path) if path.is_file() else None


@contextlib.contextmanager
def following(path: Path, tell: Progress) -> Iterator[None]:
    """Empty a file, then hand every line that another process appends to it to `tell` until the block ends."""
    path.write_text("", encoding="utf-8")
    over = threading.Event()

    def follow() -> None:
        with path.open(encoding="utf-8", errors="replace") as file:
            while True:
                last_look = over.wait(LOOK_EVERY_S)
                for line in file:
                    tell(line.rstrip())
                if last_look:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _cell_teller(num_cells: int, tell: Progress) -> Callable:
    """Return a function that tells of every code cell before it runs: its number and the heading it stands under."""
    count, heading = itertools.count(1), ""

    def start(cell, cell_index: int) -> None:
        nonlocal heading
        if cell.cell_type == "markdown":
            headings = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
            heading = headings[-1] if headings else heading
        elif cell.cell_type == "code":
            tell(f"cell {next(count)} of {num_cells}" + (f", {heading}" if heading else ""))

    return start


def _execute(notebook: Path, values: dict[str, object], folder: Path, tell: Progress) -> tuple[str, str | None]:
    """Run the notebook in a fresh kernel; write `executed.ipynb` even where a cell raised; return status and reason."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    folder.mkdir(parents=True, exist_ok=True)
    log, status, reason = folder / "run.log", "ok", None
    num_cells = len(list(parameters.code_cells(notebook))) + 1  # papermill adds one
    partial = folder / f"executed.partial-{os.getpid()}.ipynb"  # papermill wants the suffix
    try:
        with following(log, tell):
            papermill.execute_notebook(
                notebook, partial, values, kernel_name="python3", cwd=ROOT, progress_bar=False, log_output=False,
                on_cell_start=_cell_teller(num_cells, tell),
                extra_arguments=[
                    "--IPKernelApp.log_level=ERROR",  # it warns of its own sockets at every start
                    f"--IPKernelApp.exec_lines={LOG_TO_FILE.format(path=str(log))}",
                ],
            )  # fmt: skip
    except PapermillExecutionError as error:
        reason = " ".join(f"{error.ename}: {error.evalue}".removeprefix("InputError: ").split())[:500]
        status = "out_of_memory" if OUT_OF_MEMORY.search(reason) else "failed"
    except DeadKernelError:
        status, reason = "failed", "the kernel died without a message, mostly because the system ran out of memory"
    if partial.exists():
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(folder / "executed.ipynb")
    return status, reason


def _final_record(run: Run, status: str, reason: str | None, told: dict) -> Record:
    """Complete the record that the notebook wrote with `told`; where it wrote none, write one that says why."""
    record = _record_of(run)
    if record is None or "inputs" in record.environment:  # the record of an earlier run
        if status == "ok":
            status, reason = "failed", "the notebook ended without writing a record"
        record = write_record(run, prepare(run.dataset), rows=[])
    ended = {"status": status, "reason": reason} if status != "ok" else {}
    record = dataclasses.replace(record, environment=record.environment | told, **ended)
    record.write(run.folder / "record.json")
    return record


def plan(scale: str, *, numbers: Sequence[str] | None = None, seeds: Sequence[int] = (0,)) -> list[Run]:
    """Return the executions of a study in order; a notebook with variants at this scale runs once for each.

    Parameters of all of them are checked here, so that a mistake in the last one does not cost the first ones.
    """
    numbers = numbers or [path.name[:2] for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
    return [
        _prepare_run(number, scale, variant, seed, None)[0]
        for number in numbers
        for variant in parameters.variants(number, scale) or [None]
        for seed in (seeds if number != REPORT else seeds[:1])
    ]


def run_study(
    scale: str = "smoke",
    *,
    numbers: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    jobs: int = 1,
    force: bool = False,
    tell: Callable[[Outcome], None] | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run the notebooks of a study, `jobs` at once, each in a kernel of its own with its share of the cores.

    `tell` is called with each outcome as it comes, `progress` as by `run_notebook`. The report notebook runs when all
    others have ended. A set that is not at hand makes its runs `not_attempted`; it does not stop the others.
    """
    runs = plan(scale, numbers=numbers, seeds=seeds)

    def attempt(run: Run) -> Outcome:
        chosen = {"scale": scale, "variant": run.variant, "seed": run.seed, "force": force, "progress": progress}
        try:
            outcome = run_notebook(run.notebook, **chosen)
        except InputError as error:
            outcome = Outcome(run.label, run.seed, "not_attempted", str(error), 0.0)
        if tell:
            tell(outcome)
        return outcome

    with _shared_cores(jobs), ThreadPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(attempt, [run for run in runs if run.notebook != REPORT]))
    return outcomes + [attempt(run) for run in runs if run.notebook == REPORT]


@contextlib.contextmanager
def _shared_cores(jobs: int) -> Iterator[None]:
    """Give each of several kernels its share of the cores: two processes with two threads each slow each other down."""
    before = dict(os.environ)
    if jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, num_cores() // jobs))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def estimate_seconds(run: Run) -> float | None:
    """Return what the dearest earlier execution of any seed took, else the time in the header of its parameter file."""
    records = load_records(run.scale, run.notebook, run.variant)
    took = [record.environment.get("wall_s", 0.0) for record in records if record.variant == run.variant]
    if took:
        return max(took)
    path = parameters.parameter_files(run.notebook, run.scale, run.variant)[-1]
    found = re.search(r"(\d+(?:\.\d+)?) ?(s|min|h)\b", parameters.read_header(path).get("time", ""))
    return float(found[1]) * UNITS[found[2]] if found else None
