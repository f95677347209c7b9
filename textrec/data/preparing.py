"""From a publisher's files to a prepared set: read, check, filter, order, split, write, all in bounded memory.

`data/sets.yaml` names the sets; `Choices` holds everything that changes who is tested on what. The folder of a set is
written under a partial name, synced and renamed, so that a kill leaves the old set or none.
"""

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from operator import itemgetter
from pathlib import Path

import numpy as np

from textrec.data import filtering, splitting
from textrec.data.catalogue import build_catalogue, list_items
from textrec.data.choices import Choices, closest, matching
from textrec.data.files import naming_full_disk, remove_partials
from textrec.data.histories import Histories
from textrec.data.prepared import PreparedSet
from textrec.data.reading import complete_times, natural, read_interactions, readable
from textrec.data.sources.frames import literal
from textrec.data.storage import array_file, database, sha256_of, staged_folder
from textrec.paths import PROCESSED, raw_data
from textrec.schema import InputError
from textrec.seeding import generator

FORMAT = 2  # of the folder and of the fingerprint; a higher one makes every set anew
BATCH_ROWS = 500_000
Progress = Callable[[str], None]


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


def find_recipe(name: str) -> SetRecipe | None:
    """Return the recipe called `name`; `amazon-2018-Video_Games` is `amazon-2018-{category}` of that category."""
    pattern, category = matching(name, known_sets())
    if pattern is None:
        return None
    recipe = known_sets()[pattern]
    files = {role: path.replace("{category}", category) for role, path in recipe.files.items()}
    return replace(recipe, name=name, files=files)


def prepare(
    name: str, *, raw: Path | None = None, processed: Path | None = None, progress: Progress | None = None, **choices
) -> PreparedSet:
    """Build the set `name` of `sets.yaml`, or reuse it where sources and choices are unchanged.

    `choices` override the recipe's; the folder then carries them in its name, so a variant never replaces the set.
    """
    recipe, folder = find_recipe(name), Path(processed or PROCESSED) / name
    if recipe is None and (folder / "fingerprint.json").is_file() and not choices:
        return PreparedSet.load(folder)  # made from files or a folder of the user's own
    if recipe is None:
        raise InputError(f"{name!r} is no known data set{closest(name, known_sets())}: see `textrec data list`")
    raw = Path(raw) if raw else raw_data()
    files = {role: raw / path for role, path in recipe.files.items()}
    for path in files.values():
        if not path.is_file():
            remedy = f"`textrec data download {name}` fetches it, or set TEXTREC_DATA to its folder"
            raise InputError(f"{path} is missing: {remedy}")
    resolved = Choices.of({**recipe.choices, **choices})
    changed = {key: value for key, value in choices.items() if value != asdict(Choices.of(recipe.choices))[key]}
    name += "".join(f"+{key}={value}" for key, value in sorted(changed.items()))
    return prepare_recipe(name, recipe, files, resolved, Path(processed or PROCESSED), progress)


def prepare_frames(name: str, interactions: Path, items: Path | None = None, **options) -> PreparedSet:
    """Prepare two files of your own (TSV, CSV, JSON lines or Parquet, gzipped or not) as the set `name`.

    Without a time column the order of a user's rows is the time order. For `options` see `prepare_own`.
    """
    files = {"interactions": Path(interactions)} | ({"items": Path(items)} if items else {})
    for path in files.values():
        if not path.is_file():
            raise InputError(f"{path} is not a file")
    return prepare_own(name, "frames", files, **options)


def prepare_folder(name: str, folder: Path, project: str, **options) -> PreparedSet:
    """Prepare a folder that `project` (`recbole_atomic` or `recformer_folder`) reads as the set `name`.

    The split is that of the choices; the default, leave-one-out, is the one RecFormer's parts have. For `options` see
    `prepare_own`.
    """
    if options.get("columns") and project == "recformer_folder":
        raise InputError("columns cannot be named for recformer_folder: the names in its files are fixed")
    files = importlib.import_module(f"textrec.data.sources.{project}").find(Path(folder))
    return prepare_own(name, project, files, **options)


