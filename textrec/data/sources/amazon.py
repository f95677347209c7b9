"""Amazon reviews and metadata of 2014, 2018 and 2023 as the McAuley lab publishes them: a record a line."""

import ast
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from textrec.data.files import unpacked
from textrec.data.sources import Tables
from textrec.data.sources.frames import literal, open_text
from textrec.schema import InputError

REVIEW_FIELDS = {  # a field only this edition has: user, item, time, rating
    "reviewerID": ("reviewerID", "asin", "unixReviewTime", "overall"),
    "user_id": ("user_id", "parent_asin", "timestamp", "rating"),
}
ITEM_FIELDS = {  # the item id of the edition: title, brand, category, description, feature, price
    "parent_asin": ("title", "store", "categories", "description", "features", "price"),
    "asin": ("title", "brand", "category", "description", "feature", "price"),
}
CANONICAL = ("title", "brand", "category", "description", "feature", "price")
LITERAL_BATCH = 20_000


def read(connection, files: Mapping[str, Path]) -> Tables:
    """Read `interactions` (reviews) and, where given, `items` (metadata), each of any edition, told by its fields.

    Times of 2023 are milliseconds: their order is kept, seconds are stored. Only the named fields are looked at, so
    `rank` and the like may change type from row to row.
    """
    path = files["interactions"]
    keys, _ = first_record(path)
    edition = next((fields for key, fields in REVIEW_FIELDS.items() if key in keys), ())
    missing = [name for name in edition or ("reviewerID",) if name not in keys]
    if missing:
        raise InputError(f"{path} has no field {missing[0]!r} in line 1; its fields are {', '.join(keys)}")
    user, item, time, rating = edition
    relation = _json(connection, path, dict.fromkeys(edition, "VARCHAR"))
    # milliseconds to seconds; what is no number stays for the check that names it
    milliseconds = f'coalesce(CAST(try_cast("{time}" AS DOUBLE) / 1000 AS VARCHAR), "{time}")'
    seconds = milliseconds if time == "timestamp" else f'"{time}"'
    query = f'SELECT "{user}" AS user, "{item}" AS item, {seconds} AS time, "{rating}" AS rating FROM {relation}'
    items = _item_query(connection, files["items"]) if "items" in files else None
    return Tables(interactions=query, items=items)


def first_record(path: Path) -> tuple[dict, bool]:
    """Return the first line, and whether it is JSON: the metadata of 2014 are Python literals."""
    with open_text(path) as file:
        line = file.readline()
    try:
        record, is_json = json.loads(line), True
    except json.JSONDecodeError:
        record, is_json = _literal(path, 1, line), False
    if not isinstance(record, dict):
        raise InputError(f"{path}, line 1: expected a JSON object with named fields")
    return record, is_json


def _item_query(connection, path: Path) -> str:
    record, is_json = first_record(path)
    if not is_json:
        return _literal_items(connection, path)
    item = next((key for key in ITEM_FIELDS if key in record), None)
    if item is None:
        raise InputError(f"{path} has no field 'asin' or 'parent_asin' in line 1")
    fields = ITEM_FIELDS[item]
    relation = _json(connection, path, {item: "VARCHAR"} | dict.fromkeys(fields, "JSON"))
    named = [f'"{name}" AS {canonical}' for name, canonical in zip(fields[:-1], CANONICAL, strict=False)]
    # "$1,004.99", "$4.99 - $6.99" (the lowest), 4.99, or a piece of a style sheet (none)
    price = """replace(regexp_extract("price"->>'$', '^\\s*\\$?\\s*([0-9][0-9,]*(\\.[0-9]+)?)', 1), ',', '') AS price"""
    return f'SELECT "{item}" AS item, {", ".join([*named, price])} FROM {relation}'


def _literal_items(connection, path: Path) -> str:
    """Load the metadata of 2014, one Python literal a line, into a table: no SQL reads that format."""
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("item", *CANONICAL)])
    reader = pyarrow.RecordBatchReader.from_batches(schema, _literal_batches(path, schema))
    connection.register("amazon_literals", reader)
    connection.execute("CREATE TABLE amazon_items AS SELECT * FROM amazon_literals")
    connection.unregister("amazon_literals")
    return "SELECT * FROM amazon_items"


def _literal_batches(path: Path, schema) -> Iterator:
    import pyarrow

    rows: list[dict] = []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            record = _literal(path, number, line)
            # paths share their first names
            categories = dict.fromkeys(name for names in record.get("categories", []) for name in names)
            kept = {name: record.get(name) for name in ("title", "brand", "description")}
            price = str(record["price"]) if "price" in record else None
            rows.append({"item": record.get("asin"), **kept, "category": ", ".join(categories), "price": price})
            if len(rows) == LITERAL_BATCH:
                yield pyarrow.RecordBatch.from_pylist(rows, schema=schema)
                rows = []
    yield pyarrow.RecordBatch.from_pylist(rows, schema=schema)


def _literal(path: Path, number: int, line: str) -> dict:
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError) as error:
        raise InputError(f"{path}, line {number}: neither a JSON object nor a Python literal: {line[:40]!r}") from error


def _json(connection, path: Path, columns: Mapping[str, str]) -> str:
    """Return the scan of these columns; a gzip file is unpacked beside DuckDB's spills, as DuckDB does so slowly."""
    if path.suffix == ".gz":
        path = unpacked(path, Path(connection.execute("SELECT current_setting('temp_directory')").fetchall()[0][0]))
    types = ", ".join(f"{literal(name)}: '{kind}'" for name, kind in columns.items())
    return f"read_json({literal(path)}, format='newline_delimited', columns={{{types}}})"
