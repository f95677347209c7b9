"""Train one model in several processes: torchrun starts this module, never a notebook kernel.

The parent writes `launch.json` into the row's folder, starts `torch.distributed.run`, and reads the model and curve
that process 0 leaves behind. On several machines the same command is started by hand on each: see `command`.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textrec.data.prepared import PreparedSet
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.module import TrainingConfig
from textrec.training.trainer import Fit, fit


def command(spec: Path, devices: int) -> list[str]:
    """Return the command that trains what `spec` describes; nodes beyond one replace --standalone."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    return [*start, "-m", "textrec.training.launch", str(spec)]


def fit_in_processes(
    model_name: str, config: Any, training: TrainingConfig, prepared: PreparedSet, *, seed: int, folder: Path,
    device: str, devices: int,
) -> Fit:  # fmt: skip
    """Train in `devices` processes of this machine; raise RuntimeError with the end of their output if they fail."""
    from textrec.models.sequence_model import SequenceModel

    folder = Path(folder).resolve()
    spec = {"model": model_name, "config": asdict(config), "training": asdict(training), "seed": seed, "device": device,
            "prepared": str(prepared.folder.resolve()), "folder": str(folder)}  # fmt: skip
    path = folder / "launch.json"
    path.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // devices, 1))
    done = subprocess.run(
        command(path, devices), env=os.environ | {"OMP_NUM_THREADS": threads}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{devices} processes ended with status {done.returncode}: {done.stderr[-2000:]}")
    told = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
    return Fit(SequenceModel.from_pretrained(folder / "model"), told["curve"], told["tokens"])


def main(path: Path) -> None:
    """Train as one of the processes torchrun started; process 0 writes `fit.json` last."""
    from textrec.training.rows import model_class

    if not path.is_file():
        raise InputError(f"{path} does not exist: expected the launch.json of a run")
    spec = json.loads(path.read_text(encoding="utf-8"))
    cls = model_class(spec["model"])
    training = TrainingConfig(**spec["training"] | {"adam_betas": tuple(spec["training"]["adam_betas"])})
    seed_everything(spec["seed"])
    model = cls(cls.config_class(**spec["config"]))
    folder, world_size = Path(spec["folder"]), int(os.environ.get("WORLD_SIZE", "1"))
    fitted = fit(
        model, PreparedSet.load(Path(spec["prepared"])), training, seed=spec["seed"], folder=folder,
        device=spec["device"], devices=world_size,
    )  # fmt: skip
    if int(os.environ.get("RANK", "0")) == 0:
        partial = folder / f"fit.json.partial-{os.getpid()}"
        partial.write_text(json.dumps({"curve": fitted.curve, "tokens": fitted.tokens}), encoding="utf-8")
        os.replace(partial, folder / "fit.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
