"""Two processes train what one trains: same histories, same gradient, same validation value."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.launch import _failure, fit_in_processes, launch, main, processes
from textrec.training.module import TrainingConfig
from textrec.training.trainer import fit

CONFIG = SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16, dropout=0.0, attention_dropout=0.0)
TRAINING = TrainingConfig(batch_size=16, learning_rate=1e-2, max_epochs=2, patience=6)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_equal_one(ring, tmp_path, monkeypatch):
    """With sampled negatives, which both processes have to draw alike; `test_strategies.py` does without."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = replace(TRAINING, loss="sampled_softmax", num_negatives=6)
    seed_everything(0)
    single = fit(SASRec(CONFIG), ring, training, seed=0, folder=tmp_path / "one")
    (tmp_path / "two").mkdir()
    double = fit_in_processes(
        "SASRec", CONFIG, training, ring, seed=0, folder=tmp_path / "two", device="cpu", devices=2
    )
    for one, two in zip(single.curve, double.curve, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        assert two["ndcg@10"] == pytest.approx(one["ndcg@10"], abs=1e-9)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        if name.endswith("key.bias"):
            continue  # its true gradient is zero: Adam makes full steps of rounding noise
        assert (weights[0][name] - weights[1][name]).abs().max() < 1e-5, name
    assert (weights[0]["item_table.weight"] - SASRec(CONFIG).item_table.weight).abs().max() > 1e-3  # it did train


def test_a_missing_description_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="expected the launch.json of a run"):
        main(tmp_path / "launch.json")


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, (0, 1, 1)),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_NNODES": "2"},
            (3, 2, 2),
        ),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, (5, 4, 2)),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2", "CROSS_RANK": "0"}, (1, 2, 2)),
    ],
    ids=["alone", "torchrun inside slurm", "slurm", "deepspeed"],
)
def test_launchers_tell_a_process_its_place(monkeypatch, environment, place):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "CROSS_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes() == place


@pytest.mark.distributed
@pytest.mark.slow
def test_the_error_of_a_process_ends_all_and_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with pytest.raises(RuntimeError, match="^process 1 of 2: ValueError: the cat is out; .*launch.log$"):
        launch("training.distributed_script:fail", {"message": "the cat is out\nof the bag"}, tmp_path, 2)


@pytest.mark.parametrize(
    ("log", "error", "kind", "sentence"),
    [
        ("exitcode  : -15 (pid: 1)\nexitcode  : -9 (pid: 2)", "RuntimeError", RuntimeError, "^one of 2 .* signal 9; "),
        ("", "InputError", InputError, "^lost.csv is missing$"),
        ("exitcode  : -15 (pid: 1)", "OutOfMemoryError", MemoryError, "^process 1 of 2: OutOfMemoryError: lost.csv is"),
        ("exitcode  : 1 (pid: 1)", None, RuntimeError, "^2 processes ended with status 1; .*launch.log$"),
    ],
)
def test_what_failed_first_is_told(tmp_path, log, error, kind, sentence):
    (tmp_path / "launch.log").write_text(log)
    if error:
        told = {"rank": 1, "kind": error, "message": "lost.csv is missing"}
        (tmp_path / "error.json").write_text(json.dumps(told))
    raised = _failure(tmp_path, 2, 1)
    assert type(raised) is kind and re.search(sentence, str(raised))


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_end_with_the_one_that_launched_them(tmp_path):
    code = "import sys; from textrec.training.launch import launch; " \
           "launch('training.distributed_script:wait', {'folder': sys.argv[1]}, sys.argv[1], 2)"  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    launcher = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    pids = [tmp_path / "pid0", tmp_path / "pid1"]
    within(300, lambda: all(path.is_file() and path.read_text() for path in pids))
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    within(60, lambda: not any(is_running(int(path.read_text())) for path in pids))


def within(seconds: float, condition) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
