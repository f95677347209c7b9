"""RecFormer's finetuning folder, both directions: train, val, test, umap, smap and meta_data as JSON.

`umap` and `smap` map external user and item ids to numbers from 0; `train.json` holds {"user": [items, oldest first]},
`val.json` and `test.json` {"user": [item]}; `meta_data.json` {external item: {title, brand, category}}, for more items
than `smap` has. Users with fewer than three interactions occur in `train.json` only.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from textrec.data.files import write_text
from textrec.data.prepared import PreparedSet
from textrec.data.sources import Tables
from textrec.schema import Column, InputError

PARTS = ("train", "val", "test")
ATTRIBUTES = ("title", "brand", "category")  # in the order in which RecFormer reads them


def read(connection, files: Mapping[str, Path]) -> Tables:
    """Read the six files (roles train, val, test, umap, smap, items): a user's items in time order, no times."""
    import pandas

    parts = [_load(files[part]) for part in PARTS]
    users = {str(number): user for user, number in _load(files["umap"]).items()}
    items = {number: item for item, number in _load(files["smap"]).items()}
    rows = []
    for user in parts[0]:
        if user not in users:
            raise InputError(f"{files['train']} has the user {user!r}, which {files['umap'].name} does not know")
        for part, histories in zip(PARTS, parts, strict=True):
            for item in histories.get(user, []):
                if item not in items:
                    raise InputError(f"{files[part]}, user {user}: the item {item} is not in {files['smap'].name}")
                rows.append((users[user], items[item]))
    connection.register("recformer_interactions", pandas.DataFrame(rows, columns=[Column.user, Column.item]))
    attributes = _load(files["items"])
    for item, values in attributes.items():
        if not isinstance(values, dict):
            raise InputError(f"{files['items']}: the item {item!r} is {values!r}; expected an object of attributes")
    texts = pandas.DataFrame.from_dict(attributes, orient="index").reindex(columns=list(ATTRIBUTES))
    connection.register("recformer_items", texts.fillna("").rename_axis(Column.item).reset_index())
    return Tables(interactions="SELECT * FROM recformer_interactions", items="SELECT * FROM recformer_items")


def find(folder: Path) -> dict[str, Path]:
    """Return the six files of a folder by role."""
    files = {role: folder / f"{role}.json" for role in (*PARTS, "umap", "smap")} | {"items": folder / "meta_data.json"}
    if missing := [path.name for path in files.values() if not path.is_file()]:
        raise InputError(f"{folder} is no folder of RecFormer: it holds no {', '.join(missing)}")
    return files


def export(prepared: PreparedSet, folder: Path) -> Path:
    """Write a prepared set as a RecFormer folder `<folder>/<name>` and return it: the set's own split, its ids - 1."""
    split, histories = prepared.split, prepared.histories
    targets = {"val": split.validation_target_U, "test": split.test_target_U}
    parts = {part: {} for part in PARTS}
    for user in range(histories.num_users):
        row = (histories.items_E[histories.offsets_U1[user] : histories.offsets_U1[user + 1]] - 1).tolist()
        parts["train"][str(user)] = row[: split.train_end_U[user]]
        for part, positions_U in targets.items():
            if positions_U[user] >= 0:
                parts[part][str(user)] = [row[positions_U[user]]]
    write(folder / prepared.name, parts, prepared.users, prepared.catalogue)
    return folder / prepared.name


def write(folder: Path, parts: Mapping[str, dict], users, items) -> None:
    """Write the six files; `users` and the rows of the pandas table `items` are numbered from 0 in their order."""
    files = dict(parts)
    files["umap"] = {user: number for number, user in enumerate(users)}
    files["smap"] = {item: number for number, item in enumerate(items[Column.item])}
    files["meta_data"] = dict(zip(items[Column.item], _attributes(items), strict=True))
    for name, content in files.items():
        write_text(folder / f"{name}.json", json.dumps(content, ensure_ascii=False))


def _attributes(items) -> Iterator[dict[str, str]]:
    """Yield the attributes of every item; lists are joined by blanks, as the published script joins categories."""
    columns = [name for name in ATTRIBUTES if name in items]
    for values in zip(*(items[name] for name in columns), strict=True):
        texts = [" ".join(value) if isinstance(value, list) else value for value in values]
        yield dict.fromkeys(ATTRIBUTES, "") | dict(zip(columns, texts, strict=True))


def _load(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON in UTF-8: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; expected one JSON object")
    return content
