"""From a publisher's files to a prepared set: read, check, filter, order, split, write, all in bounded memory.

`data/sets.yaml` names the sets; `Choices` holds everything that changes who is tested on what. The folder of a set is
written under a partial name, synced and renamed, so that a kill leaves the old set or none.
"""

import difflib
import errno
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path

import numpy as np

from textrec.data import filtering, splitting
from textrec.data.catalogue import build_catalogue
from textrec.data.histories import Histories
from textrec.data.prepared import PreparedSet
from textrec.data.sources import Tables
from textrec.data.sources.frames import literal
from textrec.paths import PROCESSED, raw_data
from textrec.schema import InputError
from textrec.seeding import generator

FORMAT = 1  # of the folder and of the fingerprint; a higher one makes every set anew
MEMORY_LIMIT = "2GB"  # of DuckDB; beyond it, tables spill to the partial folder
BATCH_ROWS = 500_000
Progress = Callable[[str], None]

ALLOWED = {
    "duplicate_rule": ("keep_all", "keep_first", "keep_last"),
    "core_order": filtering.CORE_ORDERS,
    "time_tie_rule": ("stable", "hash", "item_id", "given"),
    "missing_time_rule": ("refuse", "drop", "row_order"),
    "split": splitting.SPLITS,
    "cold_targets": ("keep", "drop"),
    "catalogue": ("interacted", "all"),
    "unknown_items": ("keep", "drop", "refuse"),
    "duplicate_items": ("first_non_empty", "refuse"),
}


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Everything that changes who is tested on what, in the order in which it is applied."""

    missing_time_rule: str = "refuse"  # row_order: a blank time is that of the user's preceding row
    min_rating: float | None = None  # keep interactions rated at least this; blank ratings go
    time_tie_rule: str = "stable"  # equal times: file order | hash of user, item, time | item id; given: file order throughout
    duplicate_rule: str = "keep_all"  # repeated user-item pairs, first and last in the order above
    unknown_items: str = "keep"  # items of the interactions without a row in the item table
    min_user: int = 0  # interactions per user
    min_item: int = 0  # interactions per item
    core_order: str = "together"  # what is counted before what is dropped
    core_repeat: bool = False  # until nothing is lost: the k-core
    user_sample: int | None = None  # users kept at random; the catalogue stays whole
    catalogue: str = "interacted"  # candidates: items with interactions, or every listed item, too
    duplicate_items: str = "first_non_empty"  # several rows of one item in the item table
    split: str = "leave_one_out"
    validation: str | int = "all"  # all | none | the number of random users who give up a validation target
    test_share: float = 0.1  # of splits other than leave_one_out
    cold_targets: str = "keep"  # targets whose item no training interaction has
    seed: int = 0  # of the user sample, the split and the validation users

    def __post_init__(self):
        for name, allowed in ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} is {value!r}; expected one of {', '.join(allowed)}{_closest(value, allowed)}")
        for name, low in (("min_user", 0), ("min_item", 0), ("seed", 0), ("user_sample", 1)):
            value = getattr(self, name)
            if not (value is None and name == "user_sample") and (type(value) is not int or value < low):
                raise InputError(f"{name} is {value!r}; expected a whole number of at least {low}")
        if type(self.core_repeat) is not bool:
            raise InputError(f"core_repeat is {self.core_repeat!r}; expected true or false")
        if self.min_rating is not None and type(self.min_rating) not in (int, float):
            raise InputError(f"min_rating is {self.min_rating!r}; expected a number")
        if type(self.test_share) is not float or not 0 < self.test_share < 0.5:
            raise InputError(f"test_share is {self.test_share!r}; expected a number between 0 and 0.5")
        if self.validation not in ("all", "none") and (type(self.validation) is not int or self.validation < 1):
            hint = _closest(self.validation, ("all", "none"))
            raise InputError(f"validation is {self.validation!r}; expected all, none or a number of users{hint}")

    @classmethod
    def of(cls, values: Mapping) -> "Choices":
        """Build from a mapping; a misspelt name is an error that names the closest one."""
        names = [entry.name for entry in fields(cls)]
        for name in values:
            if name not in names:
                raise InputError(f"{name!r} is no choice of data preparation{_closest(name, names)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class SetRecipe:
    """One entry of `sets.yaml`: which reader makes the set from which files, with which choices."""

    name: str
    reader: str  # module.function under textrec.data.sources
    files: dict[str, str] = field(default_factory=dict)  # role: path under the raw folder
    options: dict = field(default_factory=dict)  # keyword arguments of the reader
    choices: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)  # the publisher's users, items, interactions
    note: str = ""


@cache
def known_sets() -> dict[str, SetRecipe]:
    """Return the recipes of `sets.yaml` by name."""
    import yaml

    text = (Path(__file__).parent / "sets.yaml").read_text(encoding="utf-8")
    return {name: SetRecipe(name=name, **entry) for name, entry in yaml.safe_load(text).items()}


def prepare(
    name: str,
    *,
    raw: Path | None = None,
    processed: Path | None = None,
    progress: Progress | None = None,
    **choices,
) -> PreparedSet:
    """Build the set `name` of `sets.yaml`, or reuse it where sources and choices are unchanged.

    `choices` override the recipe's; the folder then carries them in its name, so a variant never replaces the set.
    """
    recipe = known_sets().get(name)
    if recipe is None:
        raise InputError(f"{name!r} is no known data set{_closest(name, known_sets())}: see `textrec data list`")
    raw = Path(raw) if raw else raw_data()
    files = {role: raw / path for role, path in recipe.files.items()}
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path} is missing: `textrec data download {name}` fetches it, or set TEXTREC_DATA to its folder")
    resolved = Choices.of({**recipe.choices, **choices})
    changed = {key: value for key, value in choices.items() if value != asdict(Choices.of(recipe.choices))[key]}
    name += "".join(f"+{key}={value}" for key, value in sorted(changed.items()))
    return _prepare(name, recipe, files, resolved, Path(processed or PROCESSED), progress)


def prepare_frames(
    name: str,
    interactions: Path,
    items: Path | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    processed: Path | None = None,
    progress: Progress | None = None,
    **choices,
) -> PreparedSet:
    """Prepare two files of your own (TSV, CSV, JSON lines or Parquet, gzipped or not) as the set `name`.

    `columns` maps user, item, time, rating and title to the names in your files. Without a time column the order of a
    user's rows is the time order.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} cannot name a data set: it becomes a folder name")
    files = {"interactions": Path(interactions)} | ({"items": Path(items)} if items else {})
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path} is not a file")
    recipe = SetRecipe(name=name, reader="frames.read", options={"columns": dict(columns)} if columns else {})
    return _prepare(name, recipe, files, Choices.of(choices), Path(processed or PROCESSED), progress)


