"""Every publisher's format is written from one synthetic set and read back by its own reader."""

import gzip
import importlib
import re

import duckdb
import pytest

from textrec.data.catalogue import text_of
from textrec.data.sources.synthetic import SyntheticConfig, generate
from textrec.data.sources.synthetic_files import PUBLISHERS, write_raw
from textrec.schema import InputError

MADE = generate(SyntheticConfig(num_users=40, seed=5))
ORDER_ONLY = {"mind", "bilibili", "recformer"}
DAYS = {"hm"}
WITHOUT_BRAND = {"movielens-100k", "movielens-1m", "movielens-csv", "mind", "hm", "bilibili"}


def number(external: str) -> int:
    return int(re.sub(r"\D", "", external))


def read(publisher, files, connection):
    module, function = PUBLISHERS[publisher][0].split(".")
    return getattr(importlib.import_module(f"textrec.data.sources.{module}"), function)(connection, files)


def rows_of(publisher, files):
    """Return the interactions in the user's time order, file order breaking ties, and the items."""
    connection = duckdb.connect()
    tables = read(publisher, files, connection)
    relation = connection.sql(tables.interactions)
    has_times = "time" in relation.columns
    rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    key = (lambda row: (number(row["user"]), float(row["time"]))) if has_times else (lambda row: number(row["user"]))
    columns = connection.sql(tables.items).columns
    texts = ", ".join(f"{text_of(name)} AS {name}" for name in columns if name in ("item", "title", "brand"))
    items = connection.sql(f"SELECT {texts} FROM ({tables.items})")
    return sorted(rows, key=key), [dict(zip(items.columns, row, strict=True)) for row in items.fetchall()]


@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_the_same_histories_come_back(publisher, tmp_path):
    rows, items = rows_of(publisher, write_raw(MADE, tmp_path, publisher))
    interactions = MADE.interactions()
    assert [number(row["user"]) for row in rows] == interactions["user"].astype(int).tolist()
    assert [number(row["item"]) for row in rows] == MADE.items_E.tolist()
    if publisher not in ORDER_ONLY:
        resolution = 86_400 if publisher in DAYS else 1
        assert [int(float(row["time"])) for row in rows] == (MADE.times_E // resolution * resolution).tolist()
    if "rating" in rows[0]:
        assert [float(row["rating"]) for row in rows] == interactions["rating"].tolist()


@pytest.mark.parametrize("publisher", PUBLISHERS)
def test_the_same_item_texts_come_back(publisher, tmp_path):
    _, items = rows_of(publisher, write_raw(MADE, tmp_path, publisher))
    expected = MADE.items()
    found = {number(row["item"]): row for row in items}
    assert sorted(found) == list(range(1, 61))
    for row in expected.itertuples():
        title = re.sub(r" \(\d{4}\)$", "", found[int(row.item)]["title"])
        assert title == (row.title.replace('"', "'") if publisher == "recbole" else row.title)
        if publisher not in WITHOUT_BRAND:
            assert found[int(row.item)]["brand"] == row.brand


def test_files_carry_the_habits_of_their_publishers(tmp_path):
    latin = write_raw(MADE, tmp_path / "1m", "movielens-1m")["items"].read_bytes()
    assert "crème".encode("latin-1") in latin
    assert b"::" in latin
    articles = write_raw(MADE, tmp_path / "hm", "hm")["items"].read_text(encoding="utf-8")
    assert articles.splitlines()[1].startswith("0000000001,")
    with gzip.open(write_raw(MADE, tmp_path / "2014", "amazon-2014")["items"], "rt") as file:
        assert file.readline().startswith("{'asin': 'B000000001'")


def test_unknown_publisher_is_refused(tmp_path):
    with pytest.raises(InputError, match="netflix"):
        write_raw(MADE, tmp_path, "netflix")
