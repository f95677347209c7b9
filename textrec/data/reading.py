"""The first table: a source's rows typed and checked, with integers in place of external ids."""

import gzip
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from textrec.data.choices import Choices
from textrec.data.sources import Tables
from textrec.schema import InputError

TYPED = "coalesce(try_cast(x AS DOUBLE), try_cast(trim(x) AS DOUBLE))"  # few values need to be trimmed
NUMBER = f"CREATE TEMP MACRO number(x) AS CASE WHEN isfinite({TYPED}) THEN {TYPED} END"
MEANT = {"user": "a user id", "item": "an item id", "time": "unix seconds or a blank", "rating": "a number or a blank"}


def read_interactions(connection, tables: Tables, where, choices: Choices) -> None:
    """Create `users`, `source_items` and the typed table `log` (u, i, time, row, rating, tie); refuse wrong values.

    The number of a row is DuckDB's own, which keeps the order of the file: a window function would take one core only.
    Ratings and ties are there where a choice needs them.
    """
    wanted = ["user", "item", "time", *(["rating"] if choices.min_rating is not None else [])]
    given = connection.sql(tables.interactions).columns
    texts = ", ".join(f"CAST({name if name in given else 'NULL'} AS VARCHAR) AS {name}" for name in wanted)
    connection.execute(f"CREATE TABLE source AS SELECT {texts} FROM ({tables.interactions})")
    for table, column, short in (("users", "user", "u"), ("source_items", "item", "i")):
        _number_ids(connection, table, column, short)
    connection.execute(NUMBER)
    columns = [f"number({name}) AS {name}" for name in wanted[2:]]
    if choices.time_tie_rule == "hash":
        columns.append("md5(user || chr(31) || item || chr(31) || coalesce(CAST(number(time) AS VARCHAR), '')) AS tie")
    connection.execute(f"""CREATE TABLE log AS SELECT u, i, source.rowid AS row, {", ".join(columns)}
        FROM source JOIN users USING (user) JOIN source_items USING (item)""")
    for column in wanted:
        _refuse_wrong(connection, column, where, tables.first_line)
    connection.execute("DROP TABLE source")


def _refuse_wrong(connection, column: str, where, first_line: int) -> None:
    """Name the first row without an id, or with a `column` that is neither a number nor blank."""
    wrong = f"{column} IS NULL OR {column} = ''"
    if column in ("time", "rating"):
        if not connection.execute(f"SELECT 1 FROM log WHERE {column} IS NULL LIMIT 1").fetchall():
            return
        wrong = f"number({column}) IS NULL AND trim({column}) <> ''"
    query = f"SELECT rowid, trim({column}) FROM source WHERE {wrong} ORDER BY rowid LIMIT 1"
    for row, value in connection.execute(query).fetchall():
        told = f"{where}, line {row + first_line}: the {column} is {value or ''!r}"
        raise InputError(f"{told}; expected {MEANT[column]}")


def _number_ids(connection, table: str, column: str, short: str) -> None:
    """Create the table of a column's distinct ids in their order; the spaces around ids, where any has some, go."""
    numbered = f"""CREATE OR REPLACE TABLE {table} AS
        SELECT {column}, CAST(row_number() OVER (ORDER BY {natural(column)}) - 1 AS INTEGER) AS {short}
        FROM (SELECT DISTINCT {column} FROM source)"""
    connection.execute(numbered)
    if connection.execute(f"SELECT 1 FROM {table} WHERE {column} <> trim({column}) LIMIT 1").fetchall():
        connection.execute(f"UPDATE source SET {column} = trim({column})")
        connection.execute(numbered)


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
    """Return the first lines of DuckDB's message: not the kind of error, file, data or proposals."""
    lines = []
    for line in re.sub(' in file "[^"]*",?', "", message).split(": ", 1)[-1].splitlines():
        if not line.strip() or line.startswith("Possible"):
            break
        if not line.startswith("Original Line"):
            lines.append(line.strip().rstrip("."))
    return "; ".join(lines)
