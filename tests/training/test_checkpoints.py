"""A checkpoint is whole or absent."""

import os

import pytest
import torch

from textrec.schema import InputError
from textrec.training.checkpoints import AtomicCheckpoints, check_identity


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpoints()
    writer.save_checkpoint({"step": 1}, str(path))

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"step": 2}, str(path))
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["last.ckpt"]


def test_another_runs_checkpoint_names_both_sides(tmp_path):
    check_identity({"seed": 1}, {"seed": 1}, tmp_path)
    with pytest.raises(InputError, match="written for seed=1, this run has seed=2"):
        check_identity({"seed": 1}, {"seed": 2}, tmp_path / "last.ckpt")
