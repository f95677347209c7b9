"""The two-file form of the text-based collaborative filtering study (TCF): its Bilibili, MIND and H&M sets.

Interactions: user, then the item ids joined by blanks, oldest first; items: id, then a text in which further tabs may
occur. Tabs between the columns, no quoting; one release of the files has header lines, the other has none.
"""

from collections.abc import Mapping
from pathlib import Path

from textrec.data.sources import Tables
from textrec.data.sources.frames import LONGEST_LINE, delimited, literal
from textrec.schema import InputError

HEADERS = ("user", "userid", "user_id", "item", "itemid", "item_id", "newsid", "videoid")


def read(connection, files: Mapping[str, Path]) -> Tables:
    """Read `files["interactions"]` and, where given, `files["items"]`; the order of the ids is the time order."""
    path = files["interactions"]
    connection.execute(f"CREATE TABLE tcf_lines AS {_lines(path)}")
    bad = "SELECT line FROM tcf_lines WHERE first = '' OR trim(rest) = '' ORDER BY line LIMIT 1"
    for (line,) in connection.execute(bad).fetchall():
        raise InputError(f"{path}, line {line}: expected a user, a tab, and item ids joined by blanks")
    connection.execute("""CREATE TABLE tcf_interactions AS
        SELECT first AS user, unnest(string_split_regex(trim(rest), ' +')) AS item FROM tcf_lines""")
    connection.execute("DROP TABLE tcf_lines")
    items = f"SELECT first AS item, rest AS title FROM ({_lines(files['items'])})" if "items" in files else None
    return Tables(interactions="SELECT user, item FROM tcf_interactions", items=items)


def _lines(path: Path) -> str:
    """Split every line at its first tab and leave out a header."""
    lines = delimited(path, ("text",), "\x01", max_line_size=LONGEST_LINE)
    header = ", ".join(map(literal, HEADERS))
    return f"""SELECT line, first, substr(text, length(first) + 2) AS rest FROM (
            SELECT row_number() OVER () AS line, split_part(text, chr(9), 1) AS first, text FROM {lines})
        WHERE line > 1 OR lower(first) NOT IN ({header})"""
