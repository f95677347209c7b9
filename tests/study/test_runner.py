"""The runner on notebooks of three cells: what runs, what is left out, what a failure leaves behind."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.study import parameters, records, runner

PARAMETERS = """scale: str = "smoke"  # scale
dataset: str = "toy"  # data
seed: int = 0  # seed
device: str = "cpu"  # device
run_dir: str = "papermill_runs/smoke/01/seed0"  # where
mood: str = "good"  # good | bad | memory | silent | dead | full
"""
BODY = """
import logging, os, time
from pathlib import Path
from types import SimpleNamespace
from textrec.study.records import Run, exact, write_record

run = Run(scale=scale, dataset=dataset, seed=seed, device=device, run_dir=run_dir, state=("c0ffee", False))
with (run.folder / "starts.txt").open("a") as file:
    file.write("started\\n")
toy = SimpleNamespace(name=dataset, fingerprint="f1", details={"choices": dict.fromkeys(
    ("split", "validation", "time_tie_rule"), "given")})
logging.getLogger("textrec.training").info("sasrec_ce: epoch 0, train_loss 3.5, ndcg@10 0.1, seconds 2")
if mood == "full": Path("/dev/full").write_text("a model")
if mood == "bad": raise ValueError("the loss is not finite")
if mood == "memory": raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
if mood == "dead": os._exit(1)
row = {"row": "toy", "changed": "nothing", "parameters": {}, "metrics": exact(mrr=0.5), "slices": {}, "cost": {}}
if mood != "silent": write_record(run, toy, [row], deviations=[os.environ.get("OMP_NUM_THREADS", "")])
"""


def write_notebook(path, *sources):
    cells = [{"cell_type": "code", "id": f"cell-{k}", "metadata": {"tags": ["parameters"] if k == 0 else []},
              "source": textwrap.dedent(source), "outputs": [], "execution_count": None}
             for k, source in enumerate(sources)]  # fmt: skip
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A project of one notebook, with all that the runner asks of the outside replaced."""
    fingerprints, claims = {"toy": "f1"}, dict(runner.load_claims())
    monkeypatch.setattr(runner, "load_claims", lambda: claims)
    for module in (parameters, runner):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path / "notebooks")
    for module in (records, runner):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(runner, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(parameters, "PARAMETERS", tmp_path / "parameters")
    monkeypatch.setattr(runner, "prepare", lambda name: toy_set(name, fingerprints))
    monkeypatch.setattr(runner, "code_hash", lambda files: fingerprints.get("code", "same"))
    (tmp_path / "notebooks").mkdir()
    write_notebook(tmp_path / "notebooks" / "01_toy.ipynb", PARAMETERS, BODY)
    folder = tmp_path / "parameters" / "smoke"
    folder.mkdir(parents=True)
    (folder / "common.yaml").write_text("scale: smoke\n")
    (folder / "01.yaml").write_text("# time: 2 min on 2 cores\ndataset: toy\n")
    return SimpleNamespace(root=tmp_path, parameters=folder, fingerprints=fingerprints, claims=claims,
                           run_dir=tmp_path / "runs" / "smoke" / "01" / "seed0")  # fmt: skip


def toy_set(name, fingerprints):
    if name not in fingerprints:
        raise InputError(f"the files of {name} are missing")
    choices = dict.fromkeys(("split", "validation", "time_tie_rule"), "given")
    return SimpleNamespace(name=name, fingerprint=fingerprints[name], details={"choices": choices})


def starts(study):
    return len((study.run_dir / "starts.txt").read_text().split())


def test_a_run_is_recorded_once_and_again_only_when_something_changed(study):
    outcome = runner.run_notebook("01")
    assert (outcome.label, outcome.seed, outcome.status, outcome.reason) == ("01", 0, "ok", None)
    record = records.Record.read(study.run_dir / "record.json")
    assert record.rows[0]["metrics"]["mrr"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert record.environment["inputs"]["data"] == {"toy": "f1"} and record.environment["wall_s"] > 0
    executed = json.loads((study.run_dir / "executed.ipynb").read_text())
    assert executed["cells"][-1]["execution_count"] == 3, "parameters, injected parameters, body"
    assert not list(study.run_dir.glob("*partial*"))

    assert runner.run_notebook("01").status == "skipped"
    write_notebook(study.root / "notebooks" / "01_toy.ipynb", PARAMETERS, "# a remark\n" + BODY)
    assert runner.run_notebook("01").status == "skipped", "a comment changes no result"
    assert starts(study) == 1

    write_notebook(study.root / "notebooks" / "01_toy.ipynb", PARAMETERS, BODY + "\nx = 1\n")
    assert runner.run_notebook("01").status == "ok", "another cell"
    claim = next(claim for claim in runner.load_claims().values() if claim.notebook == "01")
    study.claims[claim.id] = dataclasses.replace(claim, value=0.5)
    assert runner.run_notebook("01").status == "ok", "another claim"
    study.fingerprints["toy"] = "f2"
    assert runner.run_notebook("01").status == "ok", "other data"
    study.fingerprints["code"] = "other"
    assert runner.run_notebook("01").status == "ok", "other code"
    assert runner.run_notebook("01", force=True).status == "ok"
    assert starts(study) == 6


def test_other_weights_in_a_given_folder_run_again(study):
    (study.root / "model").mkdir()
    write_notebook(
        study.root / "notebooks" / "01_toy.ipynb",
        PARAMETERS + f'\npretrained: str = "{study.root}/model"  # given',
        BODY,
    )
    for weights, status in ((b"a", "ok"), (b"a", "skipped"), (b"b", "ok")):
        (study.root / "model" / "model.safetensors").write_bytes(weights)
        assert runner.run_notebook("01").status == status


@pytest.mark.parametrize(
    ("mood", "status", "said"),
    [
        ("bad", "failed", "ValueError: the loss is not finite"),
        ("memory", "out_of_memory", "CUDA out of memory"),
        ("dead", "failed", "the kernel died"),
        ("silent", "failed", "without writing a record"),
    ],
)
def test_a_failure_is_a_record_with_its_reason_and_runs_again(study, mood, status, said):
    outcome = runner.run_notebook("01", overrides={"mood": mood})
    assert outcome.status == status and said in outcome.reason
    record = records.Record.read(study.run_dir / "record.json")
    assert record.status == status and said in record.reason and record.rows == []
    assert (study.run_dir / "executed.ipynb").is_file()
    assert runner.run_notebook("01").status == "ok" and starts(study) == 2


def test_the_record_of_an_earlier_run_does_not_vouch_for_a_later_one(study):
    assert runner.run_notebook("01").status == "ok"
    assert runner.run_notebook("01", overrides={"mood": "silent"}).status == "failed"


def test_cells_and_training_lines_are_told_and_the_notebook_holds_none_of_them(study):
    path = study.root / "notebooks" / "01_toy.ipynb"
    notebook = json.loads(path.read_text())
    heading = {"cell_type": "markdown", "id": "heading", "metadata": {}, "source": "Before.\n\n## Run\n\nIt runs."}
    path.write_text(json.dumps(notebook | {"cells": [notebook["cells"][0], heading, notebook["cells"][1]]}))
    said = []
    assert runner.run_notebook("01", progress=said.append).status == "ok"
    assert [line for line in said if ": cell" in line] == [
        "01 seed 0: cell 1 of 3", "01 seed 0: cell 2 of 3", "01 seed 0: cell 3 of 3, Run",
    ]  # fmt: skip
    (line,) = (line for line in said if "epoch" in line)
    assert re.fullmatch(r"01 seed 0: \d\d:\d\d:\d\d sasrec_ce: epoch 0, train_loss 3.5, ndcg@10 0.1, seconds 2", line)
    executed = json.loads((study.run_dir / "executed.ipynb").read_text())
    outputs = [cell["outputs"] for cell in executed["cells"] if cell["cell_type"] == "code"]
    assert outputs == [[], [], []]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("where", ["notebook", "record"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(study, monkeypatch, where):
    complete = runner._final_record

    def complete_on_a_full_disk(*told):
        (study.run_dir / f"record.json.partial-{os.getpid()}").symlink_to("/dev/full")
        return complete(*told)

    said = r"the disk of .*seed0 is full: free some space and run 01 again; its finished rows are kept$"
    with monkeypatch.context() as patched, pytest.raises(InputError, match=said):
        if where == "record":
            patched.setattr(runner, "_final_record", complete_on_a_full_disk)
        runner.run_notebook("01", overrides={"mood": "full" if where == "notebook" else "good"})
    assert not list(study.run_dir.glob("*partial*"))
    assert runner.run_notebook("01").status == "ok"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"overrides": {"moot": "good"}}, r"no parameter `moot` \(did you mean 'mood'"),
        ({"overrides": {"mood": 1}}, "expected str"),
        ({"overrides": {"seed": 1}}, "seed is no parameter to override"),
        ({"scale": "laptop"}, "common.yaml does not exist"),
        ({"variant": "books"}, "01-books.yaml does not exist"),
        ({"overrides": {"dataset": "moon"}}, "the files of moon are missing"),
    ],
)
def test_a_mistake_is_refused_before_anything_runs(study, arguments, said):
    with pytest.raises(InputError, match=said):
        runner.run_notebook("01", **arguments)
    assert not study.run_dir.exists()


