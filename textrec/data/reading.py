"""The first table: a source's rows typed and checked, with integers in place of external ids."""

import gzip
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from textrec.data.choices import Choices
from textrec.data.sources import Tables
from textrec.schema import InputError


def read_interactions(connection, tables: Tables, where, choices: Choices) -> None:
    """Create `users`, `source_items` and the typed table `log` (u, i, time, row, rating, tie); refuse wrong values.

    The number of a row is DuckDB's own, which keeps the order of the file: a window function would take one core only.
    Ratings are read where a choice needs them.
    """
    used = {"user", "item", "time", *(["rating"] if choices.min_rating is not None else [])}
    used &= set(connection.sql(tables.interactions).columns)
    columns = ("user", "item", "time", "rating")
    texts = {name: f"trim(CAST({name} AS VARCHAR))" if name in used else "NULL" for name in columns}
    number = "CASE WHEN isfinite(try_cast({0} AS DOUBLE)) THEN try_cast({0} AS DOUBLE) END"
    time, rating = (number.format(texts[name]) for name in ("time", "rating"))
    connection.execute(f"""CREATE TABLE typed AS
        SELECT {texts["user"]} AS user, {texts["item"]} AS item, {time} AS time, {rating} AS rating,
            CASE WHEN {texts["time"]} <> '' AND {time} IS NULL THEN {texts["time"]} END AS bad_time,
            CASE WHEN {texts["rating"]} <> '' AND {rating} IS NULL THEN {texts["rating"]} END AS bad_rating
        FROM ({tables.interactions})""")
    for column, condition, expected in (
        ("user", "user IS NULL OR user = ''", "a user id"),
        ("item", "item IS NULL OR item = ''", "an item id"),
        ("bad_time", "bad_time IS NOT NULL", "unix seconds or a blank"),
        ("bad_rating", "bad_rating IS NOT NULL", "a number or a blank"),
    ):
        first = f"SELECT rowid, {column} FROM typed WHERE {condition} ORDER BY rowid LIMIT 1"
        for row, value in connection.execute(first).fetchall():
            label = column.removeprefix("bad_")
            place = f"{where}, line {row + tables.first_line}"
            raise InputError(f"{place}: the {label} is {value or ''!r}; expected {expected}")
    for table, column, short in (("users", "user", "u"), ("source_items", "item", "i")):
        connection.execute(f"""CREATE TABLE {table} AS
            SELECT {column}, CAST(row_number() OVER (ORDER BY {natural(column)}) - 1 AS INTEGER) AS {short}
            FROM (SELECT DISTINCT {column} FROM typed)""")
    hashed = "md5(user || chr(31) || item || chr(31) || coalesce(CAST(time AS VARCHAR), ''))"
    tie = hashed if choices.time_tie_rule == "hash" else "NULL"
    connection.execute(f"""CREATE TABLE log AS SELECT u, i, time, typed.rowid AS row, rating, {tie} AS tie
        FROM typed JOIN users USING (user) JOIN source_items USING (item)""")
    connection.execute("DROP TABLE typed")


def natural(column: str) -> str:
    """Return the order of external ids, numeric ones by value: internal ids do not depend on the order of a file."""
    return f"try_cast({column} AS BIGINT) NULLS LAST, {column}"


def complete_times(connection, choices: Choices, where, first_line: int) -> bool:
    """Apply the rule for blank times; return False where the source has no times at all."""
    total, known, first = connection.execute(
        "SELECT count(*), count(time), min(row) FILTER (WHERE time IS NULL) FROM log"
    ).fetchall()[0]
    if known == 0:
        if choices.time_tie_rule in ("hash", "item_id"):
            raise InputError(f"time_tie_rule is {choices.time_tie_rule!r} but {where} has no times: choose 'given'")
        return False
    if known < total and choices.missing_time_rule == "refuse":
        told = f"{where}, line {first + first_line}: the time is blank ({total - known} rows in all)"
        raise InputError(f"{told}; choose missing_time_rule 'drop' or 'row_order'")
    if known < total:
        window = "PARTITION BY u ORDER BY row ROWS BETWEEN"
        before = f"last_value(time IGNORE NULLS) OVER ({window} UNBOUNDED PRECEDING AND CURRENT ROW)"
        after = f"first_value(time IGNORE NULLS) OVER ({window} CURRENT ROW AND UNBOUNDED FOLLOWING)"
        filled = f"SELECT * REPLACE (coalesce(time, {before}, {after}, 0) AS time) FROM log"
        dropped = "SELECT * FROM log WHERE time IS NOT NULL"
        connection.execute(f"CREATE TABLE timed AS {filled if choices.missing_time_rule == 'row_order' else dropped}")
        connection.execute("DROP TABLE log")
        connection.execute("ALTER TABLE timed RENAME TO log")
    return True


@contextmanager
def readable(files: Mapping[str, Path]) -> Iterator[None]:
    """Turn a complaint about a file, DuckDB's or Python's, into one sentence that names the file."""
    import duckdb

    everything = ", ".join(map(str, files.values()))
    try:
        yield
    except (EOFError, UnicodeDecodeError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{everything} cannot be read: {error}") from error
    except (duckdb.IOException, duckdb.InvalidInputException, duckdb.BinderException) as error:
        message = str(error)
        if isinstance(error, duckdb.BinderException) and "Referenced column" not in message:
            raise
        if "No space left" in message:
            raise
        named = ", ".join(str(path) for path in files.values() if path.name in message) or everything
        raise InputError(f"{named} cannot be read: {_reason(message)}") from error


def _reason(message: str) -> str:
    """Return the first lines of DuckDB's message: not the kind of error, the data themselves, its proposals."""
    lines = []
    for line in message.split(": ", 1)[-1].splitlines():
        if not line.strip() or line.startswith("Possible"):
            break
        if not line.startswith("Original Line"):
            lines.append(line.strip().rstrip("."))
    return "; ".join(lines)
