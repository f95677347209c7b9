"""The synthetic set in every publisher's own raw format, so that each reader runs without a download.

The files carry the publishers' habits: ISO-8859-1, `::`, milliseconds, leading zeros, day resolution, unquoted tabs,
Python literals, and rows in the publisher's order, not in the users'.
"""

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from textrec.data.files import replacing
from textrec.data.sources import recbole_atomic, recformer_folder
from textrec.data.sources.synthetic import THEMES, SyntheticSet

NAME = "Synthetic"
CLICKS = 3  # interactions that a user's MIND impressions hold; the earlier ones are the history

# publisher: reader, and the role of each file that is written
PUBLISHERS: dict[str, tuple[str, dict[str, str]]] = {
    "frames": ("frames.read", {"interactions": "interactions.tsv.gz", "items": "items.jsonl.gz"}),
    "movielens-100k": ("movielens.read_100k", {"interactions": "u.data", "items": "u.item", "genres": "u.genre"}),
    "movielens-1m": ("movielens.read_1m", {"interactions": "ratings.dat", "items": "movies.dat"}),
    "movielens-csv": ("movielens.read_csv", {"interactions": "ratings.csv", "items": "movies.csv"}),
    "amazon-2014": ("amazon.read", {"interactions": f"reviews_{NAME}_5.json.gz", "items": f"meta_{NAME}.json.gz"}),
    "amazon-2018": ("amazon.read", {"interactions": f"{NAME}_5.json.gz", "items": f"meta_{NAME}.json.gz"}),
    "amazon-2023": ("amazon.read", {"interactions": f"{NAME}.jsonl.gz", "items": f"meta_{NAME}.jsonl.gz"}),
    "mind": ("mind.read", {"interactions": "behaviors.tsv", "items": "news.tsv"}),
    "hm": ("hm.read", {"interactions": "transactions_train.csv", "items": "articles.csv"}),
    "bilibili": ("bilibili.read", {"interactions": "behaviors.tsv", "items": "videos.tsv"}),
    "recbole": ("recbole_atomic.read", {"interactions": f"{NAME}/{NAME}.inter", "items": f"{NAME}/{NAME}.item"}),
    "recformer": (
        "recformer_folder.read",
        {name: f"{name}.json" for name in ("train", "val", "test", "umap", "smap")} | {"items": "meta_data.json"},
    ),
}


def write_raw(made: SyntheticSet, folder: Path, publisher: str) -> dict[str, Path]:
    """Write `made` as `publisher` would publish it and return the files by their roles for the reader in `PUBLISHERS`.

    External ids are the synthetic numbers in the publisher's dress (`17`, `B000000017`, `N17`, `0000000017`).
    """
    interactions, items = made.interactions(), made.items()
    user_id, item_id = _dress(publisher)
    interactions["user"], interactions["item"] = interactions["user"].map(user_id), interactions["item"].map(item_id)
    items["item"] = items["item"].map(item_id)
    files = {role: Path(folder) / name for role, name in PUBLISHERS[publisher][1].items()}
    family = publisher.partition("-")[0]
    writer: Callable = {
        "movielens": _write_movielens, "amazon": _write_amazon, "mind": _write_mind, "hm": _write_hm,
        "bilibili": _write_bilibili, "recbole": _write_recbole, "recformer": _write_recformer, "frames": _write_frames,
    }[family]  # fmt: skip
    writer(interactions, items, files, publisher)
    return files


def _dress(publisher: str) -> tuple[Callable[[str], str], Callable[[str], str]]:
    """Return what turns the number of a user and of an item into the publisher's ids."""
    if publisher.startswith("amazon"):
        return (lambda number: f"A{number:0>13}"), (lambda number: f"B{number:0>9}")
    if publisher == "mind":
        return (lambda number: f"U{number}"), (lambda number: f"N{number}")
    if publisher == "hm":
        return (lambda number: f"{number:0>64}"), (lambda number: f"{number:0>10}")
    return str, str


def _write_frames(interactions, items, files: dict[str, Path], publisher: str) -> None:
    rows = interactions[["user", "item", "time", "rating"]].itertuples(index=False)
    lines = ("\t".join(map(str, row)) for row in rows)
    _write_lines(files["interactions"], ["user_id\titem_id\ttimestamp\trating", *lines])
    _write_lines(files["items"], map(_json, items.rename(columns={"item": "item_id"}).to_dict("records")))


def _write_movielens(interactions, items, files: dict[str, Path], publisher: str) -> None:
    interactions = interactions.astype({"rating": int})
    shuffled = interactions.sort_values(["user", "rating", "item"])  # the files are in no time order
    years = [f"{row.title} ({1920 + int(row.item) % 80})" for row in items.itertuples()]
    movies = list(zip(items["item"], years, (row[0] for row in items["category"]), strict=True))
    if publisher == "movielens-csv":
        with replacing(files["interactions"]) as partial:
            columns = {"user": "userId", "item": "movieId", "rating": "rating", "time": "timestamp"}
            shuffled[list(columns)].rename(columns=columns).to_csv(partial, index=False)
        lines = ('{},"{}",{}'.format(item, title.replace('"', '""'), genre) for item, title, genre in movies)
        return _write_lines(files["items"], ["movieId,title,genres", *lines])
    separator = "::" if publisher == "movielens-1m" else "\t"
    rows = shuffled[["user", "item", "rating", "time"]].itertuples(index=False)
    _write_lines(files["interactions"], (separator.join(map(str, row)) for row in rows), "latin-1")
    if publisher == "movielens-1m":
        return _write_lines(files["items"], ("::".join(movie) for movie in movies), "latin-1")
    _write_lines(files["genres"], [f"{genre}|{number}" for number, genre in enumerate(THEMES)], "latin-1")
    flags = {genre: "|".join(str(int(genre == other)) for other in THEMES) for genre in THEMES}
    lines = (f"{item}|{title}|01-Jan-1995||http://example.org/{item}|{flags[genre]}" for item, title, genre in movies)
    return _write_lines(files["items"], lines, "latin-1")


