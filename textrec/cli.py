"""The `textrec` command: a thin shell around the functions that notebooks call. Libraries are imported where used."""

import errno
import importlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from textrec.data_cli import Format, RawOption, aligned, data_app, load, pairs, progress
from textrec.schema import InputError

# options that take several values: `--seeds 0 1 2`
SPREAD = ("--seeds", "--notebooks", "--history", "--choice", "--column", "--set")
NO_SPACE_OR_RIGHT = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

app = typer.Typer(
    help="Reproduce published tables of text-based sequential recommendation, and use the models on your own data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")


Scale = Literal["smoke", "laptop", "paper"]
ScaleOption = Annotated[Scale, typer.Option(help="Which parameter files: seconds, an hour, or the paper's hardware.")]
SeedsOption = Annotated[list[int] | None, typer.Option(help="One run each, e.g. --seeds 0 1 2.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Say what became of a run, not what it is doing.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Run again though nothing changed.")]


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and status 2."""
    try:
        app(args=list(spread(sys.argv[1:])), prog_name="textrec")
    except (InputError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_SPACE_OR_RIGHT:
            raise
        ours = isinstance(error, InputError)
        sentence = error if ours else f"{error.filename or 'a file'} could not be written: {error.strerror}"
        typer.echo(f"textrec: {sentence}", err=True)
        sys.exit(2)


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


@app.command()
def doctor() -> None:
    """Check Python, packages, folders and data. Status 1 where a run would fail.

    \b
    Example:
      textrec doctor
    """
    from textrec.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{finding.status:<5} {finding.what}" + (f"  -> {finding.remedy}" if finding.remedy else ""))
    raise typer.Exit(any(finding.status == "fail" for finding in findings))


@app.command()
def run(
    number: Annotated[str, typer.Argument(metavar="NN", help="The two digits a notebook's name starts with.")],
    scale: ScaleOption = "smoke",
    variant: Annotated[str | None, typer.Option(help="Which parameter variant, mostly a data set.")] = None,
    seeds: SeedsOption = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A parameter of the notebook as name=value.")] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Execute one notebook, once per seed. Into papermill_runs/<scale>/; a killed run goes on where it was.

    \b
    Examples:
      textrec run 00
      textrec run 01 --scale laptop --variant amazon-2018-scientific --seeds 0 1 2
      textrec run 01 --set max_epochs=2
    """
    from textrec.study.runner import run_notebook

    options = {"scale": scale, "variant": variant, "overrides": pairs(set_ or [], "--set"), "force": force}
    outcomes = []
    with progress(quiet) as step:
        for seed in seeds or [0]:
            outcomes.append(run_notebook(number, seed=seed, progress=step, **options))
            tell(outcomes[-1])
    raise typer.Exit(any(outcome.status not in ("ok", "skipped") for outcome in outcomes))


@app.command()
def study(
    scale: ScaleOption = "smoke",
    notebooks: Annotated[list[str] | None, typer.Option(help="Only these, e.g. --notebooks 00 01.")] = None,
    seeds: SeedsOption = None,
    jobs: Annotated[int, typer.Option(min=1, help="Notebooks at once; the cores are shared among them.")] = 1,
    force: ForceOption = False,
    quiet: QuietOption = False,
) -> None:
    """Execute every notebook, then the report. Finished runs are left as they are.

    \b
    Examples:
      textrec study
      textrec study --scale laptop --seeds 0 1 2 --jobs 2
    """
    from textrec.paths import FIGURES
    from textrec.study.runner import estimate_seconds, plan, run_study

    chosen = {"numbers": notebooks, "seeds": seeds or [0]}
    estimates = [estimate_seconds(one) for one in plan(scale, **chosen)]
    known = sum(seconds for seconds in estimates if seconds)
    typer.echo(f"{len(estimates)} runs at scale {scale}, about {known / 60 / jobs:.0f} min if nothing is done yet")
    with progress(quiet) as step:
        outcomes = run_study(scale, **chosen, jobs=jobs, force=force, tell=tell, progress=step)
    typer.echo(f"report: {FIGURES / 'report.html'}")
    raise typer.Exit(any(outcome.status in ("failed", "out_of_memory") for outcome in outcomes))


def tell(outcome) -> None:
    """Print what became of one run."""
    reason = f": {outcome.reason}" if outcome.reason else ""
    typer.echo(f"{outcome.label} seed {outcome.seed}: {outcome.status}, {outcome.seconds:.0f} s{reason}")


@app.command()
def report(scale: ScaleOption = "laptop") -> None:
    """Write the report from the records. Above smoke also the README's verdicts, CSV and LaTeX.

    \b
    Example:
      textrec report --scale laptop
    """
    from textrec.study.report import write_report

    for path in write_report(scale):
        typer.echo(f"wrote {path}")


