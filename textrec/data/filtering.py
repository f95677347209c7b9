"""Filters over the interaction table `log` (u, i, time, row, rating) in SQL, with the counts after every one.

DuckDB streams and spills, so memory stays bounded however long the table is. `u` and `i` are dense integers of the
unfiltered source.
"""

from collections.abc import Callable

from textrec.schema import InputError

CORE_ORDERS = ("together", "users_first", "items_first")


class FilterSteps:
    """Applies conditions to the table `log` one after the other and keeps `{"step", users, items, interactions}`."""

    def __init__(self, connection, progress: Callable[[str], None] | None = None):
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
        row = self.connection.execute("SELECT count(DISTINCT u), count(DISTINCT i), count(*) FROM log").fetchall()[0]
        counts = dict(zip(("users", "items", "interactions"), row, strict=True))
        self.counts.append({"step": step, **counts})
        if self._progress:
            self._progress(f"{step}: {row[0]:,} users, {row[1]:,} items, {row[2]:,} interactions")
        if not counts["interactions"]:
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
    users = f"u IN (SELECT u FROM log GROUP BY u HAVING count(*) >= {min_user})" if min_user > 1 else None
    items = f"i IN (SELECT i FROM log GROUP BY i HAVING count(*) >= {min_item})" if min_item > 1 else None
    conditions = [items, users] if order == "items_first" else [users, items]
    conditions = [condition for condition in conditions if condition]
    if order == "together" and conditions:
        conditions = [" AND ".join(conditions)]
    minima = ", ".join(f"{kind} >= {k}" for kind, k in (("users", min_user), ("items", min_item)) if k > 1)
    lost, passes = True, 0
    while conditions and lost and (repeat or passes == 0):
        passes += 1
        name = f"interactions of {minima}" + (f", pass {passes}" if repeat else "")
        before = steps.counts[-1]["interactions"]
        for condition in conditions:
            steps.keep(name, f"SELECT * FROM log WHERE {condition}")
        lost = steps.counts[-1]["interactions"] < before
