"""MIND small and large: `behaviors.tsv` and `news.tsv`, tabs, no header, no quoting.

A line of behaviors is one impression: number, user, time, the user's earlier clicks (oldest first, without times) and
the shown items with 1 for a click. All lines of a user repeat nearly the same history; the longest one counts.
"""

from collections.abc import Mapping
from pathlib import Path

from textrec.data.sources import Tables
from textrec.data.sources.frames import LONGEST_LINE, delimited
from textrec.schema import InputError

BEHAVIORS = ("impression", "user", "time", "history", "shown")
NEWS = ("item", "category", "subcategory", "title", "abstract", "url", "title_entities", "abstract_entities")

CLICKS = """SELECT user, left(shown, -2) AS item, 1 AS kind, time, line, position FROM (
        SELECT user, time, line, unnest(string_split(shown, ' ')) AS shown,
            generate_subscripts(string_split(shown, ' '), 1) AS position FROM mind_behaviors)
    WHERE shown LIKE '%-1'"""
HISTORY = """SELECT user, unnest(longest) AS item, 0 AS kind, NULL AS time, 0 AS line,
        generate_subscripts(longest, 1) AS position
    FROM (SELECT user, string_split(arg_max(history, length(history)), ' ') AS longest
        FROM mind_behaviors GROUP BY user)"""


def read(connection, files: Mapping[str, Path], with_history: bool = True) -> Tables:
    """Read the files whose roles begin with `interactions` (train, dev: in the order given) and with `items`.

    With the history a user is: the longest history, then the clicks by time; only the order is known, and a click that
    a later file repeats in its history comes twice (choose `duplicate_rule: keep_first`). Without: timed clicks only.
    """
    logs = [path for role, path in files.items() if role.startswith("interactions")]
    scans = (f"SELECT {part} AS part, * FROM {_scan(path, BEHAVIORS)}" for part, path in enumerate(logs))
    connection.execute(f"""CREATE TABLE mind_behaviors AS
        SELECT row_number() OVER () AS line, part, user, shown, time AS written, coalesce(history, '') AS history,
            try_strptime(time, '%m/%d/%Y %I:%M:%S %p') AS time FROM ({" UNION ALL ".join(scans)})""")
    _check_times(connection, logs)
    source = CLICKS + (f" UNION ALL {HISTORY}" if with_history else "")
    connection.execute(f"""CREATE TABLE mind_interactions AS SELECT user, item, time FROM ({source}) WHERE item <> ''
        ORDER BY user, kind, time, line, position""")
    connection.execute("DROP TABLE mind_behaviors")
    scans = (_scan(path, NEWS) for role, path in files.items() if role.startswith("items"))
    texts = "SELECT item, title, [category, subcategory] AS category, abstract"
    news = " UNION ALL ".join(f"{texts} FROM {scan}" for scan in scans)
    seconds = "" if with_history else ", CAST(epoch(time) AS BIGINT) AS time"
    return Tables(interactions=f"SELECT user, item{seconds} FROM mind_interactions", items=news or None)


def _check_times(connection, logs: list[Path]) -> None:
    wrong = connection.execute("""SELECT part, written, line - first + 1 FROM (
            SELECT *, min(line) OVER (PARTITION BY part) AS first FROM mind_behaviors)
        WHERE time IS NULL ORDER BY line LIMIT 1""").fetchall()
    for part, written, line in wrong:
        raise InputError(f"{logs[part]}, line {line}: the time is {written!r}; expected one like 11/13/2019 8:36:57 AM")


def _scan(path: Path, names: tuple[str, ...]) -> str:
    return delimited(path, names, "\t", max_line_size=LONGEST_LINE)