@app.command()
def claims(
    scale: ScaleOption = "laptop",
    dataset: Annotated[str | None, typer.Option(help="Only claims on this set.")] = None,
) -> None:
    """List published numbers beside ours. With the verdict on each, at one scale.

    \b
    Examples:
      textrec claims
      textrec claims --dataset ml-1m-w1
    """
    from textrec.study.report import study_records
    from textrec.study.tables import judge_study

    lines = [("set", "row", "metric", "published", "ours", "verdict", "where")]
    for judged in judge_study(study_records(scale), scale):
        claim = judged.verdict.claim
        if dataset in (None, claim.dataset):
            lines.append((*judged.shown(), str(judged.verdict), f"{claim.paper}: {claim.where}"))
    if len(lines) == 1:
        raise InputError(f"no claim is about the data set {dataset!r}")
    typer.echo(aligned(lines))


@app.command()
def recommend(
    run_dir: Annotated[
        Path | None, typer.Option("--run", help="The folder papermill_runs/<scale>/<NN>/seed<k>.")
    ] = None,
    row: Annotated[str, typer.Option(help="The row of its table whose model is asked.")] = "",
    embedder: Annotated[str | None, typer.Option(help="Instead: a text embedder, on your own two files.")] = None,
    interactions: Annotated[Path | None, typer.Option(help="Your own file, for --embedder: user, item, time.")] = None,
    user: Annotated[str | None, typer.Option(help="A user of the set, by your own id.")] = None,
    history: Annotated[list[str] | None, typer.Option(help="Items by your own ids, oldest first.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    keep_seen: Annotated[bool, typer.Option("--keep-seen", help="Items of the history may come back.")] = False,
    items: Annotated[Path | None, typer.Option(help="Your own file, for what reads texts.")] = None,
    at: Annotated[int | None, typer.Option(help="Time of the request, unix seconds; else the newest item's.")] = None,
) -> None:
    """Print the best next items with titles. For a user of the set, or any history; --items adds new ones.

    A row that reads times, such as hstu, is told those of a user of the set and, with --at, that of the request. With
    --embedder nothing is trained: your items and histories are read as texts, those that nobody had yet included.

    \b
    Examples:
      textrec recommend --run papermill_runs/smoke/01/seed0 --row sasrec_ce --user u7
      textrec recommend --run papermill_runs/smoke/01/seed0 --row sasrec_ce --history i3 i17 i4 -k 5
      textrec recommend --run papermill_runs/smoke/03/seed0 --row two_stage --user u7 --items new_items.jsonl
      textrec recommend --embedder all-MiniLM-L6-v2 --interactions sales.csv --items products.jsonl --user u7
    """
    if embedder:
        if run_dir or row or not (interactions and items):
            raise InputError("--embedder reads two files of your own: give --interactions and --items, and no --run")
        from textrec.training.embedder_recommending import recommender_of_files

        prepared, model, new = recommender_of_files(interactions, items, embedder_of(embedder), **store())
        catalogue = prepared.catalogue
    elif interactions or not (run_dir and row):
        raise InputError("name a model: --run with --row, or --embedder with --interactions and --items")
    else:
        prepared, model, catalogue = model_of_run(run_dir, row, items)
        new = range(prepared.num_items + 1, len(catalogue) + 1)
    past, times = history_of(prepared, user, history, catalogue["item"])
    told = {"times": times, "request_time": at} if times and getattr(model, "reads_times", False) else {}
    if at is not None and not told:
        raise InputError(f"--at {at}: expected a row that reads times, and --user, whose times the set knows")
    for item, score in model.recommend(past, k, filter_seen=not keep_seen, **told):
        entry, mark = catalogue.iloc[item - 1], "  (new)" if item in new else ""
        typer.echo(f"{score:8.3f}  {entry['item']}  {entry.get('title') or ''}{mark}")


def model_of_run(run_dir: Path, row: str, items: Path | None):
    """Return the set of a run, the model of one of its rows, and the catalogue, with the new ones of `items` behind."""
    record, folder = run_dir / "record.json", run_dir / "rows" / row
    if not record.is_file():
        raise InputError(f"{run_dir} is no run folder: it holds no record.json")
    dataset = json.loads(record.read_text(encoding="utf-8"))["dataset"]
    prepared = load(dataset["name"])
    if prepared.fingerprint != dataset["fingerprint"]:
        raise InputError(f"{run_dir} was run on another version of {prepared.name}: run it again")
    catalogue = prepared.catalogue
    if (folder / "model" / "tokenizer.json").is_file():
        from textrec.training.text_recommending import text_recommender, with_new_items

        model = text_recommender(folder, catalogue, prepared.fingerprint)
        if items:
            catalogue = with_new_items(catalogue, items)
            model = model.over(catalogue)
        return prepared, model, catalogue
    if items:
        raise InputError(f"--items needs a row with a model that reads texts, such as two_stage: {folder} holds none")
    from textrec.models.sequence_model import SequenceModel

    return prepared, SequenceModel.from_pretrained(folder / "model"), catalogue


@app.command()
def embed(
    items: Annotated[Path, typer.Argument(help="Your own file: item and its texts, a title first.")],
    model: Annotated[str, typer.Option(help="A text embedder: a folder, a hub id, or all-MiniLM-L6-v2.")],
    out: Annotated[
        Path, typer.Option(help="The new file, .safetensors: a row for each item; its metadata has the ids.")
    ],
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an item that are read; else what it can.")] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where it runs.")] = "cpu",
) -> None:
    """Write the vectors of an item file. Texts that were read before are not read again.

    \b
    Example:
      textrec embed products.jsonl --model all-MiniLM-L6-v2 --out vectors.safetensors
    """
    from textrec.training.embedder_recommending import write_item_vectors

    if not items.is_file():
        raise InputError(f"{items} is not a file")
    if not out.parent.is_dir():
        raise InputError(f"--out {out}: the folder {out.parent} does not exist")
    encoder = embedder_of(model, max_tokens=max_tokens, device=device)
    num_items, width = write_item_vectors(items, encoder, out, **store())
    typer.echo(f"wrote {num_items:,} vectors of {width} numbers to {out}")


