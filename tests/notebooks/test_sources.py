"""Static rules of the notebooks. Each has a twin: a notebook that breaks it and is noticed."""

import ast
import copy
import json
import re

import pytest
from strip_notebooks import CHECKED, stripped

from textrec.paths import NOTEBOOKS
from textrec.schema import InputError
from textrec.study.parameters import COMMON, notebook_parameters

PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
CELL_LINES, NOTEBOOK_LINES, TEXT_LINES = 25, 140, 20  # non-blank
FORBIDDEN = {
    r"^\s*[!%]": "a shell or magic command",
    r"filterwarnings\(.ignore": "a silenced warning",
    r"\bif\b.*\bscale\b": "a branch on the scale",
    r"(?<![\w.])/(home|root|work|Users|tmp|mnt|content)/|\b[A-Z]:\\": "an absolute path",
    r"\bprint\(.*\bf?\"[^\"]*\b0?\.\d{3,}": "a measured number that was typed",
}
TYPED_NUMBER = re.compile(r"(?<![\w@])0?\.\d{3,}")  # published levels come from the ledger, ours from records


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in source(cell).splitlines())


def source(cell) -> str:
    return "".join(cell["source"])


def problems(notebook: dict) -> list[str]:
    """Return what is wrong with the source of a notebook, in words."""
    cells = notebook["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    found = _problems_of_text(cells)
    if stripped(notebook) != notebook:
        found.append("not stripped: run `python tests/strip_notebooks.py`")
    if any(source(cell).startswith(CHECKED) and not cell["outputs"] for cell in code):
        found.append("a checked cell has no output to compare: run the notebook, save it and strip it")
    if sum(map(lines, code)) > NOTEBOOK_LINES:
        found.append(f"{sum(map(lines, code))} lines of code, more than {NOTEBOOK_LINES}")
    tagged = [place for place, cell in enumerate(code) if "parameters" in cell["metadata"].get("tags", [])]
    if tagged != [1]:
        found.append("the second code cell, and no other, must be tagged `parameters`")
    for cell in code:
        found += _problems_of_code(cell)
    return found


def _problems_of_text(cells) -> list[str]:
    first, last = source(cells[0]), source(cells[-1])
    found = []
    if not re.match(r"# \d\d · .+\n\n\*\*Question\.\*\* .+\?", first, re.DOTALL):
        found.append("the first cell must be a title `# NN · ...` and a **Question.** that ends in ?")
    if "would change our mind" not in last:
        found.append("the last cell must say what would change our mind")
    if len({cell.get("id") for cell in cells}) < len(cells):
        found.append("cell ids must exist and differ")
    for cell in (cell for cell in cells if cell["cell_type"] == "markdown"):
        if lines(cell) > TEXT_LINES:
            found.append(f"a text of {lines(cell)} lines")
        if TYPED_NUMBER.search(source(cell)):
            found.append(f"a typed number: {TYPED_NUMBER.search(source(cell))[0]}")
    return found


def _problems_of_code(cell) -> list[str]:
    text = source(cell)
    found = [f"{what}: {line.strip()}" for pattern, what in FORBIDDEN.items() for line in text.splitlines()
             if re.search(pattern, line)]  # fmt: skip
    if lines(cell) > CELL_LINES:
        found.append(f"a cell of {lines(cell)} lines")
    try:
        nodes = list(ast.walk(ast.parse(text)))
    except SyntaxError:
        return [*found, "a cell that is no Python"]
    if any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda) for node in nodes):
        found.append("a definition: what is wanted twice belongs into textrec")
    return found


