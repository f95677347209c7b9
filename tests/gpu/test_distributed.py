"""Strategies on CUDA: each trains what plain training does, on one device, and over two where there are so many."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.conftest import write_ring
from training.distributed_script import CONFIG, TRAINING

from textrec.models.sasrec import SASRec
from textrec.seeding import seed_everything
from textrec.training.consolidation import consolidate
from textrec.training.launch import fit_in_processes
from textrec.training.trainer import fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STRATEGIES = ["ddp", "fsdp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3", "deepspeed_stage_3_offload"]


def plain(tmp_path: Path, **settings) -> tuple:
    prepared, training = write_ring(tmp_path / "ring"), replace(TRAINING, precision="32", **settings)
    seed_everything(0)
    fit(SASRec(CONFIG), prepared, training, seed=0, folder=tmp_path / "plain", device="cuda")
    return prepared, training, consolidate(tmp_path / "plain" / "last.ckpt")


def assert_equal(expected: dict, path: Path) -> None:
    for name, value in consolidate(path).items():
        if not name.endswith("key.bias"):  # its true gradient is zero: Adam makes full steps of rounding noise
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_device_equals_plain_training(tmp_path, name):
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    prepared, training, expected = plain(tmp_path)
    folder = tmp_path / name
    fit_in_processes(
        "SASRec", CONFIG, replace(training, strategy=name, accumulate=2), prepared, seed=0, folder=folder,
        device="cuda", devices=1,
    )  # fmt: skip
    assert_equal(expected, folder / "last.ckpt")


@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", STRATEGIES)
def test_all_devices_equal_one(tmp_path, name):
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    prepared, training, expected = plain(tmp_path)
    folder = tmp_path / name
    fit_in_processes(
        "SASRec", CONFIG, replace(training, strategy=name), prepared, seed=0, folder=folder, device="cuda", devices=2
    )
    assert_equal(expected, folder / "last.ckpt")


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", ["deepspeed_stage_2", "ddp"])
def test_mixed_precision_learns(tmp_path, name, precision):
    if name.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    prepared = write_ring(tmp_path / "ring")
    training = replace(TRAINING, strategy=name, precision=precision, learning_rate=1e-2, max_epochs=20, patience=20)
    fitted = fit_in_processes(
        "SASRec", CONFIG, training, prepared, seed=0, folder=tmp_path / "run", device="cuda", devices=1
    )
    assert max(entry["ndcg@10"] for entry in fitted.curve) > fitted.curve[0]["ndcg@10"] + 0.2
