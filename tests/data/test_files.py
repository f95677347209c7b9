"""A file appears whole or not at all."""

import pytest

from textrec.data.files import replacing


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
