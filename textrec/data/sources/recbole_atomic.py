"""RecBole's atomic files: `<name>.inter` and `<name>.item`, tabs, a header of `field:type`; both directions.

Types are token, token_seq (blank-separated), float and float_seq. RecBole reads the files with pandas' default quoting,
so that a text which begins with a quotation mark would swallow its neighbours: the export writes apostrophes instead.
"""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from textrec.data.files import replacing
from textrec.data.prepared import PreparedSet
from textrec.data.sources import Tables
from textrec.data.sources.frames import delimited, find_column, quoted
from textrec.schema import Column, InputError

FIELDS = {  # ours: RecBole's usual names
    Column.user: ("user_id",),
    Column.item: ("item_id",),
    Column.time: ("timestamp",),
    Column.rating: ("rating",),
    Column.title: ("title", "movie_title", "name"),
}
TAB = "\t"
TYPES = ("token", "token_seq", "float", "float_seq")


def read(connection, files: Mapping[str, Path], columns: Mapping[str, str] | None = None) -> Tables:
    """Read `files["interactions"]` (.inter) and, where given, `files["items"]` (.item).

    `columns` maps user, item, time, rating or title to another field than RecBole's usual one.
    """
    path = files["interactions"]
    fields = _fields(path)
    found = {name: find_column(name, fields, columns or {}, FIELDS, path) for name in FIELDS if name != Column.title}
    interactions = f"SELECT {_selected(found)} FROM {delimited(path, fields, TAB, header=True)}"
    items = _item_query(files["items"], columns or {}) if "items" in files else None
    return Tables(interactions=interactions, items=items, first_line=2)


def find(folder: Path) -> dict[str, Path]:
    """Return the .inter file of a folder and, where it is there, the .item file of the same name."""
    found = sorted(folder.glob("*.inter"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InputError(f"{folder} must hold one file <name>.inter of RecBole; found {names}")
    items = found[0].with_suffix(".item")
    return {"interactions": found[0]} | ({"items": items} if items.is_file() else {})


def _item_query(path: Path, columns: Mapping[str, str]) -> str:
    fields = _fields(path)
    found = {name: find_column(name, fields, columns, FIELDS, path) for name in (Column.item, Column.title)}
    title = "" if found[Column.title] else ", '' AS title"
    others = "".join(f", {quoted(field)}" for field in fields if field not in found.values())
    return f"SELECT {_selected(found)}{title}{others} FROM {delimited(path, fields, TAB, header=True)}"


def write(interactions, items, folder: Path, name: str) -> None:
    """Write two pandas tables (user, item, time, rating; item and texts) as `<name>/<name>.inter` and `.item`."""
    fields = {Column.user: "user_id:token", Column.item: "item_id:token", Column.rating: "rating:float",
              Column.time: "timestamp:float"}  # fmt: skip
    present = interactions[[column for column in fields if column in interactions]]
    _write(present.rename(columns=fields), folder / name / f"{name}.inter")
    texts = {column: f"{column}:token_seq" for column in items.columns if column != Column.item}
    joined = items.map(lambda value: " ".join(value) if isinstance(value, list) else value)
    _write(joined.rename(columns={Column.item: "item_id:token", **texts}), folder / name / f"{name}.item")


def export(prepared: PreparedSet, folder: Path) -> Path:
    """Write a prepared set as `<folder>/<name>/<name>.inter` and `.item` and return that folder.

    RecBole orders by `timestamp`: a set without times, or with ties, gets positions in place of seconds.
    """
    write(interactions_of(prepared), prepared.catalogue, folder, prepared.name)
    return folder / prepared.name


def interactions_of(prepared: PreparedSet):
    """Return the histories as a pandas table of external ids: user, item, time (positions where times do not order)."""
    import pandas

    histories = prepared.histories
    users_E = np.repeat(np.arange(histories.num_users), histories.lengths_U)
    positions_E = np.arange(len(users_E)) - histories.offsets_U1[users_E]
    ordered = np.all((np.diff(histories.times_E) > 0) | (np.diff(users_E) > 0))
    columns = {
        Column.user: prepared.users.to_numpy()[users_E],
        Column.item: prepared.catalogue[Column.item].to_numpy()[np.asarray(histories.items_E) - 1],
        Column.time: np.asarray(histories.times_E) if ordered else positions_E,
    }
    return pandas.DataFrame(columns)


def _fields(path: Path) -> list[str]:
    """Return the field names of the header; every one must say its type."""
    with path.open("rb") as file:
        header = file.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n").split("\t")
    for column in header:
        if column.rpartition(":")[2] not in TYPES or ":" not in column:
            raise InputError(f"{path}, line 1: {column!r} is no field of name:type, type one of {', '.join(TYPES)}")
    return [column.rpartition(":")[0] for column in header]


def _selected(found: Mapping[str, str | None]) -> str:
    return ", ".join(f"{quoted(field)} AS {name}" for name, field in found.items() if field)


def _write(table, path: Path) -> None:
    texts = table.select_dtypes(include=["object", "string"]).columns
    plain = table[texts].replace({r"\s+": " ", '"': "'"}, regex=True)
    with replacing(path) as partial:
        table.assign(**plain).to_csv(partial, sep="\t", index=False, quoting=csv.QUOTE_NONE)
