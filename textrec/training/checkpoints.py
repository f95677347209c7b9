"""Checkpoints that are whole or absent, and that refuse to continue another run."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from textrec.data.files import replacing
from textrec.schema import InputError


class AtomicCheckpoints(TorchCheckpointIO):
    """Write to a temporary name, fsync, rename: a kill at any moment leaves the previous checkpoint or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any = None) -> None:
        with replacing(Path(path)) as partial:
            torch.save(checkpoint, partial)


def check_identity(found: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Raise `InputError` naming both sides where a checkpoint belongs to other data, another model or setting."""
    for key in expected:
        if found.get(key) != expected[key]:
            raise InputError(
                f"{path} was written for {key}={found.get(key)!r}, this run has {key}={expected[key]!r}: "
                "remove the checkpoint or restore the setting"
            )
