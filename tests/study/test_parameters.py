"""What the strict parameter reader accepts and, mostly, what it refuses."""

import json

import pytest

from textrec.schema import InputError
from textrec.study import parameters

CELL = """# common
scale: str = "smoke"  # smoke | laptop | paper
seed: int = 0  # one execution, one seed
# this question
rows: list[str] = ["popularity"]  # rows of the table
learning_rate: float = 1.0e-3  # peak
weights: dict[str, float] = {"a": 1.0}  # by name
overrides: dict = {}  # by row
tie_item_table: bool = True  # one table for input and output
max_users: int | None = None  # all where none
"""


def write_notebook(path, *sources, tags=(("parameters",),)):
    cells = [
        {"cell_type": "code", "id": f"c{k}", "metadata": {"tags": list(tag)}, "source": source, "outputs": [],
         "execution_count": None}
        for k, (source, tag) in enumerate(zip(sources, tags, strict=True))
    ]  # fmt: skip
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.fixture
def notebook(tmp_path):
    return write_notebook(tmp_path / "07_toy.ipynb", CELL)


def test_declarations_carry_type_default_and_comment(notebook):
    declared = parameters.notebook_parameters(notebook)
    assert list(declared)[:3] == ["scale", "seed", "rows"]
    assert declared["learning_rate"] == parameters.Parameter("learning_rate", "float", 1.0e-3, "peak")
    assert declared["max_users"].default is None and declared["max_users"].annotation == "int | None"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("twice: int = seed * 2", "derived"),
        ("seed = 0", "annotated value"),
        ("seed: int", "annotated value"),
        ("import os", "annotated value"),
        ("seed: int = 0; other: int = 1", "shares"),
        ("seed: int = 0\nseed: int = 1", "shares"),
        ("rows: list[str] = [\n    'a',\n]", "several lines"),
        ("text: str = 'a=b'", "papermill"),
        ("seed: int = 'zero'", "expected int"),
        ("seed: Path = 'zero'", "expected Path"),
        ("seed: int = = 0", "no Python"),
    ],
)
def test_broken_declarations_are_named(tmp_path, cell, said):
    with pytest.raises(InputError, match=said):
        parameters.notebook_parameters(write_notebook(tmp_path / "07_toy.ipynb", cell))


def test_exactly_one_cell_is_tagged(tmp_path):
    none = write_notebook(tmp_path / "a.ipynb", "x = 1", tags=((),))
    two = write_notebook(tmp_path / "b.ipynb", "x: int = 1", "y: int = 1", tags=(("parameters",), ("parameters",)))
    for path, count in ((none, 0), (two, 2)):
        with pytest.raises(InputError, match=f"{count} cells tagged"):
            parameters.notebook_parameters(path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": 3}'])
def test_a_broken_notebook_is_one_sentence(tmp_path, text):
    path = tmp_path / "07_toy.ipynb"
    path.write_text(text)
    with pytest.raises(InputError, match="no notebook"):
        parameters.notebook_parameters(path)


@pytest.mark.parametrize(
    ("name", "value", "result"),
    [
        ("learning_rate", 1.0e-4, 1.0e-4),
        ("learning_rate", 1, 1.0),
        ("rows", [], []),
        ("weights", {"b": 2}, {"b": 2.0}),
        ("overrides", {"sasrec_ce": {"dropout": 0.5, "loss": "ce"}}, {"sasrec_ce": {"dropout": 0.5, "loss": "ce"}}),
        ("max_users", 5, 5),
        ("max_users", None, None),
    ],
)
def test_values_that_fit(notebook, name, value, result):
    checked = parameters.check_parameters(notebook, {name: value})[name]
    assert checked == result and type(checked) is type(result)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("learning_rate", "1e-4", r"write 1\.0e-4"),
        ("learning_rate", "2.5E3", r"write 2\.5e\+3"),
        ("learning_rate", "fast", "expected float"),
        ("learning_rate", True, "bool"),
        ("learning_rate", float("nan"), "expected float"),
        ("learning_rate", float("inf"), "expected float"),
        ("seed", True, r"seed is True \(bool\); expected int"),
        ("seed", 1.0, "expected int"),
        ("seed", "1", "expected int"),
        ("tie_item_table", 1, "expected bool"),
        ("tie_item_table", "false", "expected bool"),
        ("rows", "popularity", r"expected list\[str\]"),
        ("rows", ["a", 1], "part 2"),
        ("weights", {"b": "1e-2"}, r"weights, b .*write 1\.0e-2"),
        ("weights", {1: 1.0}, "key 1"),
        ("overrides", {"sasrec_ce": {"learning_rate": "1e-4"}}, r"sasrec_ce, learning_rate .*1\.0e-4"),
        ("max_users", "many", "expected"),
        ("lerning_rate", 1.0, r"`lerning_rate` \(did you mean 'learning_rate'"),
    ],
)
def test_values_that_do_not_fit(notebook, name, value, said):
    with pytest.raises(InputError, match=said):
        parameters.check_parameters(notebook, {name: value})


@pytest.fixture
def study(tmp_path, monkeypatch, notebook):
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(parameters, "PARAMETERS", tmp_path / "parameters")
    folder = tmp_path / "parameters" / "laptop"
    folder.mkdir(parents=True)
    (folder / "common.yaml").write_text("scale: laptop\nlearning_rate: 0.5\n")
    (folder / "07.yaml").write_text("learning_rate: 0.25\nseed: 3\nrows: [a, b]\n")
    (folder / "07-beauty.yaml").write_text("# time:     3 min\n# command:  textrec run 07\nseed: 4\n")
    return folder


def test_later_files_win_and_overrides_win_over_all(study):
    assert parameters.resolve_parameters("07", "laptop")["seed"] == 3
    values = parameters.resolve_parameters("07", "laptop", "beauty", {"rows": ["c"]})
    assert (values["scale"], values["learning_rate"], values["seed"], values["rows"]) == ("laptop", 0.25, 4, ["c"])
    assert values["tie_item_table"] is True, "defaults are part of the resolved parameters"
    assert parameters.variants("07", "laptop") == ["beauty"]
    assert parameters.read_header(study / "07-beauty.yaml") == {"time": "3 min", "command": "textrec run 07"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("07", "laptop", "books"), "07-books.yaml does not exist; variants of 07 at scale laptop: beauty"),
        (("07", "paper"), "common.yaml does not exist"),
        (("07", "huge"), "none of smoke, laptop, paper"),
        (("08", "laptop"), "expected one of 07"),
        (("07", "laptop", None, {"sed": 1}), "command line: 07_toy.ipynb has no parameter `sed`"),
    ],
)
def test_what_is_not_there_is_named(study, arguments, said):
    with pytest.raises(InputError, match=said):
        parameters.resolve_parameters(*arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "seed twice"),
        ("- seed\n", "holds a list"),
        ("seed: [1\n", "no YAML"),
        ("learning_rate: 1e-4\n", r"laptop/07.yaml: learning_rate .* write 1\.0e-4"),
        ("learing_rate: 1.0e-4\n", r"`learing_rate` \(did you mean 'learning_rate'"),
    ],
)
def test_a_broken_file_is_named(study, text, said):
    (study / "07.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        parameters.resolve_parameters("07", "laptop")