def unused_parameters(notebook: dict, names) -> set[str]:
    """Return the parameters that no cell below reads."""
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    nodes = [node for cell in code if "parameters" not in cell["metadata"].get("tags", [])
             for node in ast.walk(ast.parse(source(cell)))]  # fmt: skip
    return set(names) - {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_a_source_is_clean(path):
    assert problems(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_parameters_are_declared_explained_and_read(path):
    declared, number = notebook_parameters(path), path.name[:2]
    assert tuple(declared)[: len(COMMON)] == COMMON
    common = {name: declared[name].default for name in COMMON}
    run_dir = f"papermill_runs/smoke/{number}/seed0"
    assert common == {"scale": "smoke", "dataset": "synthetic", "seed": 0, "device": "cpu", "run_dir": run_dir}
    assert [name for name, parameter in declared.items() if not parameter.help or name != name.lower()] == []
    assert unused_parameters(json.loads(path.read_text(encoding="utf-8")), declared) == set()


def test_the_common_block_is_the_same_everywhere():
    blocks = {tuple((p.name, p.annotation, p.help) for p in list(notebook_parameters(path).values())[: len(COMMON)])
              for path in PATHS}  # fmt: skip
    assert len(blocks) == 1


def test_no_two_cells_are_copies_of_each_other():
    """Six lines that occur twice want to be a function of the package."""
    owners = {}
    for path in PATHS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            tagged = "parameters" in cell["metadata"].get("tags", [])
            if cell["cell_type"] == "code" and not tagged and len(ast.parse(source(cell)).body) >= 6:
                owners.setdefault(ast.dump(ast.parse(source(cell))), []).append(path.name)
    assert [names for names in owners.values() if len(names) > 1] == []


def small_notebook() -> dict:
    def cell(kind, name, text, **metadata):
        code = {"outputs": [], "execution_count": None} if kind == "code" else {}
        return {"cell_type": kind, "id": name, "metadata": metadata, "source": text, **code}

    checked = cell("code", "d", CHECKED + "\nprint(1)")
    checked["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1\n"}]
    cells = [
        cell("markdown", "a", "# 99 · A small one\n\n**Question.** Is it clean?"),
        cell("code", "b", "import textrec"),
        cell("code", "c", "seed: int = 0  # seed", tags=["parameters"]),
        checked,
        cell("code", "e", "x = seed"),
        cell("markdown", "f", "## What would change our mind\n\nNothing."),
    ]
    return stripped({"cells": cells})


@pytest.mark.parametrize(
    ("place", "key", "value", "said"),
    [
        (0, "source", "# A small one", "title"),
        (0, "source", "# 99 · A small one\n\n**Question.** It is clean.", "title"),
        (5, "source", "## The end", "change our mind"),
        (5, "source", "would change our mind\n\nWe reach 0.1790.", "typed number"),
        (5, "source", "would change our mind\n\nThey reach .179.", "typed number"),
        (5, "source", "would change our mind\n" + "line\n" * 20, "a text of 21 lines"),
        (5, "id", "e", "ids"),
        (4, "source", "def f():\n    return 1", "definition"),
        (4, "source", "class A:\n    pass", "definition"),
        (4, "source", "f = lambda x: x", "definition"),
        (4, "source", "%pip install x", "magic"),
        (4, "source", "!ls", "magic"),
        (4, "source", "open('/home/me/data')", "absolute path"),
        (4, "source", "open('C:\\\\data')", "absolute path"),
        (4, "source", "if scale == 'smoke':\n    x = 1", "branch on the scale"),
        (4, "source", "warnings.filterwarnings('ignore')", "silenced"),
        (4, "source", "x = 1\n" * 26, "a cell of 26 lines"),
        (4, "source", "x = = 1", "no Python"),
        (4, "outputs", [{"output_type": "stream", "name": "stdout", "text": "1\n"}], "not stripped"),
        (4, "execution_count", 3, "not stripped"),
        (4, "metadata", {"collapsed": True}, "not stripped"),
        (3, "execution_count", None, "not stripped"),
        (3, "metadata", {}, "not stripped"),
        (3, "outputs", [], "no output to compare"),
        (2, "metadata", {}, "tagged"),
        (4, "metadata", {"tags": ["parameters"]}, "tagged"),
    ],
)
def test_a_broken_source_is_noticed(place, key, value, said):
    notebook = small_notebook()
    assert problems(notebook) == []
    broken = copy.deepcopy(notebook)
    broken["cells"][place][key] = value
    assert any(said in problem for problem in problems(broken)), problems(broken)


def test_stripping_brings_an_edited_notebook_back():
    notebook = small_notebook()
    edited = copy.deepcopy(notebook) | {"metadata": {"kernelspec": {"name": "python3", "path": "here"}, "widgets": {}}}
    for number, cell in enumerate(edited["cells"], 1):
        cell["metadata"] |= {"editable": True, "papermill": {"duration": 1.0}}
        if cell["cell_type"] == "code" and not cell["source"].startswith(CHECKED):
            cell |= {"execution_count": number, "outputs": [{"output_type": "stream", "name": "stdout", "text": "1\n"}]}
    assert stripped(edited) == notebook


def test_another_kernel_a_long_notebook_and_an_unread_parameter_are_noticed():
    notebook = small_notebook()
    notebook["metadata"]["kernelspec"] = {"name": "ir"}
    assert problems(notebook) == ["not stripped: run `python tests/strip_notebooks.py`"]
    notebook = small_notebook()
    notebook["cells"][5:5] = [dict(notebook["cells"][4], id=f"g{k}", source="x = 1\n" * 25) for k in range(6)]
    assert any("lines of code" in problem for problem in problems(notebook))
    assert unused_parameters(small_notebook(), {"seed", "mood"}) == {"mood"}


def test_a_notebook_without_parameters_is_an_input_error(tmp_path):
    path = tmp_path / "98_none.ipynb"
    path.write_text(json.dumps({"cells": []}))
    with pytest.raises(InputError, match="0 cells tagged"):
        notebook_parameters(path)
