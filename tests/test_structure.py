"""The shape of the code: who may import whom, how large things are, which words and habits are not ours."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from textrec.paths import ROOT

PACKAGE = sorted((ROOT / "textrec").rglob("*.py"))
FILE_LINES, FUNCTION_LINES, PACKAGE_LINES = 350, 60, 13_000  # non-blank

# constants only: nothing to test that would not be typed twice
NO_TEST_OF_ITS_OWN = {"textrec/schema.py", "textrec/paths.py"}

HEAVY = {"torch", "pandas", "pyarrow", "duckdb", "lightning", "transformers", "matplotlib", "seaborn", "papermill"}

# a study has one word per thing; these are the other ones
BANNED_NAMES = {
    *("item_num", "n_items", "vocab_size", "hidden_units", "n_factors", "n_embd", "maxlen", "session_max_len"),
    *("hit_rate", "neg", "negs", "n_negatives", "item_emb", "profile", "loo", "seq", "seqs", "vocab", "client"),
}
BANNED_WORDS = {"gt", "session", "sessions", "usernum", "itemnum"}


def non_blank(lines: list[str]) -> int:
    return sum(bool(line.strip()) for line in lines)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(source: str):
    """Yield `(name, non-blank lines)` of every function, its docstring included."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, non_blank(lines[node.lineno - 1 : node.end_lineno])


def defined_names(source: str) -> set[str]:
    """Return what the source itself names: functions, classes, arguments, assigned variables."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def banned(source: str) -> set[str]:
    names = {found.lower() for found in defined_names(source)}
    return {found for found in names if found in BANNED_NAMES or BANNED_WORDS & set(found.split("_"))}


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--config", folder / "pyproject.toml"]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


def copy_package(folder: Path) -> Path:
    for path in [*PACKAGE, ROOT / "pyproject.toml"]:
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def test_imports_point_one_way():
    outcome = lint_imports(ROOT)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("data/histories.py", "import textrec.study"),
        ("evaluation/__init__.py", "import textrec.models"),
        ("schema.py", "from textrec import cli"),
        ("data/histories.py", "import torch"),
        ("training/__init__.py", "import papermill"),
    ],
)
def test_a_wrong_import_is_noticed(tmp_path, module, line):
    folder = copy_package(tmp_path)
    path = folder / "textrec" / module
    path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    outcome = lint_imports(folder)
    assert outcome.returncode == 1 and "BROKEN" in outcome.stdout, outcome.stdout + outcome.stderr


def test_ruff_has_nothing_to_say():
    outcome = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout


@pytest.mark.parametrize(
    ("code", "source"),
    [
        ("T201", "print(1)\n"),
        ("E722", "try:\n    x = 1\nexcept:\n    x = 2\n"),
        ("BLE001", "try:\n    x = 1\nexcept Exception:\n    x = 2\n"),
        ("S110", "try:\n    x = 1\nexcept Exception:\n    pass\n"),
        ("NPY002", "import numpy as np\n\nnp.random.seed(0)\n"),
    ],
)
def test_ruff_refuses_the_habits_that_rot(code, source):
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", str(ROOT / "textrec" / "example.py"), "-"]
    outcome = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT)
    assert outcome.returncode == 1 and code in outcome.stdout


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_files_and_functions_fit_on_a_few_screens(path):
    source = path.read_text(encoding="utf-8")
    assert non_blank(source.splitlines()) <= FILE_LINES
    assert [found for found in functions(source) if found[1] > FUNCTION_LINES] == []


def test_long_functions_are_counted():
    body = "".join("    x = 1\n\n" for _ in range(FUNCTION_LINES))
    assert list(functions(f"def f():\n{body}")) == [("f", FUNCTION_LINES + 1)]


def test_the_package_stays_within_its_budget():
    lines = {name(path): non_blank(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE}
    assert sum(lines.values()) <= PACKAGE_LINES, sorted(lines.items(), key=lambda item: -item[1])[:10]


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_one_word_per_thing(path):
    assert banned(path.read_text(encoding="utf-8")) == set()


def test_other_words_are_noticed():
    assert banned("def f(n_items, log_sessions): gt = 1") == {"n_items", "log_sessions", "gt"}
    assert banned("def f(num_items, sequence, user_profile): tagged = target = 1") == set()


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_nothing_is_left_for_later(path):
    assert re.findall(r"\b(?:TODO|FIXME|XXX|NotImplementedError)\b", path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", [p for p in PACKAGE if p.name != "__init__.py"], ids=name)
def test_every_module_has_its_test_in_the_same_place(path):
    if name(path) in NO_TEST_OF_ITS_OWN:
        return
    inside = path.relative_to(ROOT / "textrec")
    assert (ROOT / "tests" / inside.parent / f"test_{inside.name}").is_file()


def test_no_path_of_one_machine_is_written_down():
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    endings = {".py", ".ipynb", ".yaml", ".yml", ".md", ".toml", ".txt", ".json", ".svg", ".csv", ".tex", ""}
    files = [ROOT / file for file in listed if file and (ROOT / file).is_file() and (ROOT / file).suffix in endings]
    pattern = re.compile(r"(?<![\w.:/])(?:/(?:home|root|work|Users)/(?!me/)\w|[A-Z]:\\\\?Users)")
    found = [name(path) for path in files if pattern.search(path.read_text(encoding="utf-8", errors="replace"))]
    assert len(files) > 50 and found == []


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{m.split('.')[0] for m in sys.modules}})"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(outcome.stdout.split())


def test_the_package_and_its_command_line_import_nothing_heavy():
    assert imported_by("import textrec, textrec.schema, textrec.paths, textrec.seeding, textrec.cli") & HEAVY == set()


def test_the_data_layer_imports_no_heavy_library_before_it_is_used():
    modules = [name(p)[:-3].replace("/", ".") for p in PACKAGE if p.parent.name == "data" and p.name != "__init__.py"]
    assert imported_by(f"import {', '.join(modules)}") & HEAVY == set()


def test_every_module_imports():
    modules = [name(p)[:-3].replace("/", ".").removesuffix(".__init__") for p in PACKAGE]
    code = f"import importlib; [importlib.import_module(m) for m in {modules}]"
    outcome = subprocess.run([sys.executable, "-W", "error::SyntaxWarning", "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
