"""A folder appears whole or not at all."""

import os

import numpy as np
import pytest

from textrec.data.storage import array_file, database, sha256_of, staged_folder


def test_an_appended_array_is_the_saved_one(tmp_path):
    values = np.arange(1000, dtype=np.int64)
    np.save(tmp_path / "saved.npy", values)
    with array_file(tmp_path / "appended.npy", np.int64, len(values)) as array:
        for part in np.array_split(values, 7):
            array.append(part.astype(np.int32))
    assert (tmp_path / "appended.npy").read_bytes() == (tmp_path / "saved.npy").read_bytes()


def test_a_failed_block_leaves_the_old_folder_and_nothing_else(tmp_path):
    with staged_folder(tmp_path / "set") as partial:
        (partial / "a").write_text("old")
    with pytest.raises(OSError), staged_folder(tmp_path / "set") as partial:
        (partial / "a").write_text("half")
        raise OSError(28, "No space left on device")
    assert (tmp_path / "set" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["set"]


def test_a_finished_block_replaces_the_folder(tmp_path):
    for text in ("old", "new"):
        with staged_folder(tmp_path / "set") as partial:
            (partial / text).write_text(text)
    assert os.listdir(tmp_path / "set") == ["new"] and os.listdir(tmp_path) == ["set"]


def test_two_writers_of_one_folder_both_end_well(tmp_path):
    with staged_folder(tmp_path / "set") as partial:
        (partial / "a").write_text("mine")
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "a").write_text("theirs")
    assert (tmp_path / "set" / "a").read_text() == "mine" and os.listdir(tmp_path) == ["set"]


def test_tables_larger_than_the_memory_limit_spill_and_the_spill_is_gone(tmp_path):
    with database(tmp_path / "work", memory_limit="60MB") as connection:
        connection.execute("CREATE TABLE t AS SELECT range AS a, md5(CAST(range AS VARCHAR)) AS b FROM range(2000000)")
        rows = connection.execute("SELECT count(*), count(DISTINCT a % 1000) FROM t").fetchall()
        spilled = sum(path.stat().st_size for path in (tmp_path / "work").rglob("*"))
    assert rows == [(2_000_000, 1000)] and spilled > 10 * 2**20
    assert not (tmp_path / "work").exists()


def test_sha256_is_of_the_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_database_opens_in_a_notebook(tmp_path):
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    code = f"""
from pathlib import Path
from textrec.data.storage import database
with database(Path({str(tmp_path / "spill")!r})) as connection:
    assert connection.execute("SELECT 1").fetchall() == [(1,)]
"""
    reply = client.execute_interactive(code, timeout=60, output_hook=lambda message: None)["content"]
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    assert reply["status"] == "ok", reply


@pytest.mark.parametrize("keep_existing", [True, False])
def test_a_folder_that_another_process_finished_first_stays_where_its_name_says_its_content(tmp_path, keep_existing):
    place = tmp_path / "content"
    with staged_folder(place, keep_existing) as partial:
        (partial / "whose").write_text("mine")
        place.mkdir()
        (place / "whose").write_text("theirs")
    assert (place / "whose").read_text() == ("theirs" if keep_existing else "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["content"]
