"""Train in several processes, on one machine or many: torchrun starts this module, never a notebook kernel.

`launch` writes `launch.json` into a folder (a function and its arguments), starts `torch.distributed.run`, and returns
what the function returned in process 0. On several machines that share the folder `describe` writes the same file, and
any of these commands, given on every machine or by the scheduler, runs it; each tells the processes their place through
environment variables:

    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 -m textrec.training.launch F
    srun --nodes 2 --ntasks-per-node 8 python -m textrec.training.launch F
    deepspeed --hostfile HOSTS --no_ssh --node_rank R --master_addr HOST --module textrec.training.launch F
"""

import importlib
import json
import os
import re
import select
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from textrec.data.choices import configured
from textrec.data.files import write_text
from textrec.data.prepared import PreparedSet
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.cost import peak_memory
from textrec.training.module import TrainingConfig
from textrec.training.trainer import Fit, fit

LAUNCHED = "TEXTREC_LAUNCHED"  # set where standard input stays open for as long as somebody waits for the result


def command(spec: Path, devices: int) -> list[str]:
    """Return the command that runs what `spec` describes on this machine, at a port that is free."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={devices}"]
    return [*start, "-m", "textrec.training.launch", str(spec)]


def describe(target: str, arguments: dict[str, Any], folder: Path) -> Path:
    """Write `launch.json`: the function `module:name`, called with `arguments` (JSON) in every process."""
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in ("result.json", "error.json"):
        (folder / stale).unlink(missing_ok=True)
    path = folder / "launch.json"
    write_text(path, json.dumps({"target": target, "arguments": arguments}, indent=1))
    return path


def launch(target: str, arguments: dict[str, Any], folder: Path, devices: int) -> Any:
    """Run `module:name` in `devices` processes of this machine and return what it returned in process 0 (JSON).

    Their output goes to `launch.log`. An error in one of them ends all and is raised here in one sentence, as the
    `InputError` or MemoryError it was, else as RuntimeError; they end, too, when this process ends, however it does.
    """
    path = describe(target, arguments, folder)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max((os.cpu_count() or 1) // devices, 1))
    environment = os.environ | {"OMP_NUM_THREADS": threads, LAUNCHED: "1"}
    with path.with_name("launch.log").open("wb") as log:
        process = subprocess.Popen(
            command(path, devices), env=environment, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # interrupted: torchrun passes this on to the processes it started
                process.terminate()
                process.wait()
    if status:
        raise _failure(path.parent, devices, status)
    return json.loads(path.with_name("result.json").read_text(encoding="utf-8"))


def _failure(folder: Path, devices: int, status: int) -> Exception:
    """Say what went wrong in the first process that failed; the others only lost their partner."""
    log, told = folder / "launch.log", folder / "error.json"
    where = f"; the output of all is in {log}"
    killed = re.search(r"exitcode\s*:\s*-(?!15\b)(\d+)", log.read_text(encoding="utf-8", errors="replace"))
    if killed:  # torchrun ends the others by signal 15
        return RuntimeError(f"one of {devices} processes was killed by signal {killed[1]}{where}")
    if told.is_file():
        error = json.loads(told.read_text(encoding="utf-8"))
        if error["kind"] == "InputError":
            return InputError(error["message"])
        kind = MemoryError if error["kind"] in ("MemoryError", "OutOfMemoryError") else RuntimeError
        return kind(f"process {error['rank']} of {devices}: {error['kind']}: {error['message']}{where}")
    return RuntimeError(f"{devices} processes ended with status {status}{where}")


def processes() -> tuple[int, int, int]:
    """Return this process's rank, the processes on each machine and the machines, as its launcher set them."""
    env = os.environ
    rank = int(env.get("RANK", env.get("SLURM_PROCID", "0")))
    world_size = int(env.get("WORLD_SIZE", env.get("SLURM_NTASKS", "1")))
    machines = int(env.get("SLURM_NNODES", env.get("CROSS_SIZE", "1")))
    local = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world_size // machines)))
    return rank, local, world_size // local


def main(path: Path) -> None:
    """Be one of the processes; process 0 writes `result.json` last."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: expected the launch.json of a run")
    spec = json.loads(path.read_text(encoding="utf-8"))
    if "CROSS_RANK" in os.environ:
        os.environ.setdefault("NODE_RANK", os.environ["CROSS_RANK"])  # DeepSpeed's launcher, in Lightning's words
    if LAUNCHED in os.environ:
        threading.Thread(target=_end_with_parents, daemon=True).start()
    rank, _, _ = processes()
    module, name = spec["target"].split(":")
    try:
        result = getattr(importlib.import_module(module), name)(**spec["arguments"])
    except Exception as error:
        lines = str(error).splitlines() or [""]
        told = {"rank": rank, "kind": type(error).__name__, "message": lines[0]}
        _tell_once(path.with_name("error.json"), json.dumps(told))
        raise
    if rank == 0:
        write_text(path.with_name("result.json"), json.dumps(result))


def _tell_once(path: Path, text: str) -> None:
    """Keep the first process's words: those that fail after it complain of a lost connection."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    finally:
        partial.unlink()


def _end_with_parents() -> None:
    """End this process once torchrun or the process that called `launch` is gone, by whatever signal."""
    torchrun = os.getppid()
    while os.getppid() == torchrun and not select.select([0], [], [], 1.0)[0]:
        pass
    os._exit(1)


def fit_in_processes(
    model_name: str, config: Any, training: TrainingConfig, prepared: PreparedSet, *, seed: int, folder: Path,
    device: str, devices: int,
) -> Fit:  # fmt: skip
    """Train in `devices` processes of this machine what `fit` trains in this one."""
    from textrec.models.sequence_model import SequenceModel

    folder = Path(folder).resolve()
    arguments = {
        "model_name": model_name, "config": asdict(config), "training": asdict(training), "seed": seed,
        "device": device, "prepared": str(prepared.folder.resolve()), "folder": str(folder),
    }  # fmt: skip
    told = launch("textrec.training.launch:fit_here", arguments, folder, devices)
    return Fit(SequenceModel.from_pretrained(folder / "model"), **told)


def fit_here(
    model_name: str, config: dict, training: dict, seed: int, device: str, prepared: str, folder: str
) -> dict[str, Any]:
    """Train as one of the processes; return the curve and the cost."""
    from textrec.training.rows import model_class

    _, devices, num_nodes = processes()
    cls = model_class(model_name)
    seed_everything(seed)
    fitted = fit(
        cls(cls.config_class(**config)), PreparedSet.load(Path(prepared)),
        configured(TrainingConfig, training, "setting of training"), seed=seed, folder=Path(folder),
        device=device, devices=devices, num_nodes=num_nodes,
    )  # fmt: skip
    return {"curve": fitted.curve, "tokens": fitted.tokens, "cpu_s": fitted.cpu_s, "peaks": peak_memory()}


if __name__ == "__main__":
    main(Path(sys.argv[-1]))  # DeepSpeed's launcher puts --local_rank before it
