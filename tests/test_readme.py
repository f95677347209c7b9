"""What README.md says can be pasted, and what it names exists."""

import ast
import importlib
import re
import subprocess

import pytest
import yaml
from commands import parse

from textrec.paths import NOTEBOOKS, PARAMETERS, ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in fenced if name == language]


def command_lines() -> list[str]:
    """Return the lines of the shell blocks and the commands quoted in the prose, without comments."""
    lines = [line.split("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    quoted = re.findall(r"`((?:make|textrec|\.venv/bin/textrec) [^`]+)`", TEXT)
    return [line for line in [*lines, *quoted] if line]


@pytest.mark.parametrize("line", command_lines())
def test_commands_can_be_pasted(line):
    line = re.sub(r"<[^>]+>", "PLACEHOLDER", line)
    program, *words = line.split()
    if program.endswith("textrec"):
        parse(line.removeprefix(".venv/bin/"))
    else:
        assert program == "make"
        outcome = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert outcome.returncode == 0, outcome.stderr


def test_a_command_that_does_not_exist_is_noticed():
    with pytest.raises(Exception, match="No such command"):
        parse("textrec preparre ml-1m")
    assert subprocess.run(["make", "-n", "studdy"], cwd=ROOT, capture_output=True).returncode != 0


@pytest.mark.parametrize("block", blocks("python"))
def test_python_names_what_exists(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_sets_named_in_commands_are_known():
    known = yaml.safe_load((ROOT / "textrec" / "data" / "sets.yaml").read_text(encoding="utf-8"))
    named = [parse(line.removeprefix(".venv/bin/")) for line in command_lines() if " data " in line and "<" not in line]
    names = {values["name"] for values in named if "name" in values and not values.get("interactions")}
    assert names and names <= set(known)


def test_variants_named_in_commands_have_their_parameters():
    runs = [parse(line.removeprefix(".venv/bin/")) for line in command_lines() if "textrec run " in line]
    named = [(values["scale"], values["number"], values["variant"]) for values in runs if values["variant"]]
    assert named
    for scale, number, variant in named:
        assert (PARAMETERS / scale / f"{number}-{variant}.yaml").is_file()


def test_notebooks_are_marked_here_or_planned_as_they_are():
    rows = re.findall(r"^\| (\d\d_.*?) \| .* \| (here|planned) \|$", TEXT, flags=re.MULTILINE)
    marked = {name: state for names, state in rows for name in names.split(", ")}
    there = {path.stem for path in NOTEBOOKS.glob("[0-9]*.ipynb")}
    assert {name for name, state in marked.items() if state == "here"} == there
    assert len(marked) == 12


def test_the_tree_names_what_exists():
    tree = next(block for block in blocks("") if "textrec/" in block)
    folders = re.findall(r"^(\w+)/ ", tree, flags=re.MULTILINE)
    inside = re.findall(r"^  ([\w./ ]+?)  ", tree, flags=re.MULTILINE)
    named = [*folders, *(f"textrec/{name}" for line in inside for name in line.split())]
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / name).exists() and name != "data"] == []


def test_links_into_the_repository_lead_somewhere():
    paths = re.findall(r"`((?:textrec|tests|papermill_runs|notebooks)/[\w./-]*)`", TEXT)
    assert [path for path in paths if "<" not in path and not (ROOT / path).exists()] == []


def test_the_verdict_block_is_where_the_report_looks_for_it():
    assert TEXT.count("<!-- verdicts:start -->") == TEXT.count("<!-- verdicts:end -->") == 1
    assert TEXT.index("<!-- verdicts:start -->") < TEXT.index("<!-- verdicts:end -->")


def test_it_is_about_a_hundred_and_fifty_lines():
    outside = re.sub(r"<!-- verdicts:start -->.*<!-- verdicts:end -->", "", TEXT, flags=re.DOTALL)
    assert len(outside.splitlines()) <= 190