def prepare_own(
    name: str,
    module: str,
    files: Mapping[str, Path],
    *,
    columns: Mapping[str, str] | None = None,
    processed: Path | None = None,
    progress: Progress | None = None,
    **choices,
) -> PreparedSet:
    """Prepare the user's own files, which `module` of the sources reads, as the set `name`.

    `columns` maps user, item, time, rating and title to the names in the files, where those are not the usual ones.
    """
    if not name or Path(name).name != name or name.startswith("."):
        raise InputError(f"{name!r} cannot name a data set: it becomes a folder name")
    recipe = SetRecipe(name=name, reader=f"{module}.read", options={"columns": dict(columns)} if columns else {})
    return prepare_recipe(name, recipe, files, Choices.of(choices), Path(processed or PROCESSED), progress)


def prepare_recipe(
    name: str, recipe: SetRecipe, files: Mapping[str, Path], choices: Choices, processed: Path, progress=None
) -> PreparedSet:
    """Build or reuse `processed/name` from `files` (role: path), which `recipe.reader` understands."""
    sources = [
        {"role": role, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for role, path in sorted(files.items())
    ]
    identity = {"name": name, "format": FORMAT, "reader": recipe.reader, "options": recipe.options, "sources": sources}
    identity |= {"choices": asdict(choices)}
    folder = processed / name
    remove_partials(processed, name)
    if (folder / "fingerprint.json").is_file():
        found = PreparedSet.load(folder)
        if all(found.details.get(key) == value for key, value in identity.items()):
            return found
    with (
        naming_full_disk(processed, f"prepare {name} again"),
        staged_folder(folder) as partial,
        database(partial / "work") as connection,
    ):
        details = _build(connection, recipe, files, choices, partial, progress or (lambda sentence: None))
        text = json.dumps({**identity, **details, "published": recipe.published, "note": recipe.note}, indent=1)
        (partial / "fingerprint.json").write_text(text + "\n", encoding="utf-8")
    return PreparedSet.load(folder)


def _build(connection, recipe: SetRecipe, files, choices: Choices, folder: Path, tell: Progress) -> dict:
    """Write the arrays and tables of one set into `folder`; return the part of the fingerprint they decide."""
    module, function = recipe.reader.rsplit(".", 1)
    reader = getattr(importlib.import_module(f"textrec.data.sources.{module}"), function)
    where = files.get("interactions", recipe.name)
    tell(f"reading {where}")
    with readable(files):
        tables = reader(connection, files, **recipe.options)
        read_interactions(connection, tables, where, choices)
        texts = list_items(connection, tables.items, all_items=choices.catalogue == "all") if tables.items else None
    has_times = complete_times(connection, choices, where, tables.first_line)
    steps = filtering.FilterSteps(connection, tell)
    order = _order(choices, has_times)
    _filter(steps, choices, order, listed=texts is not None)
    catalogue = _number(connection, choices, texts)
    tell("writing the histories")
    arrays = _write_histories(connection, folder, order)
    histories = Histories.load(folder)
    named = ("split", "validation", "test_share", "cold_targets", "seed")
    split = splitting.split_histories(histories, **{name: getattr(choices, name) for name in named})
    for name, array in vars(split).items():
        key = name.removesuffix("_U")
        np.save(folder / f"{key}.npy", array)
        arrays[key] = hashlib.sha256(array.tobytes()).hexdigest()
    arrays |= _write_tables(connection, folder)
    text_hash = arrays.pop("catalogue_text")
    num_items = connection.execute("SELECT count(*) FROM catalogue").fetchall()[0][0]
    counts = {"users": histories.num_users, "items": num_items, "interactions": len(histories.items_E)}
    changed = {key: value for key, value in asdict(choices).items() if value != getattr(Choices, key)}
    # defaults are left out: a choice added later leaves older fingerprints as they are
    decided = json.dumps([changed, arrays], sort_keys=True)
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


def _order(choices: Choices, has_times: bool) -> str:
    if not has_times or choices.time_tie_rule == "given":
        return "row"
    return {"stable": "time, row", "hash": "time, tie, row", "item_id": "time, i, row"}[choices.time_tie_rule]


def _filter(steps: filtering.FilterSteps, choices: Choices, order: str, listed: bool) -> None:
    if choices.min_rating is not None:
        filtering.keep_ratings(steps, choices.min_rating)
    if choices.duplicate_rule != "keep_all":
        filtering.drop_duplicates(steps, choices.duplicate_rule, order)
    if choices.unknown_items == "drop" and listed:
        known = "i IN (SELECT i FROM source_items SEMI JOIN listed USING (item))"
        steps.keep("items with a row in the item table", f"SELECT * FROM log WHERE {known}")
    minima = {"min_user": choices.min_user, "min_item": choices.min_item}
    filtering.keep_core(steps, **minima, order=choices.core_order, repeat=choices.core_repeat)
    steps.connection.execute("CREATE TABLE candidate_ids AS SELECT i FROM count_i")
    if choices.user_sample is not None:
        _sample_users(steps, choices.user_sample, choices.seed)


def _sample_users(steps: filtering.FilterSteps, size: int, seed: int) -> None:
    users = steps.connection.execute("SELECT u FROM count_u ORDER BY u").fetchnumpy()["u"]
    if size > len(users):
        raise InputError(f"user_sample is {size} but only {len(users)} users are left after the filters")
    chosen = generator(seed, "user_sample").choice(users, size, replace=False)
    steps.connection.register("user_sample", {"u": np.sort(chosen)})
    steps.keep(f"{size} random users, seed {seed}", "SELECT log.* FROM log SEMI JOIN user_sample USING (u)")
    steps.connection.unregister("user_sample")


def _number(connection, choices: Choices, texts: list[str] | None) -> dict:
    """Give users and items their internal ids and build the catalogue."""
    connection.execute("CREATE TABLE kept_users AS SELECT user, n FROM users JOIN count_u USING (u) ORDER BY u")
    candidates = "SELECT item FROM source_items SEMI JOIN candidate_ids USING (i)"
    if choices.catalogue == "all" and texts is not None:
        candidates += " UNION SELECT item FROM listed WHERE item IS NOT NULL"
    connection.execute(f"""CREATE TABLE kept_items AS SELECT item, i,
        CAST(row_number() OVER (ORDER BY {natural("item")}) AS INTEGER) AS textrec_number
        FROM ({candidates}) LEFT JOIN source_items USING (item)""")
    return build_catalogue(
        connection, texts, duplicate_items=choices.duplicate_items, unknown_items=choices.unknown_items
    )


def _write_histories(connection, folder: Path, order: str) -> dict[str, str]:
    """Write `items.npy`, `times.npy` and `offsets.npy` batch by batch; return their sha256."""
    lengths = connection.execute("SELECT n FROM kept_users").fetchnumpy()["n"]
    offsets_U1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / "offsets.npy", offsets_U1)
    total = int(offsets_U1[-1])
    terms = ", ".join(f"log.{term}" for term in order.split(", "))
    seconds = "CAST(floor(coalesce(log.time, 0)) AS BIGINT)"
    connection.execute(f"""CREATE TABLE ordered AS SELECT textrec_number AS item, {seconds} AS time
        FROM log JOIN kept_items USING (i) ORDER BY u, {terms}""")
    items_path, times_path = folder / "items.npy", folder / "times.npy"
    with array_file(items_path, np.int32, total) as items, array_file(times_path, np.int64, total) as times:
        for start in range(0, total, BATCH_ROWS):
            rows = f"rowid >= {start} AND rowid < {start + BATCH_ROWS} ORDER BY rowid"
            batch = connection.execute(f"SELECT item, time FROM ordered WHERE {rows}").fetchnumpy()
            items.append(batch["item"])
            times.append(batch["time"])
    digests = {"items": items.digest, "times": times.digest, "offsets": hashlib.sha256(offsets_U1.tobytes())}
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _write_tables(connection, folder: Path) -> dict[str, str]:
    """Write `users.parquet` and `catalogue.parquet`; return the sha256 of external ids and of the texts."""
    users = "SELECT user FROM kept_users"
    catalogue = "SELECT * EXCLUDE (textrec_number) FROM catalogue ORDER BY textrec_number"
    for query, name in ((users, "users"), (catalogue, "catalogue")):
        connection.execute(f"COPY ({query}) TO {literal(folder / f'{name}.parquet')} (FORMAT parquet)")
    items = "SELECT item FROM kept_items ORDER BY textrec_number"
    texts = f"SELECT CAST(to_json(texts) AS VARCHAR) FROM ({catalogue}) AS texts"
    queries = {"user_ids": users, "item_ids": items, "catalogue_text": texts}
    return {name: _digest(connection, query) for name, query in queries.items()}


def _digest(connection, query: str) -> str:
    digest = hashlib.sha256()
    connection.execute(query)
    while rows := connection.fetchmany(BATCH_ROWS // 10):
        digest.update(("\n".join(map(itemgetter(0), rows)) + "\n").encode())
    return digest.hexdigest()
