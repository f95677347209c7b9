"""The item table: external ids in, internal ids and clean text columns out. The raw files are never changed."""

import html
import re

from textrec.data.sources.frames import quoted
from textrec.schema import InputError

DROPPED_BLOCK = re.compile(r"<(script|style)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
TAG = re.compile(
    r"</?[a-zA-Z][^<>]*>|<!--.*?-->"
    r"|<[a-zA-Z]+(?:\s+[\w-]+=\"[^\"]*\"?)+\s*$"  # a tag whose end the publisher cut off
    r"|\"?\s*/>",  # a tag whose beginning was cut off
    re.DOTALL,
)
SPACE = re.compile(r"\s+")
NOT_CLEAN = "[^ -%''-;=-~]|/>|  |^ | $"  # in SQL, what sends a text to `clean_text`: few texts carry any of it


def clean_text(text: str) -> str:
    """Return `text` without tags, with entities resolved and white space collapsed.

    Entities are resolved twice because publishers escape already escaped text (`&amp;quot;`); tags go before and
    after, as `&lt;br&gt;` is a tag, too. The halves of tags that the publisher's crawler cut off go as well.
    """
    if "<" in text or "&" in text or "/>" in text:
        text = html.unescape(html.unescape(_without_tags(text)))
        text = _without_tags(text)
    return SPACE.sub(" ", text).strip()


def _without_tags(text: str) -> str:
    return TAG.sub(" ", DROPPED_BLOCK.sub(" ", text))


def list_items(connection, items_query: str, *, all_items: bool) -> list[str]:
    """Create the table `listed` of all rows of an item table, read once; return its text columns.

    Lists become one text joined by ", ". Items outside `source_items` get no texts unless `all_items`.
    """
    columns = connection.execute(f"DESCRIBE {items_query}").fetchall()
    texts = {quoted(name): kind for name, kind, *_ in columns if name != "item"}
    wanted = "true" if all_items else "i IS NOT NULL"
    values = ", ".join(f"CASE WHEN {wanted} THEN {text_of(name, kind)} END AS {name}" for name, kind in texts.items())
    connection.execute(f"""CREATE TABLE listed AS SELECT item, {values}
        FROM (SELECT * REPLACE (trim(CAST(item AS VARCHAR)) AS item) FROM ({items_query}))
        LEFT JOIN source_items USING (item)""")
    return list(texts)


def build_catalogue(connection, names: list[str] | None, *, duplicate_items: str, unknown_items: str) -> dict[str, int]:
    """Create the table `catalogue` (item, title, text columns) in the order of the table `kept_items`; return counts.

    `kept_items` has the columns `item` (external id) and `textrec_number` (internal id from 1); `names` are the text
    columns of `listed`, None where there is no item table. Of several rows of one item each column takes the first that
    is not empty after cleaning.
    """
    if names is None:
        connection.execute("CREATE TABLE catalogue AS SELECT textrec_number, item, '' AS title FROM kept_items")
        kept = _count(connection, "kept_items")
        return {"listed": 0, "duplicate_rows": 0, "without_row": kept, "without_title": kept}
    listed, distinct = connection.execute("SELECT count(item), count(DISTINCT item) FROM listed").fetchall()[0]
    if duplicate_items == "refuse" and listed > distinct:
        query = "SELECT item FROM listed GROUP BY item HAVING count(*) > 1 ORDER BY min(rowid) LIMIT 1"
        repeated = connection.execute(query).fetchall()[0][0]
        told = f"the item table lists {repeated!r} more than once"
        raise InputError(f"{told}: choose duplicate_items 'first_non_empty' to merge rows")
    absent = "kept_items ANTI JOIN listed USING (item)"
    without_row = _count(connection, absent)
    if unknown_items == "refuse" and without_row:
        item = connection.execute(f"SELECT item FROM {absent} ORDER BY textrec_number LIMIT 1").fetchall()[0][0]
        told = f"{without_row} items of the interactions have no row in the item table, first {item!r}"
        raise InputError(f"{told}: choose unknown_items 'keep' to give them an empty title")
    _merge_rows(connection, names)
    without_title = _count(connection, "catalogue WHERE title = ''")
    counts = {"listed": listed, "duplicate_rows": listed - distinct}
    return counts | {"without_row": without_row, "without_title": without_title}


def _merge_rows(connection, names: list[str]) -> None:
    connection.create_function("clean_text", clean_text, ["VARCHAR"], "VARCHAR")
    clean = "CASE WHEN regexp_matches({0}, '{1}') THEN clean_text({0}) ELSE {0} END AS {0}"
    cleaned = ", ".join(clean.format(name, NOT_CLEAN) for name in names)
    merged = ", ".join(f"arg_min({name}, textrec_row) FILTER (WHERE {name} <> '') AS {name}" for name in names)
    filled = ", ".join(f"coalesce({name}, '') AS {name}" for name in names)
    kept = f"SELECT item, listed.rowid AS textrec_row, {cleaned} FROM listed SEMI JOIN kept_items USING (item)"
    connection.execute(f"""CREATE TABLE catalogue AS SELECT textrec_number, item, {filled} FROM kept_items
        LEFT JOIN (SELECT item, {merged} FROM ({kept}) GROUP BY item) USING (item)""")


def text_of(column: str, kind: str) -> str:
    """Return the SQL that turns a value of type `kind` into text: lists, nested or not, are joined by ", "."""
    if kind == "VARCHAR":
        return column
    value = column if kind == "JSON" else f"to_json({column})"
    flat = f"json_extract_string({value}, '$[*]')"
    nested = f"json_extract_string({value}, '$[*][*]')"
    parts = f"CASE json_type({value}, '$[0]') WHEN 'ARRAY' THEN {nested} ELSE {flat} END"
    return f"""CASE json_type({value}) WHEN 'NULL' THEN '' WHEN 'VARCHAR' THEN {value}->>'$'
        WHEN 'ARRAY' THEN array_to_string(list_filter({parts}, lambda part: part <> ''), ', ')
        ELSE CAST({value} AS VARCHAR) END"""


def _count(connection, relation: str) -> int:
    return connection.execute(f"SELECT count(*) FROM {relation}").fetchall()[0][0]