def _write_amazon(interactions, items, files: dict[str, Path], publisher: str) -> None:
    grouped = interactions.sort_values(["item", "time"]).itertuples()  # as published: all reviews of an item together
    if publisher == "amazon-2023":
        rows = ({"rating": row.rating, "title": "Fine", "text": "It is what it is.", "parent_asin": row.item,
                 "user_id": row.user, "timestamp": row.time * 1000 + 7} for row in grouped)  # fmt: skip
        texts = ({"main_category": row.category[0], "title": row.title, "features": [], "price": None,
                  "description": [row.description], "store": row.brand, "categories": row.category,
                  "parent_asin": row.item} for row in items.itertuples())  # fmt: skip
    else:
        rows = ({"reviewerID": row.user, "asin": row.item, "reviewText": 'He said "fine".\nI agree.',
                 "overall": row.rating, "unixReviewTime": row.time} for row in grouped)  # fmt: skip
        nested = publisher == "amazon-2014"
        texts = ({"asin": row.item, "title": row.title, "brand": row.brand,
                  **({"categories": [row.category], "description": row.description} if nested else
                     {"category": row.category, "description": [row.description], "rank": [], "price": "$4.99"}),
                  } for row in items.itertuples())  # fmt: skip
    _write_lines(files["interactions"], map(_json, rows))
    _write_lines(files["items"], map(repr if publisher == "amazon-2014" else _json, texts))


def _write_mind(interactions, items, files: dict[str, Path], publisher: str) -> None:
    impressions = []
    for user, rows in interactions.groupby("user", sort=False):
        history = " ".join(rows["item"][:-CLICKS])
        for row in rows[-CLICKS:].itertuples():
            when = datetime.fromtimestamp(row.time, UTC)
            clock = f"{when.month}/{when.day}/{when.year} {when.hour % 12 or 12}:{when:%M:%S %p}"
            impressions.append((row.time, f"{user}\t{clock}\t{history}\tN1-0 {row.item}-1 N2-0"))
    lines = (f"{number}\t{rest}" for number, (_, rest) in enumerate(sorted(impressions), start=1))
    _write_lines(files["interactions"], lines)
    texts = (f"{row.item}\t{row.category[0]}\t{row.category[1]}\t{row.title}\t{row.description}\thttps://example.org\t[]\t[]"
             for row in items.itertuples())  # fmt: skip
    _write_lines(files["items"], texts)


def _write_hm(interactions, items, files: dict[str, Path], publisher: str) -> None:
    import pandas

    days = pandas.to_datetime(interactions["time"], unit="s").dt.strftime("%Y-%m-%d")
    columns = {"t_dat": days, "customer_id": interactions["user"], "article_id": interactions["item"]}
    transactions = pandas.DataFrame({**columns, "price": 0.0169, "sales_channel_id": 2})
    first, second = (items["category"].str[part] for part in (0, 1))
    columns = {"article_id": items["item"], "prod_name": items["title"], "product_type_name": second}
    columns |= {"product_group_name": first, "colour_group_name": "Black", "department_name": second}
    articles = pandas.DataFrame({**columns, "section_name": first, "detail_desc": items["description"]})
    tables = {"interactions": transactions.sort_values("t_dat", kind="stable"), "items": articles}
    for role, table in tables.items():
        with replacing(files[role]) as partial:
            table.to_csv(partial, index=False)


def _write_bilibili(interactions, items, files: dict[str, Path], publisher: str) -> None:
    joined = interactions.groupby("user", sort=False)["item"].agg(" ".join)
    _write_lines(files["interactions"], ["userid\tbehaviors", *(f"{user}\t{row}" for user, row in joined.items())])
    lines = (f"{item}\t{title}" for item, title in zip(items["item"], items["title"], strict=True))
    _write_lines(files["items"], ["videoid\tdescription", *lines])


def _write_recbole(interactions, items, files: dict[str, Path], publisher: str) -> None:
    recbole_atomic.write(interactions, items, files["items"].parent.parent, NAME)


def _write_recformer(interactions, items, files: dict[str, Path], publisher: str) -> None:
    numbers = {item: number for number, item in enumerate(items["item"])}
    users = interactions["user"].drop_duplicates()
    histories = [rows.map(numbers).tolist() for _, rows in interactions.groupby("user", sort=False)["item"]]
    parts = {
        name: {str(user): history[part] for user, history in enumerate(histories)}
        for name, part in (("train", slice(None, -2)), ("val", slice(-2, -1)), ("test", slice(-1, None)))
    }
    recformer_folder.write(files["train"].parent, parts, users, items)


def _write_lines(path: Path, lines: Iterable[str], encoding: str = "utf-8") -> None:
    def encoded() -> Iterator[bytes]:
        for line in lines:
            yield (line + "\n").encode(encoding)

    with replacing(path) as partial:
        with gzip.open(partial, "wb", compresslevel=1) if path.suffix == ".gz" else partial.open("wb") as file:
            file.writelines(encoded())


def _json(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False)
