"""What `textrec doctor` looks at before a run: versions, devices, folders, data. Each finding carries its remedy."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import tempfile
import timeit
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from textrec.paths import FIGURES, PROCESSED, ROOT, RUNS, raw_data
from textrec.provenance import commit_state

OLDEST_PYTHON, NEWEST_PYTHON = (3, 11), (3, 13)
EXTRAS = ("", "minilm", "deepspeed", "export", "dev")  # a missing one is a warning that says what cannot be done
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `status` is ok, warn or fail, and a fail stops a run."""

    status: str
    what: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return the findings on this machine in reading order; writes nothing that stays."""
    findings = [check_python(), *check_packages()]
    findings += check_torch() if importlib.util.find_spec("torch") else []
    findings += [check_disk(ROOT), *(check_writable(folder) for folder in (PROCESSED, RUNS, FIGURES))]
    return [*findings, check_raw_data(raw_data()), check_prepared(PROCESSED), check_git()]


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Finding:
    """Compare the interpreter with the versions that the pins hold for."""
    running = "Python " + ".".join(map(str, version))
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return Finding("ok", running)
    return Finding("fail", f"{running} is not supported", "install Python 3.11, 3.12 or 3.13 and run `make setup`")


def read_pins(path: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Return the pinned version of every package by its canonical name; empty where the file is not at hand."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version.strip() for name, version in pairs}


def check_packages() -> list[Finding]:
    """Compare each direct dependency with the range it must be in and with the pinned version."""
    try:
        requires = importlib.metadata.requires("textrec") or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding("fail", "the package textrec is not installed", "run `make setup`")]
    pins = read_pins()
    known = [requirement for requirement in map(Requirement, requires) if requirement.name != "textrec"]
    wanted = [r for r in known if r.marker is None or any(r.marker.evaluate({"extra": name}) for name in EXTRAS)]
    return [check_package(requirement, pins) for requirement in wanted]


def check_package(requirement: Requirement, pins: dict[str, str]) -> Finding:
    """Return ok at the pinned version, warn in range or where an optional package is missing, else fail."""
    optional = requirement.marker is not None and "extra" in str(requirement.marker)
    install = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding("warn" if optional else "fail", f"{requirement.name} is not installed", install)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding("fail", f"{requirement.name} {installed} is outside {requirement.specifier}", install)
    pinned = pins.get(canonicalize_name(requirement.name))
    if pinned and installed.split("+")[0] != pinned:  # 2.13.0+cpu is 2.13.0
        remedy = f"pip install {requirement.name}=={pinned} to repeat numbers exactly"
        return Finding("warn", f"{requirement.name} {installed} is not the pinned {pinned}", remedy)
    return Finding("ok", f"{requirement.name} {installed}")


def check_torch() -> list[Finding]:
    """Report the devices, the threads, and how bf16 compares with fp32 where there is only a CPU."""
    import torch

    threads, cores = torch.get_num_threads(), os.cpu_count()
    crowded = threads > cores
    remedy = f"export OMP_NUM_THREADS={cores}" if crowded else ""
    findings = [Finding("warn" if crowded else "ok", f"CPU: {cores} cores, torch uses {threads} threads", remedy)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        findings.append(Finding("ok", f"cuda:{index}: {properties.name}, {properties.total_memory / GIB:.0f} GiB"))
    if torch.cuda.is_available():
        return findings
    squares = (torch.ones(256, 256, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    half, full = (min(timeit.repeat(lambda x=x: x @ x, number=1, repeat=20)) for x in squares)  # the least disturbed
    if half > 1.5 * full:
        what = f"bf16 takes {half / full:.1f} times as long as fp32 on this CPU"
        findings.append(Finding("warn", what, "leave precision at 32"))
    return findings


def check_disk(folder: Path) -> Finding:
    """Compare the free space with what the laptop sets and their runs take."""
    free_gib = shutil.disk_usage(folder).free / GIB
    status = "ok" if free_gib >= 10 else "warn" if free_gib >= 2 else "fail"
    remedy = "" if status == "ok" else "free 10 GiB for the laptop scale, 2 GiB for the smoke scale"
    return Finding(status, f"{free_gib:.0f} GiB free under {folder}", remedy)


def check_writable(folder: Path) -> Finding:
    """Try to write where a run writes; a folder that does not exist yet is tried at its nearest parent."""
    nearest = next(path for path in (folder, *folder.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return Finding("ok", f"{folder} can be written to")
    except OSError as error:
        remedy = f"change the permissions of {nearest}"
        return Finding("fail", f"{folder} cannot be written to ({error.strerror})", remedy)


def check_raw_data(folder: Path) -> Finding:
    """List the sets in the folder of raw data; the smoke scale needs none."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if names:
        return Finding("ok", f"raw data in {folder}: {', '.join(names)}")
    remedy = "`textrec data list` names the sets; set TEXTREC_DATA to their folder, or go on with the synthetic ones"
    return Finding("warn", f"no raw data in {folder}", remedy)


def check_prepared(folder: Path) -> Finding:
    """List the prepared sets; a missing one stops nothing."""
    names = sorted(path.parent.name for path in folder.glob("*/fingerprint.json"))
    return Finding("ok", f"prepared sets: {', '.join(names) or 'none yet; a run prepares what it needs'}")


def check_git() -> Finding:
    """Name the commit a record would carry, and whether the tree is clean."""
    commit, dirty = commit_state()
    if commit == "unknown":
        return Finding("warn", "no git commit to name in a record", "run from a clone with git installed")
    if dirty:
        remedy = "commit before a laptop or paper run: its record names the code"
        return Finding("warn", f"commit {commit[:10]} with uncommitted changes", remedy)
    return Finding("ok", f"commit {commit[:10]}, clean tree")
