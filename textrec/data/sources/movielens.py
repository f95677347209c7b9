"""MovieLens 100K, 1M, latest-small, 20M and 32M as published, and the `ml-1m.txt` of the SASRec line of work."""

from collections.abc import Mapping
from pathlib import Path

from textrec.data.sources import Tables
from textrec.data.sources.frames import delimited, literal, scan


def read_csv(connection, files: Mapping[str, Path]) -> Tables:
    """Read `ratings.csv` and `movies.csv` (latest-small, 20M, 25M, 32M; UTF-8, quoted titles)."""
    ratings, movies = scan(files["interactions"]), scan(files["items"])
    return Tables(
        interactions=f'SELECT "userId" AS user, "movieId" AS item, "timestamp" AS time, rating FROM {ratings}',
        items=f"""SELECT "movieId" AS item, title, string_split(genres, '|') AS genres FROM {movies}""",
        first_line=2,
    )


def read_1m(connection, files: Mapping[str, Path]) -> Tables:
    """Read `ratings.dat` and `movies.dat` (ISO-8859-1, fields separated by `::`)."""
    ratings = _plain(files["interactions"], "::", ("user", "item", "rating", "time"))
    return Tables(interactions=f"SELECT user, item, time, rating FROM {ratings}", items=_movies_dat(files["items"]))


def read_100k(connection, files: Mapping[str, Path]) -> Tables:
    """Read `u.data` (tabs) and `u.item` (ISO-8859-1, fields separated by `|`, 19 genre flags named in `u.genre`)."""
    named = _plain(files["genres"], "|", ("genre", "number"))
    names = [row[0] for row in connection.execute(f"SELECT genre FROM {named} WHERE genre <> ''").fetchall()]
    flags = tuple(f"flag_{number}" for number in range(len(names)))
    movies = _plain(files["items"], "|", ("item", "title", "released", "video_released", "url", *flags))
    named = zip(flags, names, strict=True)
    genres = ", ".join(f"CASE WHEN {flag} = '1' THEN {literal(name)} END" for flag, name in named)
    ratings = _plain(files["interactions"], "\\t", ("user", "item", "rating", "time"))
    return Tables(
        interactions=f"SELECT user, item, time, rating FROM {ratings}",
        items=f"SELECT item, title, list_filter([{genres}], lambda genre: genre IS NOT NULL) AS genres FROM {movies}",
    )


def read_sasrec_text(connection, files: Mapping[str, Path]) -> Tables:
    """Read the ready-made "user item" lines; titles come from `movies.dat` through the published item map."""
    lines = _plain(files["interactions"], " ", ("user", "item"))
    items = None
    if "item_to_movie" in files:
        mapping = _plain(files["item_to_movie"], " ", ("item", "movie"))
        movies = _movies_dat(files["items"])
        items = f"""SELECT mapping.item, title, genres, movie FROM {mapping} AS mapping
            LEFT JOIN (SELECT item AS movie, title, genres FROM ({movies})) USING (movie)"""
    return Tables(interactions=f"SELECT user, item FROM {lines}", items=items)


def _movies_dat(path: Path) -> str:
    movies = _plain(path, "::", ("item", "title", "genres"))
    return f"SELECT item, title, string_split(genres, '|') AS genres FROM {movies}"


def _plain(path: Path, delimiter: str, names: tuple[str, ...]) -> str:
    """Return the scan of a file without header or quotes, in the encoding of GroupLens files before 2014."""
    return delimited(path, names, delimiter, encoding="'latin-1'")
