"""Bring your own two files: interactions and, optionally, items as TSV, CSV, JSON lines or Parquet, gzipped or not."""

import csv
import gzip
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from textrec.data.sources import Tables
from textrec.schema import Column, InputError

ALIASES = {
    Column.user: ("user_id", "user"),
    Column.item: ("item_id", "item"),
    Column.time: ("timestamp", "time"),
    Column.rating: ("rating",),
}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
LONGEST_LINE = 16_000_000  # characters, where a line holds a whole history
DELIMITERS = {".tsv": "\t", ".txt": "\t", ".csv": ","}


def read(connection, files: Mapping[str, Path], columns: Mapping[str, str] | None = None) -> Tables:
    """Read `files["interactions"]` and, where given, `files["items"]`.

    `columns` maps a canonical name (user, item, time, rating, title) to the name used in the files; without it user_id,
    item_id, timestamp and rating (or the canonical names) are looked for. Without a time column the order of a user's
    rows is the time order. Every other column of the item file is kept as text.
    """
    columns = dict(columns or {})
    unknown = set(columns) - {Column.user, Column.item, Column.time, Column.rating, Column.title}
    if unknown:
        raise InputError(f"columns names {sorted(unknown)[0]!r}, which is none of user, item, time, rating, title")
    path = files["interactions"]
    relation = scan(path)
    names = connection.sql(f"SELECT * FROM {relation}").columns
    chosen = {name: find_column(name, names, columns, ALIASES, path) for name in ALIASES}
    selected = ", ".join(f"{_value(path, found)} AS {name}" for name, found in chosen.items() if found)
    items = _item_query(connection, files["items"], columns) if "items" in files else None
    header = suffix_of(path) in DELIMITERS
    return Tables(interactions=f"SELECT {selected} FROM {relation}", items=items, first_line=2 if header else 1)


def scan(path: Path) -> str:
    """Return the DuckDB table function that reads `path`, chosen by its suffix; every value is text, typed later."""
    suffix = suffix_of(path)
    if suffix in DELIMITERS:
        quote = '"' if suffix == ".csv" else ""
        return delimited(path, header_names(path), DELIMITERS[suffix], header=True, quote=quote)
    if suffix in JSON_SUFFIXES:
        return f"read_json({literal(path)}, format='newline_delimited', maximum_depth=1, sample_size=-1)"
    if suffix == ".parquet":
        return f"read_parquet({literal(path)})"
    raise InputError(f"{path} has the suffix {suffix!r}; expected .tsv, .csv, .jsonl or .parquet, optionally with .gz")


def delimited(path: Path, names: Iterable[str], delimiter: str, *, quote: str = "", **options) -> str:
    """Return the scan of a delimited text file with these columns, all of them text, and DuckDB's further `options`.

    Nothing is detected: detection skips lines that it does not understand.
    """
    settings = {"header": False, "delim": literal(delimiter), "quote": literal(quote), "escape": literal(quote)}
    listed = ", ".join(f"{name}={value}" for name, value in (settings | options).items())
    columns = ", ".join(f"{literal(name)}: 'VARCHAR'" for name in names)
    return f"read_csv({literal(path)}, auto_detect=false, {listed}, columns={{{columns}}})"


def header_names(path: Path) -> list[str]:
    """Return the column names in the first line of a delimited text file."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            line = file.readline().decode("utf-8-sig")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}, line 1 cannot be read: {error}") from error
    names = next(csv.reader([line], delimiter=DELIMITERS[suffix_of(path)]), [])
    if not names or "" in names or len(set(names)) < len(names):
        raise InputError(f"{path}, line 1: expected a header of distinct column names, found {names}")
    return names


def open_text(path: Path):
    """Open a UTF-8 text file, gzipped or not; a byte order mark is skipped."""
    opener = gzip.open if Path(path).suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")


def _item_query(connection, path: Path, columns: Mapping[str, str]) -> str:
    relation = scan(path)
    names = connection.sql(f"SELECT * FROM {relation}").columns
    item = find_column(Column.item, names, columns, ALIASES, path)
    title = columns.get(Column.title, Column.title)
    if title not in names:
        raise InputError(f"{path} has no column {title!r} for the title; its columns are {', '.join(names)}")
    others = [name for name in names if name not in (item, title)]
    selected = [f"{_value(path, item)} AS item", f"{quoted(title)} AS title", *map(quoted, others)]
    return f"SELECT {', '.join(selected)} FROM {relation}"


def find_column(name: str, names: list[str], columns: Mapping[str, str], aliases, path: Path) -> str | None:
    """Return which of the `names` in a file is our `name`: the one `columns` says, else the first of its `aliases`."""
    wanted = [columns[name]] if name in columns else aliases[name]
    found = next((candidate for candidate in wanted if candidate in names), None)
    if found is None and (name in columns or name in (Column.user, Column.item)):
        raise InputError(f"{path} has no column {wanted[0]!r} for the {name}; its columns are {', '.join(names)}")
    return found


def _value(path: Path, name: str) -> str:
    """Return the SQL of a value without the quotes that JSON text carries."""
    return f"{quoted(name)}->>'$'" if suffix_of(path) in JSON_SUFFIXES else quoted(name)


def suffix_of(path: Path) -> str:
    """Return the lower-case suffix that names the format, with .gz taken off."""
    path = Path(path)
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def quoted(name: str) -> str:  # an identifier of SQL
    return '"' + name.replace('"', '""') + '"'


def literal(value: object) -> str:  # a string of SQL
    return "'" + str(value).replace("'", "''") + "'"