def _prepare(name, recipe: SetRecipe, files: dict[str, Path], choices: Choices, processed: Path, progress) -> PreparedSet:
    identity = {
        "name": name,
        "format": FORMAT,
        "reader": recipe.reader,
        "options": recipe.options,
        "sources": [
            {"role": role, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for role, path in sorted(files.items())
        ],
        "choices": asdict(choices),
    }
    folder = processed / name
    if (folder / "fingerprint.json").is_file():
        found = PreparedSet.load(folder)
        if all(found.details.get(key) == value for key, value in identity.items()):
            return found
    try:
        with _staged(folder) as partial, _database(partial / "work") as connection:
            details = _build(connection, recipe, files, choices, partial, progress)
            text = json.dumps({**identity, **details, "published": recipe.published, "note": recipe.note}, indent=1)
            (partial / "fingerprint.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"the disk of {processed} is full: free some space and prepare {name} again") from error
    return PreparedSet.load(folder)


def _build(connection, recipe: SetRecipe, files, choices: Choices, folder: Path, progress) -> dict:
    """Write the arrays and tables of one set into `folder`; return the part of the fingerprint they decide."""
    module, function = recipe.reader.rsplit(".", 1)
    reader = getattr(importlib.import_module(f"textrec.data.sources.{module}"), function)
    where = files.get("interactions", recipe.name)
    with _readable(connection, files):
        tables = reader(connection, files, **recipe.options)
        _read_interactions(connection, tables, where, choices)
    has_times = _complete_times(connection, choices, where, tables.first_line)
    steps = filtering.FilterSteps(connection, progress)
    order = _order(choices, has_times)
    _filter(steps, choices, order, tables)
    with _readable(connection, files):
        catalogue = _number(connection, choices, tables)
    arrays = _write_histories(connection, folder, order, has_times)
    histories = Histories.load(folder)
    split = splitting.split_histories(
        histories,
        split=choices.split,
        validation=choices.validation,
        test_share=choices.test_share,
        cold_targets=choices.cold_targets,
        seed=choices.seed,
    )
    for key, array in (
        ("train_end", split.train_end_U),
        ("validation_target", split.validation_target_U),
        ("test_target", split.test_target_U),
    ):
        np.save(folder / f"{key}.npy", array)
        arrays[key] = hashlib.sha256(array.tobytes()).hexdigest()
    arrays |= _write_tables(connection, folder)
    num_items = connection.execute("SELECT count(*) FROM catalogue").fetchall()[0][0]
    counts = {"users": histories.num_users, "items": num_items, "interactions": len(histories.items_E)}
    text_hash = arrays.pop("catalogue_text")
    changed = {key: value for key, value in asdict(choices).items() if value != getattr(Choices, key)}
    decided = json.dumps([changed, arrays], sort_keys=True)  # a choice added later leaves older fingerprints as they are
    return {
        "times": "seconds" if has_times else "order",
        "counts": counts,
        "targets": {which: len(split.targets(which)[0]) for which in ("validation", "test")},
        "steps": steps.counts,
        "catalogue": catalogue,
        "ties": splitting.tie_statistics(histories),
        "arrays": arrays,
        "catalogue_text": text_hash,
        "fingerprint": hashlib.sha256(decided.encode()).hexdigest(),
    }


def _read_interactions(connection, tables: Tables, where, choices: Choices) -> None:
    """Create `users`, `source_items` and the typed table `log` (u, i, time, row, rating); refuse what cannot be typed."""
    names = [row[0] for row in connection.execute(f"DESCRIBE {tables.interactions}").fetchall()]
    texts = {name: f"trim(CAST({name} AS VARCHAR))" if name in names else "NULL" for name in ("user", "item", "time", "rating")}
    number = "CASE WHEN isfinite(try_cast({0} AS DOUBLE)) THEN try_cast({0} AS DOUBLE) END"
    time, rating = (number.format(texts[name]) for name in ("time", "rating"))
    connection.execute(f"""CREATE TABLE typed AS
        SELECT {texts["user"]} AS user, {texts["item"]} AS item, {time} AS time, {rating} AS rating,
            CASE WHEN {texts["time"]} <> '' AND {time} IS NULL THEN {texts["time"]} END AS bad_time,
            CASE WHEN {texts["rating"]} <> '' AND {rating} IS NULL THEN {texts["rating"]} END AS bad_rating,
            row_number() OVER () - 1 AS row FROM ({tables.interactions})""")
    for column, condition, expected in (
        ("user", "user IS NULL OR user = ''", "a user id"),
        ("item", "item IS NULL OR item = ''", "an item id"),
        ("bad_time", "bad_time IS NOT NULL", "unix seconds or a blank"),
        ("bad_rating", "bad_rating IS NOT NULL", "a number or a blank"),
    ):
        found = connection.execute(f"SELECT row, {column} FROM typed WHERE {condition} ORDER BY row LIMIT 1").fetchall()
        for row, value in found:
            label = column.removeprefix("bad_")
            raise InputError(f"{where}, line {row + tables.first_line}: the {label} is {value or ''!r}; expected {expected}")
    for table, column, short in (("users", "user", "u"), ("source_items", "item", "i")):
        # the order of external ids, numeric ones by value, so that ids do not depend on the order of the file
        connection.execute(f"""CREATE TABLE {table} AS SELECT {column},
            CAST(row_number() OVER (ORDER BY try_cast({column} AS BIGINT) NULLS LAST, {column}) - 1 AS INTEGER) AS {short}
            FROM (SELECT DISTINCT {column} FROM typed)""")
    tie = "md5(user || chr(31) || item || chr(31) || coalesce(CAST(time AS VARCHAR), ''))" if choices.time_tie_rule == "hash" else "NULL"
    connection.execute(f"""CREATE TABLE log AS SELECT u, i, time, row, rating, {tie} AS tie
        FROM typed JOIN users USING (user) JOIN source_items USING (item)""")
    connection.execute("DROP TABLE typed")


def _complete_times(connection, choices: Choices, where, first_line: int) -> bool:
    """Apply the rule for blank times; return False where the source has no times at all."""
    total, known, first = connection.execute(
        "SELECT count(*), count(time), min(row) FILTER (WHERE time IS NULL) FROM log"
    ).fetchall()[0]
    if known == 0:
        if choices.time_tie_rule in ("hash", "item_id"):
            raise InputError(f"time_tie_rule is {choices.time_tie_rule!r} but {where} has no times: choose 'given'")
        connection.execute("UPDATE log SET time = 0")
        return False
    if known < total and choices.missing_time_rule == "refuse":
        raise InputError(
            f"{where}, line {first + first_line}: the time is blank ({total - known} rows in all); "
            "choose missing_time_rule 'drop' or 'row_order'"
        )
    if known < total:
        before = "last_value(time IGNORE NULLS) OVER (PARTITION BY u ORDER BY row)"
        after = "first_value(time IGNORE NULLS) OVER (PARTITION BY u ORDER BY row ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING)"
        filled = f"coalesce(time, {before}, {after}, 0)"
        time = filled if choices.missing_time_rule == "row_order" else "time"
        connection.execute(f"CREATE TABLE timed AS SELECT * REPLACE ({time} AS time) FROM log")
        connection.execute("DROP TABLE log")
        connection.execute("CREATE TABLE log AS SELECT * FROM timed WHERE time IS NOT NULL")
        connection.execute("DROP TABLE timed")
    return True


def _order(choices: Choices, has_times: bool) -> str:
    if not has_times or choices.time_tie_rule == "given":
        return "row"
    return {"stable": "time, row", "hash": "time, tie, row", "item_id": "time, i, row"}[choices.time_tie_rule]


def _filter(steps: filtering.FilterSteps, choices: Choices, order: str, tables: Tables) -> None:
    if choices.min_rating is not None:
        filtering.keep_ratings(steps, choices.min_rating)
    if choices.duplicate_rule != "keep_all":
        filtering.drop_duplicates(steps, choices.duplicate_rule, order)
    if choices.unknown_items == "drop" and tables.items:
        steps.connection.execute(f"CREATE TABLE listed_ids AS SELECT DISTINCT CAST(item AS VARCHAR) AS item FROM ({tables.items})")
        known = "i IN (SELECT i FROM source_items SEMI JOIN listed_ids USING (item))"
        steps.keep("items with a row in the item table", f"SELECT * FROM log WHERE {known}")
    filtering.keep_core(
        steps,
        min_user=choices.min_user,
        min_item=choices.min_item,
        order=choices.core_order,
        repeat=choices.core_repeat,
    )
    steps.connection.execute("CREATE TABLE candidate_ids AS SELECT DISTINCT i FROM log")
    if choices.user_sample is not None:
        _sample_users(steps, choices.user_sample, choices.seed)


def _sample_users(steps: filtering.FilterSteps, size: int, seed: int) -> None:
    users = steps.connection.execute("SELECT DISTINCT u FROM log ORDER BY u").fetchnumpy()["u"]
    if size > len(users):
        raise InputError(f"user_sample is {size} but only {len(users)} users are left after the filters")
    import pandas

    sample = pandas.DataFrame({"u": np.sort(generator(seed, "user_sample").choice(users, size, replace=False))})
    steps.connection.register("user_sample", sample)
    steps.keep(f"{size} random users, seed {seed}", "SELECT log.* FROM log SEMI JOIN user_sample USING (u)")
    steps.connection.unregister("user_sample")


def _number(connection, choices: Choices, tables: Tables) -> dict:
    """Give users and items their internal ids and build the catalogue."""
    connection.execute("""CREATE TABLE kept_users AS SELECT u, user,
        CAST(row_number() OVER (ORDER BY u) - 1 AS INTEGER) AS number FROM users SEMI JOIN log USING (u)""")
    candidates = "SELECT item FROM source_items SEMI JOIN candidate_ids USING (i)"
    if choices.catalogue == "all" and tables.items:
        candidates += f" UNION SELECT CAST(item AS VARCHAR) FROM ({tables.items})"
    connection.execute(f"""CREATE TABLE kept_items AS SELECT item,
        CAST(row_number() OVER (ORDER BY try_cast(item AS BIGINT) NULLS LAST, item) AS INTEGER) AS number FROM ({candidates})""")
    return build_catalogue(connection, tables.items, choices.duplicate_items, choices.unknown_items)


def _write_histories(connection, folder: Path, order: str, has_times: bool) -> dict[str, str]:
    """Write `items.npy`, `times.npy` and `offsets.npy` batch by batch; return their sha256."""
    lengths = connection.execute("SELECT count(*) AS n FROM log GROUP BY u ORDER BY u").fetchnumpy()["n"]
    offsets_U1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / "offsets.npy", offsets_U1)
    total = int(offsets_U1[-1])
    terms = ", ".join(f"log.{term}" for term in order.split(", "))
    ordered = connection.sql(f"""SELECT kept_items.number AS item, CAST(floor(log.time) AS BIGINT) AS time FROM log
        JOIN source_items USING (i) JOIN kept_items USING (item) ORDER BY u, {terms}""")
    with _array(folder / "items.npy", np.int32, total) as items, _array(folder / "times.npy", np.int64, total) as times:
        for batch in ordered.to_arrow_reader(BATCH_ROWS):
            items.append(batch.column("item").to_numpy())
            times.append(batch.column("time").to_numpy())
    return {
        "items": items.digest.hexdigest(),
        "times": times.digest.hexdigest(),
        "offsets": hashlib.sha256(offsets_U1.tobytes()).hexdigest(),
    }


class _ArrayFile:
    """A .npy file of known length that grows by appending; plain writes, as a full disk kills a memory map."""

    def __init__(self, file, dtype, length: int):
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (length,)}
        np.lib.format.write_array_header_1_0(file, header)
        self.file, self.dtype, self.digest = file, dtype, hashlib.sha256()

    def append(self, values: np.ndarray) -> None:
        data = np.ascontiguousarray(values, dtype=self.dtype).tobytes()
        self.file.write(data)
        self.digest.update(data)


