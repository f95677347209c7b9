"""RecBole's atomic files, read from hand-written ones and exported from a prepared set."""

import duckdb
import numpy as np
import pandas
import pytest

from textrec.data.histories import Histories, Split
from textrec.data.prepared import PreparedSet
from textrec.data.sources import recbole_atomic
from textrec.schema import InputError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu2\ti1\t4.0\t20\nu1\ti2\t3\t10\nu1\ti1\t5\t30\n"
ITEM = 'item_id:token\tmovie_title:token_seq\tgenre:token_seq\ni1\tToy "Story"\tComedy Drama\ni2\tHeat\t\n'


@pytest.fixture
def files(tmp_path):
    for name, text in {"small.inter": INTER, "small.item": ITEM}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return {"interactions": tmp_path / "small.inter", "items": tmp_path / "small.item"}


def tiny_prepared(folder, times) -> PreparedSet:
    pandas.DataFrame({"item": ["i1", "i2", "i3"], "title": ["One", 'The "second"\tone', "Drei"]}).to_parquet(
        folder / "catalogue.parquet"
    )
    pandas.DataFrame({"user": ["anna", "bert"]}).to_parquet(folder / "users.parquet")
    histories = Histories(np.array([2, 1, 3, 3, 1], np.int32), np.array(times), np.array([0, 4, 5]))
    split = Split(np.array([2, 1]), np.array([2, -1]), np.array([3, -1]))
    return PreparedSet("tiny", folder, histories, split, 3, {})


def test_typed_fields_become_canonical_columns(files):
    connection = duckdb.connect()
    tables = recbole_atomic.read(connection, files)
    interactions = connection.sql(tables.interactions)
    assert interactions.columns == ["user", "item", "time", "rating"]
    assert interactions.fetchall()[0] == ("u2", "i1", "20", "4.0")
    items = connection.sql(tables.items)
    assert items.columns == ["item", "title", "genre"]
    assert items.fetchall()[0] == ("i1", 'Toy "Story"', "Comedy Drama")
    assert tables.first_line == 2


def test_other_field_names_can_be_named(files):
    files["interactions"].write_text(INTER.replace("user_id", "session_id"), encoding="utf-8")
    connection = duckdb.connect()
    tables = recbole_atomic.read(connection, files, columns={"user": "session_id"})
    assert connection.sql(tables.interactions).fetchall()[0][0] == "u2"


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        ("uid:token\titem_id:token", "no column 'user_id'"),
        ("user_id\titem_id:token", "'user_id' is no field of name:type"),
    ],
)
def test_wrong_headers_are_named(files, header, sentence):
    files["interactions"].write_text(f"{header}\nu1\ti1\n", encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        recbole_atomic.read(duckdb.connect(), files)


def test_export_keeps_times_that_order_and_writes_positions_where_they_tie(tmp_path):
    for times, written in (([10, 20, 30, 40, 5], [10, 20, 30, 40, 5]), ([10, 10, 30, 40, 5], [0, 1, 2, 3, 0])):
        folder = recbole_atomic.export(tiny_prepared(tmp_path, times), tmp_path / "out")
        table = pandas.read_csv(folder / "tiny.inter", delimiter="\t")
        assert table["timestamp:float"].tolist() == written
        assert table["user_id:token"].tolist() == ["anna"] * 4 + ["bert"]
        assert table["item_id:token"].tolist() == ["i2", "i1", "i3", "i3", "i1"]


def test_exported_texts_survive_default_quoting(tmp_path):
    folder = recbole_atomic.export(tiny_prepared(tmp_path, [1, 2, 3, 4, 5]), tmp_path / "out")
    table = pandas.read_csv(folder / "tiny.item", delimiter="\t", engine="python")
    assert table["title:token_seq"].tolist() == ["One", "The 'second' one", "Drei"]
    assert not list(folder.glob("*.partial-*"))


def test_the_files_of_a_folder_are_found_by_their_ending(files, tmp_path):
    assert recbole_atomic.find(tmp_path) == files
    files["items"].unlink()
    assert recbole_atomic.find(tmp_path) == {"interactions": files["interactions"]}
    (tmp_path / "other.inter").touch()
    with pytest.raises(InputError, match=r"must hold one file <name>.inter of RecBole; found other.inter, small.inter"):
        recbole_atomic.find(tmp_path)