def test_uncommitted_code_is_refused_above_the_smoke_scale(study, monkeypatch):
    (study.parameters.parent / "laptop").mkdir()
    for name in ("common.yaml", "01.yaml"):
        (study.parameters.parent / "laptop" / name).write_text("dataset: toy\n")
    monkeypatch.setattr(records, "commit_state", lambda files: ("c0ffee", True))
    with pytest.raises(InputError, match="scale laptop runs committed code only"):
        runner.run_notebook("01", scale="laptop")
    assert runner.run_notebook("01").status == "ok"


def test_a_study_runs_variants_and_seeds_and_goes_on_past_missing_data(study, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (study.parameters / "01-b.yaml").write_text("dataset: toy\n")
    (study.parameters / "01-moon.yaml").write_text("dataset: moon\n")
    (study.parameters / "11.yaml").write_text("dataset: toy\n")
    report = """
    from pathlib import Path
    found = len(list(Path(run_dir).parents[1].rglob("record.json")))
    Path(run_dir, "seen.txt").write_text(str(found))
    """
    write_notebook(study.root / "notebooks" / "11_report.ipynb", PARAMETERS, report)
    told = []
    outcomes = runner.run_study(seeds=(0, 1), jobs=2, tell=told.append)
    assert {(o.label, o.seed, o.status) for o in outcomes} == {
        ("01-b", 0, "ok"), ("01-b", 1, "ok"), ("01-moon", 0, "not_attempted"), ("01-moon", 1, "not_attempted"),
        ("11", 0, "ok"),
    }  # fmt: skip
    assert len(told) == 5 and told[-1].label == "11"
    assert (study.root / "runs/smoke/11/seed0/seen.txt").read_text() == "2", "the report saw every record"
    seeds = records.load_records("smoke", "01", "b")
    assert [record.seed for record in seeds] == [0, 1]
    share = str(max(1, records.num_cores() // 2))
    assert seeds[0].deviations == [share] and os.environ["OMP_NUM_THREADS"] == "7"


def test_a_mistake_in_the_last_parameter_file_stops_the_study_before_the_first_run(study):
    (study.parameters / "01-b.yaml").write_text("dataset: toy\n")
    (study.parameters / "01-z.yaml").write_text("seed: zero\n")
    with pytest.raises(InputError, match="01-z.yaml: seed"):
        runner.run_study()
    assert not (study.root / "runs").exists()


def test_the_estimate_is_the_header_and_then_what_it_took(study):
    (run,) = runner.plan("smoke")
    assert runner.estimate_seconds(run) == 120
    outcome = runner.run_notebook("01")
    assert runner.estimate_seconds(run) == round(outcome.seconds, 1)


KILLED = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from types import SimpleNamespace
import test_runner
from textrec.study import parameters, records, runner
root = Path({root!r})
for module in (parameters, runner): module.NOTEBOOKS = root / "notebooks"
for module in (records, runner): module.RUNS = root / "runs"
parameters.PARAMETERS = root / "parameters"
runner.prepare = lambda name: test_runner.toy_set(name, {{"toy": "f1"}})
runner.code_hash = lambda files: "same"
runner.run_notebook("01")
"""


def test_a_killed_run_leaves_no_record_and_the_next_one_is_equal(study):
    whole = runner.run_notebook("01")
    wanted = records.Record.read(study.run_dir / "record.json")
    (study.run_dir / "record.json").unlink()
    (study.run_dir / "starts.txt").unlink()
    wait = "first = len((run.folder / 'starts.txt').read_text().split()) == 1\ntime.sleep(60 * first)\n"
    slow = BODY.replace("row =", wait + "row =")
    write_notebook(study.root / "notebooks" / "01_toy.ipynb", PARAMETERS, slow)
    script = KILLED.format(here=str(Path(__file__).parent), root=str(study.root))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, start_new_session=True,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    while not (study.run_dir / "starts.txt").exists() and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (study.run_dir / "record.json").exists()
    assert runner.run_notebook("01").status == whole.status == "ok"
    found = records.Record.read(study.run_dir / "record.json")
    assert (found.rows, found.dataset, found.claims) == (wanted.rows, wanted.dataset, wanted.claims)
    assert not list(study.run_dir.glob("*partial*")), "nothing half written stays"
