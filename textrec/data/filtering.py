"""Filters over the interaction table `log` (u, i, time, row, rating) in SQL, with the counts after every one.

DuckDB streams and spills, so memory stays bounded however long the table is. `u` and `i` are dense integers of the
unfiltered source.
"""

from collections.abc import Callable

from textrec.schema import InputError

CORE_ORDERS = ("together", "users_first", "items_first")


class FilterSteps:
    """Applies conditions to the table `log` one after the other and keeps `{"step", users, items, interactions}`.

    After every step the tables `count_u` and `count_i` hold the interactions n of each user and item, and `fewest` the
    least n of each.
    """

    def __init__(self, connection, progress: Callable[[str], None] = lambda sentence: None):
        self.connection = connection
        self.counts: list[dict] = []
        self._progress = progress
        self.record("read")

    def keep(self, step: str, query: str) -> None:
        """Replace `log` by `query` and record the counts."""
        self.connection.execute(f"CREATE OR REPLACE TABLE kept AS {query}")
        self.connection.execute("DROP TABLE log")
        self.connection.execute("ALTER TABLE kept RENAME TO log")
        self.record(step)

    def record(self, step: str) -> None:
        """Record the counts of the table as it is; an empty table is the user's mistake."""
        for column in ("u", "i"):
            counted = f"SELECT {column}, count(*) AS n FROM log GROUP BY {column}"
            self.connection.execute(f"CREATE OR REPLACE TABLE count_{column} AS {counted}")
        (users, fewest_u, rows), (items, fewest_i, _) = (
            self.connection.execute(f"SELECT count(*), min(n), coalesce(sum(n), 0) FROM count_{column}").fetchall()[0]
            for column in ("u", "i")
        )
        self.fewest = {"u": fewest_u, "i": fewest_i}
        self.counts.append({"step": step, "users": users, "items": items, "interactions": int(rows)})
        self._progress(f"{step}: {users:,} users, {items:,} items, {rows:,} interactions")
        if not rows:
            raise InputError(f"no interaction is left after the step {step!r}: loosen the choices or check the source")


def keep_ratings(steps: FilterSteps, minimum: float) -> None:
    """Keep interactions rated at least `minimum`; a blank rating does not reach any minimum."""
    rated = steps.connection.execute("SELECT count(rating) FROM log").fetchall()[0][0]
    if not rated:
        raise InputError(f"min_rating is {minimum} but the source has no ratings")
    steps.keep(f"rating >= {minimum:g}", f"SELECT * FROM log WHERE rating >= {float(minimum)}")


def drop_duplicates(steps: FilterSteps, rule: str, order: str) -> None:
    """Keep the first or last interaction of each user with each item, in the history's own `order` (SQL terms)."""
    direction = {"keep_first": "", "keep_last": " DESC"}[rule]
    ordering = ", ".join(term + direction for term in order.split(", "))
    steps.keep(
        f"duplicates: {rule}",
        f"SELECT * FROM log QUALIFY row_number() OVER (PARTITION BY u, i ORDER BY {ordering}) = 1",
    )


def keep_core(steps: FilterSteps, *, min_user: int, min_item: int, order: str, repeat: bool) -> None:
    """Drop users with fewer than `min_user` and items with fewer than `min_item` interactions.

    `order`: `together` counts both before dropping any, `users_first` and `items_first` count the second kind after the
    first was dropped. `repeat` goes on until nothing is lost: the k-core, for which the order does not matter.
    """
    minima = [(column, k) for column, k in (("u", min_user), ("i", min_item)) if k > 1]
    kept = [f"{column} IN (SELECT {column} FROM count_{column} WHERE n >= {k})" for column, k in minima]
    conditions = {"together": [" AND ".join(kept)], "users_first": kept, "items_first": kept[::-1]}[order]
    named = ", ".join(f"{'users' if column == 'u' else 'items'} >= {k}" for column, k in minima)
    passes = 0
    while minima and (passes == 0 or (repeat and any(steps.fewest[column] < k for column, k in minima))):
        passes += 1
        for condition in conditions:
            name = f"interactions of {named}" + (f", pass {passes}" if repeat else "")
            steps.keep(name, f"SELECT * FROM log WHERE {condition}")
