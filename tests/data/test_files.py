"""A file appears whole or not at all."""

import errno
import os
import subprocess
import sys

import pytest

from textrec.data.files import naming_full_disk, remove_partials, replacing, write_text
from textrec.schema import InputError


def test_a_finished_block_puts_the_file_in_place(tmp_path):
    with replacing(tmp_path / "new" / "a.txt") as partial:
        partial.write_text("done", encoding="utf-8")
        assert not (tmp_path / "new" / "a.txt").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_a_failed_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"set.partial-{dead.pid}").mkdir()
    (tmp_path / f"set.partial-{os.getppid()}").mkdir()
    (tmp_path / f"other.partial-{dead.pid}").mkdir()
    remove_partials(tmp_path, "set")
    assert sorted(os.listdir(tmp_path)) == sorted([f"set.partial-{os.getppid()}", f"other.partial-{dead.pid}"])
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / f"a.json.partial-{dead.pid}").touch()
    (tmp_path / f"a.partial-{os.getpid()}.ipynb").touch()
    remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", f"set.partial-{os.getppid()}"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device that is always full")
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(InputError, match=r"^the disk of .* is full: free some space and try again$"):
        with naming_full_disk(tmp_path, "try again"), replacing(path) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_other_errors_pass_as_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output"), naming_full_disk(tmp_path, "try again"):
        raise OSError(errno.EIO, "Input/output error")


def test_a_small_file_is_replaced_or_left(tmp_path, monkeypatch):
    path = tmp_path / "latest"
    write_text(path, "save0")
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "save1")
    assert path.read_text() == "save0"
