"""RecFormer's finetuning folder, read from hand-written files and exported from a prepared set."""

import json

import duckdb
import pytest

from tests.data.sources.test_recbole_atomic import tiny_prepared
from textrec.data.preparing import prepare_folder
from textrec.data.sources import recformer_folder
from textrec.schema import InputError

FOLDER = {
    "umap": {"A1": 0, "A2": 1},
    "smap": {"B1": 0, "B2": 1, "B3": 2},
    "train": {"0": [2, 0], "1": [1]},
    "val": {"0": [1]},
    "test": {"0": [0]},
    "meta_data": {
        "B1": {"title": "Tea &amp; co", "brand": "", "category": "Grocery Tea"},
        "B3": {"title": "Cup", "brand": "Zor", "category": "Kitchen"},
        "B9": {"title": "Never bought", "brand": "", "category": ""},
    },
}


@pytest.fixture
def files(tmp_path):
    for name, content in FOLDER.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return {("items" if name == "meta_data" else name): tmp_path / f"{name}.json" for name in FOLDER}


def test_parts_join_to_histories_of_external_ids(files):
    connection = duckdb.connect()
    tables = recformer_folder.read(connection, files)
    rows = [("A1", "B3"), ("A1", "B1"), ("A1", "B2"), ("A1", "B1"), ("A2", "B2")]
    assert connection.sql(tables.interactions).fetchall() == rows
    items = connection.sql(tables.items)
    assert items.columns == ["item", "title", "brand", "category"]
    assert items.fetchall()[0] == ("B1", "Tea &amp; co", "", "Grocery Tea")


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train", {"0": [7]}, r"train.json, user 0: the item 7 is not in smap.json"),
        ("train", {"5": [1]}, "the user '5', which umap.json does not know"),
        ("smap", ["B1"], "smap.json holds a list"),
        ("items", {"B1": "Tea"}, "the item 'B1' is 'Tea'; expected an object"),
    ],
)
def test_broken_folders_are_refused_in_one_sentence(files, name, content, sentence):
    files[name].write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=sentence):
        recformer_folder.read(duckdb.connect(), files)


def test_truncated_json_names_the_file(files):
    files["umap"].write_text('{"A1": 0, ', encoding="utf-8")
    with pytest.raises(InputError, match=r"umap.json is not valid JSON"):
        recformer_folder.read(duckdb.connect(), files)


def test_export_writes_the_split_with_ids_from_zero(tmp_path):
    folder = recformer_folder.export(tiny_prepared(tmp_path, [1, 2, 3, 4, 5]), tmp_path / "out")
    written = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}
    assert written["train"] == {"0": [1, 0], "1": [2, 0][1:]}
    assert written["val"] == {"0": [2]}
    assert written["test"] == {"0": [2]}
    assert written["umap"] == {"anna": 0, "bert": 1}
    assert written["smap"] == {"i1": 0, "i2": 1, "i3": 2}
    assert written["meta_data"]["i3"] == {"title": "Drei", "brand": "", "category": ""}
    files = {("items" if path.stem == "meta_data" else path.stem): path for path in folder.iterdir()}
    connection = duckdb.connect()
    again = connection.sql(recformer_folder.read(connection, files).interactions).fetchall()
    assert again == [("anna", "i2"), ("anna", "i1"), ("anna", "i3"), ("anna", "i3"), ("bert", "i1")]


def test_a_folder_is_prepared_with_the_split_of_its_parts_and_exported_as_it_was(files, tmp_path):
    assert recformer_folder.find(tmp_path) == files
    prepared = prepare_folder("small", tmp_path, "recformer_folder", processed=tmp_path / "out")
    again = recformer_folder.export(prepared, tmp_path / "export")
    written = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in again.iterdir()}
    assert all(written[name] == FOLDER[name] for name in (*recformer_folder.PARTS, "umap", "smap"))
    files["smap"].unlink()
    with pytest.raises(InputError, match=r"is no folder of RecFormer: it holds no smap.json"):
        prepare_folder("small", tmp_path, "recformer_folder", processed=tmp_path / "out")
