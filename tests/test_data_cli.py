"""The `textrec data` commands: other projects' folders come in, steps are plain lines, values have types."""

import sys

import pytest

from textrec import cli, data_cli
from textrec.data import preparing
from textrec.schema import InputError

INTER = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(
    f"u{user}\ti{(user + k) % 5}\t{k}\n" for user in range(4) for k in range(4)
)


def run_main(monkeypatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["textrec", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def recbole(tmp_path, monkeypatch):
    """A folder of RecBole's, and a place of its own for what is made of it."""
    monkeypatch.setattr(preparing, "PROCESSED", tmp_path / "processed")
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "shop.inter").write_text(INTER, encoding="utf-8")
    return tmp_path / "shop"


def test_a_folder_of_recbole_is_prepared_by_name(recbole, monkeypatch, capsys):
    words = ["data", "prepare", "mine", "--from", "recbole_atomic", "--raw", str(recbole)]
    assert run_main(monkeypatch, *words, "--choice", "min_user=2") == 0
    assert "mine" in capsys.readouterr().out
    prepared = preparing.prepare("mine")
    assert prepared.details["counts"] == {"users": 4, "items": 5, "interactions": 16}
    assert prepared.details["choices"]["min_user"] == 2 and prepared.details["reader"] == "recbole_atomic.read"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--from", "recbole_atomic"), "--from recbole_atomic needs --raw, the folder that holds the files"),
        (("--from", "recbole_atomic", "--raw", "{}", "--items", "a.csv"), "leave --interactions and --items out"),
        (("--from", "recbole_atomic", "--raw", "{}/.."), "must hold one file <name>.inter of RecBole; found none"),
        (("--from", "recformer_folder", "--raw", "{}"), "is no folder of RecFormer: it holds no train.json, val.json"),
        (("--from", "recformer_folder", "--raw", "{}", "--column", "user=u"), "the names in its files are fixed"),
        (("--from", "recbole_atomic", "--raw", "{}", "--column", "user=uid"), "has no column 'uid' for the user"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(recbole, monkeypatch, capsys, words, sentence):
    arguments = [word.format(recbole) for word in words]
    assert run_main(monkeypatch, "data", "prepare", "mine", *arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.strip().splitlines()) == 1
    assert not (recbole.parent / "processed" / "mine").exists()


def test_values_are_read_by_type():
    texts = ["min_item=5", "core_repeat=true", "rate=1.0e-4", "user_sample=null", "split=ratio", "title=a=b"]
    values = {"min_item": 5, "core_repeat": True, "rate": 1e-4, "user_sample": None, "split": "ratio", "title": "a=b"}
    assert data_cli.pairs(texts, "--choice") == values
    with pytest.raises(InputError, match="name=value"):
        data_cli.pairs(["min_item"], "--choice")


def test_steps_are_plain_lines_where_nobody_watches_and_none_where_nobody_wants_them(capsys):
    with data_cli.progress() as step:
        step("reading")
        step("writing")
    assert capsys.readouterr().out == "reading\nwriting\n"
    with data_cli.progress(quiet=True) as step:
        assert step is None
