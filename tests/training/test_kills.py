"""kill -9 at random moments of a training: the resumed run equals the uninterrupted one, and no half file stays."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, random, signal, sys, time
from pathlib import Path
from textrec.data.prepared import PreparedSet
from textrec.training.rows import run_rows
import textrec.training.trainer, textrec.models.bert4rec, tensorboard  # loaded once, before any fork

prepared, folder = PreparedSet.load(Path(sys.argv[1])), Path(sys.argv[2])
kills, whole_s = int(sys.argv[3]), float(sys.argv[4])
settings = {"all": {"max_epochs": 12, "patience": 12, "embedding_dim": 8, "max_sequence_length": 8, "batch_size": 8}}
moments = random.Random(0)
for attempt in range(kills + 1):
    child = os.fork()
    if not child:
        result = run_rows(["sasrec_ss"], prepared, seed=0, run_dir=folder, overrides=settings)[0]
        os._exit(0 if result.status == "ok" else 1)
    if attempt < kills:
        time.sleep(moments.uniform(0.0, whole_s))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
assert status == 0, status
"""


def run(prepared: Path, folder: Path, kills: int, whole_s: float = 1.0) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", SCRIPT, str(prepared), str(folder), str(kills), str(whole_s)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_twenty_kills_change_nothing(ring, tmp_path):
    run(ring.folder, tmp_path / "whole", kills=0)
    row = tmp_path / "whole" / "rows" / "sasrec_ss"
    whole_s = json.loads((row / "row.json").read_text())["result"]["cost"]["wall_s"]
    run(ring.folder, tmp_path / "killed", kills=20, whole_s=whole_s / 3)
    killed = tmp_path / "killed" / "rows" / "sasrec_ss"
    assert (killed / "model" / "model.safetensors").read_bytes() == (row / "model" / "model.safetensors").read_bytes()
    assert (killed / "ranks.parquet").read_bytes() == (row / "ranks.parquet").read_bytes()
    curves = [json.loads((folder / "row.json").read_text())["result"]["curve"] for folder in (row, killed)]
    for whole, resumed in zip(*curves, strict=True):
        assert {k: whole[k] for k in whole if k != "seconds"} == {k: resumed[k] for k in resumed if k != "seconds"}
    last = [folder / "last.ckpt" for folder in (row, killed)]
    assert all(path.is_file() for path in last)