def embedder_of(name: str, **settings):
    from textrec.models.text_encoder import TextEncoder

    return TextEncoder(name, **settings)


def store() -> dict:
    """Return where vectors are kept, and what tells how far the encoding is."""
    from textrec.paths import DATA

    def tell(done: int, wanted: int) -> None:
        typer.echo(f"read {done:,} of {wanted:,} texts", err=True)

    return {"folder": DATA / "vectors", "progress": tell}


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint, file or folder; with --to, a known or a prepared set.")],
    folder: Annotated[Path, typer.Argument(help="The new folder of the model; with --to, where <set>/ is written.")],
    to: Annotated[Format | None, typer.Option(help="RecBole's atomic files or RecFormer's finetuning folder.")] = None,
    like: Annotated[Path | None, typer.Option(help="A saved sequence model of that shape, if none is beside.")] = None,
    raw: RawOption = None,
) -> None:
    """Write a checkpoint as a model folder, or with --to a set in another project's format.

    A checkpoint is what a training left (last.ckpt, also ZeRO's folder of shards), or a RecFormer, Longformer, RoBERTa
    or BERT under its published names. ZeRO's shards are pickles, which can run code: convert only files you trust.

    \b
    Examples:
      textrec convert pretraining/last.ckpt pretrained
      textrec convert longformer-base-4096 start
      textrec convert amazon-2018-scientific export --to recbole_atomic
    """
    if to is None:
        from textrec.training.consolidation import convert as convert_checkpoint

        convert_checkpoint(Path(source), folder, like)
        typer.echo(f"wrote {folder}")
        return
    module = importlib.import_module(f"textrec.data.sources.{to}")
    typer.echo(f"wrote {module.export(load(source, raw), folder)}")


@app.command()
def bench(names: Annotated[list[str] | None, typer.Argument(help="Only these.")] = None) -> None:
    """Time ours against other programs. Each benchmark prints its ratios.

    \b
    Examples:
      textrec bench
      textrec bench prepare
    """
    import subprocess

    from textrec.paths import ROOT

    scripts = {path.stem.removeprefix("bench_"): path for path in sorted(ROOT.glob("tests/benchmarks/bench_*.py"))}
    unknown = [name for name in names or [] if name not in scripts]
    if unknown:
        raise InputError(f"no benchmark {unknown[0]!r}; expected one of {', '.join(scripts)}")
    codes = [subprocess.run([sys.executable, scripts[name]]).returncode for name in names or scripts]
    raise typer.Exit(any(codes))


def history_of(prepared, user: str | None, history: list[str] | None, items) -> tuple[list[int], list[int]]:
    """Return item ids, oldest first, of a user or of external ids of `items` (row k is k + 1), and a user's times."""
    if (user is None) == (not history):
        raise InputError("name either --user or --history")
    if user is not None:
        rows = (prepared.users == user).to_numpy().nonzero()[0]
        if not len(rows):
            raise InputError(f"--user {user!r} is no user of {prepared.name}")
        start, end = prepared.histories.offsets_U1[rows[0] : rows[0] + 2]
        return tuple(
            values_E[start:end].tolist() for values_E in (prepared.histories.items_E, prepared.histories.times_E)
        )
    ids = {external: row + 1 for row, external in enumerate(items)}
    for external in history:
        if external not in ids:
            raise InputError(f"--history names {external!r}, which is no item of {prepared.name}")
    return [ids[external] for external in history], []


if __name__ == "__main__":
    main()
