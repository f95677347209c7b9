"""kill -9 at twenty random moments of `textrec run 01`: what ends in the record is what an undisturbed run writes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import psutil
import pytest

from textrec.paths import ROOT

RUNS, KILLS = 4, 5  # one and the same run is killed five times before it may end
SMALL = ("rows=[last_item]", "max_epochs=3", "known_datasets=[synthetic]",
         "overrides={all: {batch_size: 32, max_sequence_length: 8, embedding_dim: 8}}")  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A copy of the project: its runs and figures are nobody else's."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("textrec", "notebooks", "papermill_runs/parameters"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def start(project: Path, output: int = subprocess.DEVNULL) -> subprocess.Popen:
    """Start `textrec run 01` in the copy, on one core; what is finished runs again, but for its rows."""
    command = [sys.executable, "-m", "textrec.cli", "run", "01", "--force", "--set", *SMALL]
    environment = os.environ | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=project, env=environment, stdout=output, stderr=output, text=True)


def finish(project: Path) -> float:
    """Run to the end and return the seconds."""
    started = time.perf_counter()
    process = start(project, subprocess.PIPE)
    said = process.communicate()
    assert process.returncode == 0, said
    return time.perf_counter() - started


def kill(process: subprocess.Popen, with_kernel: bool) -> None:
    """Kill the command alone, whose kernel then notices by itself, or its kernel, too, as a power cut would."""
    victims = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for victim in victims if with_kernel else victims[:1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    process.wait()


def result(project: Path) -> tuple[dict, pandas.DataFrame]:
    """Return what a run found: the record without times, costs and commit, and the ranks of its rows."""
    folder = project / "papermill_runs" / "smoke" / "01" / "seed0"
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    for key in ("environment", "commit", "dirty", "deviations"):
        del record[key]
    for row in record["rows"]:
        del row["cost"]
    paths = sorted(folder.rglob("ranks.parquet"))
    return record, pandas.concat([pandas.read_parquet(path) for path in paths], keys=[path.parent for path in paths])


@pytest.mark.slow
@pytest.mark.notebook
def test_twenty_kills_change_nothing(project):
    whole_s = finish(project)
    wanted, wanted_ranks = result(project)
    assert [row["row"] for row in wanted["rows"]] == ["sasrec_ce", "last_item"] and len(wanted_ranks)
    moments = random.Random(0)
    for _ in range(RUNS):
        for place in ("papermill_runs/smoke", "figures", "data"):
            shutil.rmtree(project / place, ignore_errors=True)
        for attempt in range(KILLS):
            process = start(project)
            time.sleep(moments.uniform(0.0, 0.9 * whole_s))
            kill(process, with_kernel=attempt % 2 == 0)
        finish(project)
        found, found_ranks = result(project)
        assert found == wanted
        pandas.testing.assert_frame_equal(found_ranks, wanted_ranks, check_exact=True)
        assert not list(project.rglob("*.partial-*"))
