"""One module per publisher's format; each yields the canonical interaction table and an item table.

A reader is a function `read(connection, files, **options) -> Tables`: `connection` is a DuckDB connection, `files` maps
the roles of a recipe in `sets.yaml` ("interactions", "items", ...) to existing files, `options` come from the recipe.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Queries that yield a source's rows in file order; anything not in files is registered on the connection first.

    `interactions` yields user, item and, where the source has them, time (unix seconds, fractions allowed; blank or
    NULL where unknown) and rating. `items` yields item and text columns (title first), as text or lists of text;
    further rows of an item are allowed. Values may be text: they are checked and converted in one place, and a wrong
    one is reported as line `first_line` + its row.
    """

    interactions: str
    items: str | None = None
    first_line: int = 1
