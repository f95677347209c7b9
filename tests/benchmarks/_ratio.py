"""Time contenders against each other on one machine: a process each, one at work at a time, round after round.

A contender is a script started as a worker, in the interpreter of its own environment. It loads and warms up first;
then every round asks each worker for one run, so that a machine whose speed drifts is unfair to nobody.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path


def serve(works: dict[str, Callable[[], dict]]) -> None:
    """Answer each name on standard input with one timed run of that work; libraries may print to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = _peak_mib(reset=True)
    for run in works.values():
        run()  # compilation, first allocations
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for name in map(str.strip, sys.stdin):
        _peak_mib(reset=True)
        wall, cpu = time.perf_counter(), time.process_time()
        result = works[name]()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = max(_peak_mib() - before, 0)
        print(json.dumps({"wall": wall, "cpu": cpu, "peak_mib": peak, "result": result}), file=answers, flush=True)


@dataclass
class Contender:
    """A worker process and what its runs took."""

    name: str
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[dict]] = field(default_factory=dict)  # work -> what its runs took

    def start(self, log: Path) -> None:
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=os.environ | self.environment,
        )
        self.log = log
        self._answer()

    def run(self, work: str) -> None:
        print(work, file=self.process.stdin, flush=True)
        self.runs.setdefault(work, []).append(self._answer())

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def median(self, work: str, quantity: str) -> float:
        return statistics.median(run[quantity] for run in self.runs[work])

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)


def interleave(contenders: Sequence[Contender], works: Sequence[str], rounds: int, logs: Path) -> None:
    """Start all contenders, then let each run every work once per round."""
    for contender in contenders:
        contender.start(logs / f"{contender.name.split()[0]}.log")
    for _ in range(rounds):
        for work in works:
            for contender in contenders:
                contender.run(work)
    for contender in contenders:
        contender.stop()


def median_ratio(contender: Contender, reference: Contender, work: str, quantity: str) -> float:
    """Return the median over rounds of contender / reference."""
    pairs = zip(contender.runs[work], reference.runs[work], strict=True)
    return statistics.median(run[quantity] / base[quantity] for run, base in pairs)


def versions_of(interpreter: str, packages: Sequence[str]) -> dict[str, str | None]:
    """Return the installed versions of packages in another environment; None where one is missing."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    shown = subprocess.run([interpreter, "-c", code, *packages], capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


def peers_interpreter() -> str | None:
    """Return the interpreter named by `$TEXTREC_PEERS`, or None after saying why the peers are left out."""
    interpreter = os.environ.get("TEXTREC_PEERS")
    if interpreter and Path(interpreter).is_file():
        return interpreter
    print("peers are left out: set TEXTREC_PEERS to the python of an environment with tests/benchmarks/peers.txt")
    return None


def machine() -> str:
    """Return the processor, its cores and the load, in words."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        fields = dict(
            line.split("\t: ", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t: " in line
        )
        name = fields.get("model name", name)
    load = f", load average {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{os.cpu_count()} cores ({name}){load}, Python {platform.python_version()}"


def _peak_mib(reset: bool = False) -> float:
    """Return the peak resident memory of this process since the last reset, MiB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
