"""Checkpoints that are whole or absent, and that refuse to continue another run."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from textrec.schema import InputError


class AtomicCheckpoints(TorchCheckpointIO):
    """Write to a temporary name, fsync, rename: a kill at any moment leaves the previous checkpoint or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small file that is whole or absent, whenever the process is killed."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def check_identity(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise `InputError` naming both sides where a checkpoint belongs to other data, another model or setting."""
    for key in expected:
        if found.get(key) != expected[key]:
            raise InputError(
                f"{path} was written for {key}={found.get(key)!r}, this run has {key}={expected[key]!r}: "
                "remove the checkpoint or restore the setting"
            )
