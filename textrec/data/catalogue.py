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


def clean_text(text: str | None) -> str:
    """Return `text` without tags, with entities resolved and white space collapsed.

    Entities are resolved twice because publishers escape already escaped text (`&amp;quot;`); tags go before and
    after, as `&lt;br&gt;` is a tag, too. The halves of tags that the publisher's crawler cut off go as well.
    """
    text = text or ""
    if "<" in text or "&" in text or "/>" in text:
        text = html.unescape(html.unescape(_without_tags(text)))
        text = _without_tags(text)
    return SPACE.sub(" ", text).strip()


def _without_tags(text: str) -> str:
    return TAG.sub(" ", DROPPED_BLOCK.sub(" ", text))


def build_catalogue(connection, items_query: str | None, *, duplicate_items: str, unknown_items: str) -> dict[str, int]:
    """Create the table `catalogue` (item, title, text columns) in the order of the table `kept_items`; return counts.

    `kept_items` has the columns `item` (external id) and `textrec_number` (internal id from 1). Lists become one text
    joined by ", ". Of several rows of one item each column takes the first that is not empty after cleaning.
    """
    if items_query is None:
        connection.execute("CREATE TABLE catalogue AS SELECT textrec_number, item, '' AS title FROM kept_items")
        kept = _count(connection, "kept_items")
        return {"listed": 0, "duplicate_rows": 0, "without_row": kept, "without_title": kept}
    names = _list_rows(connection, items_query)
    listed, distinct = connection.execute("SELECT count(item), count(DISTINCT item) FROM listed").fetchall()[0]
    if duplicate_items == "refuse" and listed > distinct:
        query = "SELECT item FROM listed GROUP BY item HAVING count(*) > 1 ORDER BY min(textrec_row) LIMIT 1"
        repeated = connection.execute(query).fetchall()[0][0]
        raise InputError(
            f"the item table lists {repeated!r} more than once: choose duplicate_items 'first_non_empty' to merge rows"
        )
    absent = "kept_items ANTI JOIN listed USING (item)"
    without_row = _count(connection, absent)
    if unknown_items == "refuse" and without_row:
        item = connection.execute(f"SELECT item FROM {absent} ORDER BY textrec_number LIMIT 1").fetchall()[0][0]
        raise InputError(
            f"{without_row} items of the interactions have no row in the item table, first {item!r}: "
            "choose unknown_items 'keep' to give them an empty title"
        )
    _merge_rows(connection, names)
    return {
        "listed": listed,
        "duplicate_rows": listed - distinct,
        "without_row": without_row,
        "without_title": _count(connection, "catalogue WHERE title = ''"),
    }


def _list_rows(connection, items_query: str) -> list[str]:
    """Create the table `listed` of all rows, with clean texts for the kept items only; return the text columns."""
    columns = connection.execute(f"DESCRIBE {items_query}").fetchall()
    texts = {quoted(name): kind for name, kind, *_ in columns if name != "item"}
    connection.create_function("clean_text", clean_text, ["VARCHAR"], "VARCHAR", null_handling="special")
    cleaned = ", ".join(
        f"CASE WHEN textrec_number IS NOT NULL THEN clean_text({text_of(name, kind)}) END AS {name}"
        for name, kind in texts.items()
    )
    connection.execute(f"""CREATE TABLE listed AS SELECT textrec_row, item, {cleaned} FROM (
        SELECT row_number() OVER () AS textrec_row, * REPLACE (trim(CAST(item AS VARCHAR)) AS item) FROM ({items_query})
        ) LEFT JOIN kept_items USING (item)""")
    return list(texts)


def _merge_rows(connection, names: list[str]) -> None:
    merged = ", ".join(f"arg_min({name}, textrec_row) FILTER (WHERE {name} <> '') AS {name}" for name in names)
    filled = ", ".join(f"coalesce({name}, '') AS {name}" for name in names)
    connection.execute(f"""CREATE TABLE catalogue AS SELECT textrec_number, item, {filled} FROM kept_items
        LEFT JOIN (SELECT item, {merged} FROM listed SEMI JOIN kept_items USING (item) GROUP BY item) USING (item)""")


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
