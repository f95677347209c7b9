"""The `textrec data` commands, and what the other commands share with them: sets by name, options, lines, progress."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from textrec.schema import InputError

data_app = typer.Typer(help="List, download, prepare and audit data sets.", no_args_is_help=True, rich_markup_mode=None)
Format = Literal["recbole_atomic", "recformer_folder"]  # the modules that read and write them
RawOption = Annotated[Path | None, typer.Option(help="Folder of raw data; default $TEXTREC_DATA, else data/raw.")]


@contextmanager
def progress(quiet: bool = False) -> Iterator[Callable[[str], None] | None]:
    """Yield a function that shows the step at work: a moving line on a terminal, plain lines elsewhere, or None."""
    if quiet:
        yield None
    elif sys.stdout.isatty():
        from rich.console import Console

        with Console().status("...") as status:
            yield status.update
    else:
        yield lambda step: typer.echo(step)


def pairs(texts: list[str], option: str) -> dict[str, object]:
    """Read `name=value` texts; values are YAML, so numbers, true and null come out as such."""
    import yaml

    values = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise InputError(f"{option} {text!r} is not of the form name=value")
        values[name] = yaml.safe_load(value)
    return values


@data_app.command("list")
def data_list() -> None:
    """Name the known sets. Sizes are the publishers'; the state says what is at hand.

    \b
    Example:
      textrec data list
    """
    from textrec.data.download import known_downloads
    from textrec.data.preparing import known_sets
    from textrec.paths import PROCESSED, raw_data

    raw = raw_data()
    lines = [("set", "users", "items", "interactions", "state")]
    for name, recipe in known_sets().items():
        sizes = [recipe.published.get(key) for key in ("users", "items", "interactions")]
        if (PROCESSED / name / "fingerprint.json").is_file():
            state = "prepared"
        elif all((raw / path).is_file() for path in recipe.files.values()):
            state = "raw files at hand"
        else:
            state = "can be downloaded" if name in known_downloads() else "not at hand"
        lines.append((name, *(f"{size:,}" if size else "" for size in sizes), state))
    typer.echo(f"raw data: {raw}\n\n{aligned(lines)}")


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Return lines of cells as columns."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@data_app.command("download")
def data_download(
    name: Annotated[str, typer.Argument(help="A public set, e.g. ml-1m or amazon-2018-<Category>.")],
    raw: RawOption = None,
) -> None:
    """Fetch a public set, or go on fetching. Mirrors are tried in order; what is pinned is checked.

    \b
    Examples:
      textrec data download ml-1m
      textrec data download amazon-2018-Industrial_and_Scientific
    """
    from textrec.data.download import download_set

    with transfer() as moved:
        lines = download_set(name, raw, progress=moved)
    typer.echo("\n".join(lines))


@contextmanager
def transfer() -> Iterator[Callable[[str, int, int | None], None]]:
    """Yield a function of (file, bytes so far, bytes in all): a bar on a terminal, one line per file elsewhere."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as bars:
        tasks = {}

        def moved(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total)
                if bars.disable:
                    typer.echo(f"fetching {file}" + (f", {total / 2**20:.1f} MiB" if total else ""))
            bars.update(tasks[file], completed=done, total=total)

        yield moved


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A set of `textrec data list`, or a new name for your own files.")],
    interactions: Annotated[Path | None, typer.Option(help="Your own file: user, item and, if known, time.")] = None,
    items: Annotated[Path | None, typer.Option(help="Your own file: item and its texts, a title first.")] = None,
    from_: Annotated[Format | None, typer.Option("--from", help="Of another project, in the folder --raw.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Our name=your name, e.g. user=customer_id.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A choice of preparation as name=value.")] = None,
    raw: RawOption = None,
) -> None:
    """Turn raw files into a prepared set. Prints its data card; reused where nothing changed.

    \b
    Examples:
      textrec data prepare synthetic
      textrec data prepare amazon-2018-scientific
      textrec data prepare shop --interactions sales.csv --items products.jsonl --column user=customer item=sku
      textrec data prepare my-set --from recbole_atomic --raw dataset/my-set
      textrec data prepare my-set --from recformer_folder --raw finetune_data/Scientific
      textrec data prepare ml-1m-w3 --choice time_tie_rule=hash min_item=5
    """
    from textrec.data.audit import data_card
    from textrec.data.preparing import prepare, prepare_folder, prepare_frames

    choices, columns = pairs(choice or [], "--choice"), pairs(column or [], "--column")
    if from_ and (interactions or items):
        raise InputError("--from reads a whole folder: leave --interactions and --items out")
    if from_ and raw is None:
        raise InputError(f"--from {from_} needs --raw, the folder that holds the files")
    if not (from_ or interactions) and (items or columns):
        raise InputError("--items and --column describe your own files: name --interactions, too")
    with progress() as step:
        if from_:
            prepared = prepare_folder(name, raw, from_, columns=columns, progress=step, **choices)
        elif interactions:
            prepared = prepare_frames(name, interactions, items, columns=columns, progress=step, **choices)
        else:
            prepared = prepare(name, raw=raw, progress=step, **choices)
    typer.echo(data_card(prepared))


@data_app.command("audit")
def data_audit(name: Annotated[str, typer.Argument(help="A known or a prepared set.")], raw: RawOption = None) -> None:
    """Print what may mislead on this split. Leaks in time, ties, cold items, repeats, duplicate texts.

    \b
    Example:
      textrec data audit amazon-2018-scientific
    """
    from textrec.data.audit import audit

    typer.echo(audit(load(name, raw)))


def load(name: str, raw: Path | None = None):
    """Return the prepared set `name`, made from its raw files where it is not there yet."""
    from textrec.data.prepared import PreparedSet
    from textrec.data.preparing import prepare
    from textrec.paths import PROCESSED

    if (PROCESSED / name / "fingerprint.json").is_file():
        return PreparedSet.load(PROCESSED / name)
    with progress() as step:
        return prepare(name, raw=raw, progress=step)
