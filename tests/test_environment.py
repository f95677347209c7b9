"""One environment, written down three times: ranges in pyproject.toml, pins in constraints.txt and environment.yml."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from textrec.doctor import read_pins
from textrec.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
PINS = read_pins()


def declared() -> dict[str, Requirement]:
    """Return every direct dependency, those of the extras that `all` installs included, by canonical name."""
    optional = PROJECT["optional-dependencies"]
    extras = (text for name, texts in optional.items() if name not in ("all", "llama") for text in texts)
    requirements = map(Requirement, [*PROJECT["dependencies"], *extras])
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def conda_pins() -> dict[str, Requirement]:
    lines = next(entry["pip"] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, dict))
    requirements = [Requirement(line) for line in lines if not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def imports(source: str) -> set[str]:
    """Return the top-level names a source imports anywhere, functions included."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"textrec"}


@pytest.mark.parametrize("name", declared())
def test_each_dependency_is_pinned_within_its_range(name):
    assert declared()[name].specifier.contains(PINS[name], prereleases=True)


def test_conda_installs_the_same_versions():
    assert {name: str(requirement.specifier) for name, requirement in conda_pins().items()} == {
        name: f"=={PINS[name]}" for name in declared()
    }


def test_platform_conditions_agree():
    assert {name: str(r.marker) for name, r in conda_pins().items() if r.marker} == {
        name: str(r.marker) for name, r in declared().items() if r.marker
    }


def test_conda_gives_python_only_and_every_entry_says_who_needs_it():
    names = [entry.split("=")[0] for entry in ENVIRONMENT["dependencies"] if isinstance(entry, str)]
    assert names == ["python", "pip"]
    lines = (ROOT / "environment.yml").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if "==" in line and "  # " not in line] == []


def test_conda_python_is_a_supported_one():
    version = next(entry.split("=")[1] for entry in ENVIRONMENT["dependencies"] if str(entry).startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(version + ".0")


def test_the_lock_holds_exact_versions_and_nothing_of_one_machine():
    lines = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    assert len(PINS) == len(lines)


def test_every_third_party_import_is_declared():
    owners = importlib.metadata.packages_distributions()
    found = set().union(*(imports(p.read_text(encoding="utf-8")) for p in (ROOT / "textrec").rglob("*.py")))
    allowed = set(declared())
    missing = {name for name in found if not {canonicalize_name(owner) for owner in owners.get(name, [])} & allowed}
    assert missing == set()


def test_an_undeclared_import_is_noticed():
    assert imports("import os\ndef f():\n    from polars.io import scan") == {"polars"}
    assert "polars" not in declared()


def test_the_check_before_landing_runs_the_two_commands():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    text = path.read_text(encoding="utf-8")
    assert "make study" in text and "make test" in text and "set -euo pipefail" in text


@pytest.mark.parametrize("command", ["setup", "test", "study", "report", "lab", "bench", "lock", "clean", "help"])
def test_every_target_is_known_to_make(command):
    outcome = subprocess.run(["make", "-n", command], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_data_given_to_make_reaches_the_run_as_an_absolute_path(tmp_path):
    show = ["--eval", "show: ; @echo $$TEXTREC_DATA", "show", "DATA=sets"]
    command = ["make", "--no-print-directory", "-f", ROOT / "Makefile", *show]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert outcome.stdout.strip() == str(tmp_path / "sets")
