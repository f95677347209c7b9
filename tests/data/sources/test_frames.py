"""Two files of one's own, in every accepted format."""

import gzip
import json

import duckdb
import pytest

from textrec.data.preparing import prepare_frames
from textrec.data.sources import frames
from textrec.schema import InputError

ROWS = [("u1", "a", 3, 5.0), ("u2", 'b "x"', 1, 4.0), ("u1", "c, d", 2, 1.5), ("u1", "é", 9, 2.0)]
NAMES = ("user_id", "item_id", "timestamp", "rating")


def write(folder, suffix: str, names=NAMES):
    path = folder / f"log{suffix}"
    plain = suffix.removesuffix(".gz")
    if plain == ".parquet":
        import pandas

        pandas.DataFrame(ROWS, columns=list(names)).to_parquet(path)
        return path
    if plain == ".jsonl":
        text = "".join(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n" for row in ROWS)
    elif plain == ".csv":
        cells = [[f'"{str(value).replace(chr(34), chr(34) * 2)}"' for value in row] for row in ROWS]
        text = "\r\n".join([",".join(names), *map(",".join, cells)]) + "\r\n"
    else:
        text = "\ufeff" + "\n".join("\t".join(map(str, row)) for row in [names, *ROWS])  # no line end after the last
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet"])
def test_every_format_gives_the_same_set(tmp_path, suffix):
    prepared = prepare_frames("set", write(tmp_path, suffix), processed=tmp_path / "out")
    assert prepared.users.tolist() == ["u1", "u2"]
    assert prepared.catalogue["item"].tolist() == ["a", 'b "x"', "c, d", "é"]
    assert prepared.histories.items_E.tolist() == [3, 1, 4, 2] and prepared.histories.times_E.tolist() == [2, 3, 9, 1]
    expected = prepare_frames("set", write(tmp_path, ".parquet"), processed=tmp_path / "expected")
    assert prepared.fingerprint == expected.fingerprint


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
def test_columns_can_have_any_name(tmp_path, suffix):
    log = write(tmp_path, suffix, names=("who", "what", "when", "stars"))
    columns = {"user": "who", "item": "what", "time": "when", "rating": "stars"}
    prepared = prepare_frames("set", log, processed=tmp_path / "out", columns=columns, min_rating=2)
    assert prepared.histories.times_E.tolist() == [3, 9, 1]
    assert prepared.details["options"] == {"columns": columns}
    with pytest.raises(InputError, match="has no column 'whom' for the user; its columns are who, what, when, stars"):
        prepare_frames("set", log, processed=tmp_path / "out", columns={"user": "whom"})
    with pytest.raises(InputError, match="columns names 'usr', which is none of user, item, time, rating, title"):
        prepare_frames("set", log, processed=tmp_path / "out", columns={"usr": "who"})


def test_item_texts_of_any_name_are_kept(tmp_path):
    items = tmp_path / "items.csv"
    items.write_text('sku,name,colour\na,"Lamp, small",red\né,Café,\n', encoding="utf-8")
    columns = {"item": "item_id", "title": "name"}
    with pytest.raises(InputError, match=r"items.csv has no column 'item_id' for the item; its columns are sku, name"):
        prepare_frames("set", write(tmp_path, ".tsv"), items, processed=tmp_path / "out", columns=columns)
    items.write_text(items.read_text(encoding="utf-8").replace("sku", "item_id"), encoding="utf-8")
    prepared = prepare_frames("set", write(tmp_path, ".tsv"), items, processed=tmp_path / "out", columns=columns)
    assert prepared.catalogue["title"].tolist() == ["Lamp, small", "", "", "Café"]
    assert prepared.catalogue["colour"].tolist() == ["red", "", "", ""]
    with pytest.raises(InputError, match="items.csv has no column 'title' for the title"):
        prepare_frames("set", write(tmp_path, ".tsv"), items, processed=tmp_path / "out")


def test_without_times_the_order_of_the_rows_is_the_order(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("user\titem\nu\tz\nv\tz\nu\ta\nu\tm\n", encoding="utf-8")
    prepared = prepare_frames("set", log, processed=tmp_path / "out")
    assert prepared.histories.items_E.tolist() == [3, 1, 2, 3] and not prepared.histories.times_E.any()


@pytest.mark.parametrize("header", ["", "user\t\titem", "user\tuser\titem"])
def test_a_header_must_name_every_column_once(tmp_path, header):
    (tmp_path / "log.tsv").write_text(header, encoding="utf-8")
    with pytest.raises(InputError, match="line 1: expected a header of distinct column names"):
        frames.read(duckdb.connect(), {"interactions": tmp_path / "log.tsv"})


def test_names_are_quoted_as_sql_wants_them():
    assert frames.quoted('a"b') == '"a""b"' and frames.literal("it's") == "'it''s'"
    assert [frames.suffix_of(name) for name in ("a.TSV", "b.jsonl.gz", "c.gz")] == [".tsv", ".jsonl", ""]


def test_a_path_with_quotes_and_blanks_is_read(tmp_path):
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    assert prepare_frames("set", write(folder, ".tsv"), processed=folder / "out").num_items == 4
