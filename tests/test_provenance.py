"""Which code made a result: a hash that comments do not move, and a commit that dirty files show."""

import subprocess

import pytest

from textrec import provenance
from textrec.provenance import code_hash, commit_state

PLAIN = "def double(x):\n    return 2 * x\n"
COMMENTED = '"""A module."""\n\n\ndef double(x):\n    """Return twice x."""\n    # because\n    return 2 * x  # twice\n'


def written(folder, name: str, text: str):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_comments_and_docstrings_do_not_change_what_code_does(tmp_path):
    before = code_hash([written(tmp_path, "a.py", PLAIN)])
    assert code_hash([written(tmp_path, "a.py", COMMENTED)]) == before
    assert code_hash([written(tmp_path, "a.py", PLAIN.replace("2", "3"))]) != before


def test_files_count_by_name_and_content_and_not_by_order(tmp_path):
    first, second = written(tmp_path, "a.py", PLAIN), written(tmp_path, "b.py", "x = 1\n")
    assert code_hash([first, second]) == code_hash([second, first])
    assert code_hash([first]) != code_hash([first, second])


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one committed file."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    written(tmp_path, "a.py", PLAIN)
    for words in (["init", "-q"], ["add", "a.py"], ["commit", "-q", "-m", "Add a"]):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def test_a_clean_checkout_names_its_commit(checkout):
    commit, dirty = commit_state()
    assert len(commit) == 40 and not dirty


def test_a_changed_file_makes_it_dirty_and_only_where_it_is_asked_about(checkout):
    commit = commit_state()[0]
    written(checkout, "a.py", COMMENTED)
    assert commit_state() == (commit, True)
    assert commit_state([checkout / "b.py"]) == (commit, False)


def test_outside_a_checkout_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit_state() == ("unknown", True)