@contextmanager
def _array(path: Path, dtype, length: int) -> Iterator[_ArrayFile]:
    with path.open("wb") as file:
        yield _ArrayFile(file, dtype, length)


def _write_tables(connection, folder: Path) -> dict[str, str]:
    """Write `users.parquet` and `catalogue.parquet`; return the sha256 of external ids and of the texts."""
    for query, name in (
        ("SELECT user FROM kept_users ORDER BY number", "users"),
        ("SELECT * EXCLUDE (number) FROM catalogue ORDER BY number", "catalogue"),
    ):
        connection.execute(f"COPY ({query}) TO {literal(folder / f'{name}.parquet')} (FORMAT parquet)")
    return {
        "user_ids": _digest(connection, "SELECT user FROM kept_users ORDER BY number"),
        "item_ids": _digest(connection, "SELECT item FROM kept_items ORDER BY number"),
        "catalogue_text": _digest(connection, "SELECT CAST(to_json(catalogue) AS VARCHAR) FROM catalogue ORDER BY number"),
    }


def _digest(connection, query: str) -> str:
    digest = hashlib.sha256()
    connection.execute(query)
    while rows := connection.fetchmany(BATCH_ROWS // 10):
        digest.update("".join(f"{row[0]}\n" for row in rows).encode())
    return digest.hexdigest()


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """Yield a partial folder beside `folder` that takes its place, synced, when the block ends well; else it goes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        old = folder.with_name(f"{folder.name}.partial-{os.getpid()}-old")
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.glob(f"{folder.name}.partial-*"):
        pid = int(path.name.rsplit(".partial-", 1)[1].split("-")[0])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except PermissionError:
            continue


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _database(folder: Path) -> Iterator:
    """A DuckDB connection that works and spills in `folder`, which is gone afterwards."""
    import duckdb

    folder.mkdir()
    connection = duckdb.connect(
        str(folder / "work.duckdb"),
        config={"memory_limit": MEMORY_LIMIT, "temp_directory": str(folder / "spill")},
    )
    connection.execute("SET enable_progress_bar = false")
    try:
        yield connection
    finally:
        connection.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _readable(connection, files: Mapping[str, Path]) -> Iterator[None]:
    """Turn DuckDB's complaint about a file into one sentence that names the file."""
    import duckdb

    try:
        yield
    except (duckdb.IOException, duckdb.InvalidInputException, duckdb.ConversionException) as error:
        message = str(error)
        if "No space left" in message:
            raise OSError(errno.ENOSPC, message) from error
        named = [str(path) for path in files.values() if path.name in message]
        first = " ".join(message.splitlines()[0].split())
        raise InputError(f"{(named or [', '.join(map(str, files.values()))])[0]} cannot be read: {first}") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _closest(value: object, names) -> str:
    found = difflib.get_close_matches(str(value), list(names), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""
