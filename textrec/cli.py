"""The `textrec` command: a thin shell around the functions that notebooks call. Libraries are imported where used."""

import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from textrec.schema import InputError

SPREAD = ("--seeds", "--choice", "--column", "--set")  # options that take several values: `--seeds 0 1 2`
NO_SPACE_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

app = typer.Typer(
    name="textrec",
    help="Reproduce published tables of text-based sequential recommendation, and use the models on your own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="List, download, prepare and audit data sets.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(data_app, name="data")


class Scale(StrEnum):
    """How large a run is."""

    smoke = "smoke"
    laptop = "laptop"
    paper = "paper"


ScaleOption = Annotated[Scale, typer.Option(help="Which parameter files: seconds, an hour, or the paper's hardware.")]
RawOption = Annotated[Path | None, typer.Option(help="Folder of raw data; default $TEXTREC_DATA, else data/raw.")]


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and status 2."""
    try:
        app(args=list(spread(sys.argv[1:])), prog_name="textrec")
    except InputError as error:
        sys.exit(_refused(str(error)))
    except OSError as error:
        if error.errno not in NO_SPACE_OR_RIGHT:
            raise
        sys.exit(_refused(f"{error.filename or 'a file'} could not be written: {error.strerror}"))


def _refused(sentence: str) -> int:
    typer.echo(f"textrec: {sentence}", err=True)
    return 2


def spread(arguments: Iterable[str]) -> Iterator[str]:
    """Repeat the name of an option before each of its further values: `--seeds 0 1` becomes `--seeds 0 --seeds 1`."""
    name, values = None, 0
    for argument in arguments:
        if argument.startswith("-"):
            name, values = argument if argument in SPREAD else None, 0
        elif name:
            values += 1
            if values > 1:
                yield name
        yield argument


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows the step at work: a moving line on a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
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


@app.command()
def doctor() -> None:
    r"""Check Python, packages, devices, folders and data; status 1 where something would fail.

    \b
    Example:
      textrec doctor
    """
    from textrec.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{finding.status:<5} {finding.what}" + (f"  -> {finding.remedy}" if finding.remedy else ""))
    raise typer.Exit(any(finding.status == "fail" for finding in findings))


@data_app.command("list")
def data_list() -> None:
    r"""Name the known sets, their size and whether their files are at hand.

    \b
    Example:
      textrec data list
    """
    from textrec.data.preparing import known_sets
    from textrec.paths import PROCESSED, raw_data

    raw = raw_data()
    typer.echo(f"raw data: {raw}\n")
    typer.echo(f"{'set':<32}{'users':>9}{'items':>9}{'interactions':>14}  state")
    for name, recipe in known_sets().items():
        sizes = [recipe.published.get(key) for key in ("users", "items", "interactions")]
        users, items, interactions = (f"{size:,}" if size else "" for size in sizes)
        at_hand = all((raw / path).is_file() for path in recipe.files.values())
        state = "raw files at hand" if at_hand else f"`textrec data download {name}`"
        state = "prepared" if (PROCESSED / name / "fingerprint.json").is_file() else state
        typer.echo(f"{name:<32}{users:>9}{items:>9}{interactions:>14}  {state}")


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="A set of `textrec data list`, or a new name for your own files.")],
    interactions: Annotated[Path | None, typer.Option(help="Your own file: user, item and, if known, time.")] = None,
    items: Annotated[Path | None, typer.Option(help="Your own file: item and its texts, a title first.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="Our name=your name, e.g. user=customer_id.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="A choice of preparation as name=value.")] = None,
    raw: RawOption = None,
) -> None:
    r"""Turn raw files into a prepared set and print its data card; reused where nothing changed.

    \b
    Examples:
      textrec data prepare synthetic
      textrec data prepare amazon-2018-scientific
      textrec data prepare shop --interactions sales.csv --items products.jsonl --column user=customer item=sku
      textrec data prepare ml-1m-w3 --choice time_tie_rule=hash min_item=5
    """
    from textrec.data.audit import data_card
    from textrec.data.preparing import prepare, prepare_frames

    choices = pairs(choice or [], "--choice")
    if interactions is None and (items or column):
        raise InputError("--items and --column describe your own files: name --interactions, too")
    with progress() as step:
        if interactions is None:
            prepared = prepare(name, raw=raw, progress=step, **choices)
        else:
            columns = pairs(column or [], "--column")
            prepared = prepare_frames(name, interactions, items, columns=columns, progress=step, **choices)
    typer.echo(data_card(prepared))


def load(name: str, raw: Path | None = None):
    """Return the prepared set `name`: from its folder, or made from the raw files of a known set."""
    from textrec.data.prepared import PreparedSet
    from textrec.data.preparing import known_sets, prepare
    from textrec.paths import PROCESSED

    if name in known_sets():
        with progress() as step:
            return prepare(name, raw=raw, progress=step)
    return PreparedSet.load(PROCESSED / name)


@app.command()
def run(
    number: Annotated[str, typer.Argument(metavar="NN", help="The two digits a notebook's name starts with.")],
    scale: ScaleOption = Scale.smoke,
    variant: Annotated[str | None, typer.Option(help="Which parameter variant, mostly a data set.")] = None,
    seeds: Annotated[list[int] | None, typer.Option(help="One run each, e.g. --seeds 0 1 2.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A parameter of the notebook as name=value.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Run again though nothing changed.")] = False,
) -> None:
    r"""Execute one notebook, once per seed, into papermill_runs/<scale>/; an interrupted run goes on where it was.

    \b
    Examples:
      textrec run 00
      textrec run 01 --scale laptop --variant beauty --seeds 0 1 2
      textrec run 01 --set max_epochs=2
    """
    from textrec.study.runner import run_notebook

    overrides = pairs(set_ or [], "--set")
    outcomes = []
    for seed in seeds or [0]:
        typer.echo(f"{number} {variant or ''} seed {seed} at scale {scale} ...")
        outcomes.append(
            run_notebook(number, scale=scale.value, variant=variant, seed=seed, overrides=overrides, force=force)
        )
        report_outcome(outcomes[-1])
    raise typer.Exit(any(outcome.status not in ("ok", "skipped") for outcome in outcomes))


def report_outcome(outcome) -> None:
    """Print what became of one run."""
    reason = f": {outcome.reason}" if outcome.reason else ""
    typer.echo(f"{outcome.label} seed {outcome.seed}: {outcome.status} in {outcome.seconds:.0f} s{reason}")


if __name__ == "__main__":
    main()
