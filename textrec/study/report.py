"""The report: one self-contained page, tables in CSV and LaTeX, and the README's verdicts, all from records only."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from textrec.data.files import write_text
from textrec.paths import FIGURES, ROOT
from textrec.schema import InputError
from textrec.study import claims, tables
from textrec.study.records import Record, Run, load_records
from textrec.study.runner import REPORT
from textrec.study.tables import Judged

TRACKED = ("paper", "laptop")  # what the README shows; where both judge a claim, the first counts
START, END = "<!-- verdicts:start -->", "<!-- verdicts:end -->"
NO_RECORDS = "*No records yet: `make study SCALE=laptop DATA=<folder>` makes them and `make report` fills this block.*"
METRICS = ("recall@10", "ndcg@10")
COSTS = {"wall_s": "wall (s)", "cpu_s": "CPU (s)", "peak_rss_gib": "memory (GiB)", "peak_gpu_gib": "GPU memory (GiB)",
         "tokens": "tokens", "energy_wh": "energy (Wh)"}  # fmt: skip
MARKS = {claims.REPRODUCED: "good", claims.ORDERING: "part", claims.NOT_REPRODUCED: "bad", claims.PLUMBING: "soft",
         "failed": "bad", "out_of_memory": "bad", "not_attempted": "bad"}  # fmt: skip


def study_records(scale: str) -> list[Record]:
    """Return the records of a scale that measured something."""
    return [record for record in load_records(scale) if record.notebook != REPORT]


def write_report(scale: str, *, folder: Path = FIGURES, readme: Path = ROOT / "README.md") -> list[Path]:
    """Write `report.html` and, above the smoke scale, `<scale>/11_*` as CSV and LaTeX and the README's block."""
    records = study_records(scale)
    judged = tables.judge_study(records, scale)
    page = folder / "report.html"
    write_text(page, render(records, judged, scale, folder / scale))
    if scale == "smoke":
        return [page]
    attempted = [entry for entry in judged if entry.verdict.word != claims.NOT_ATTEMPTED]
    frames = {"results": tables.results_table(records, METRICS), "verdicts": tables.verdict_table(attempted)}
    written = [page]
    for name, frame in frames.items():
        written += tables.export_table(frame, folder / scale / f"{REPORT}_{name}", scale=scale)
    update_readme(readme)
    return [*written, readme]


def write_study_record(run: Run, records: Sequence[Record], judged: Sequence[Judged]) -> Record:
    """Write the record of the study itself: every verdict over all seeds, and a digest of the records behind it."""
    read = "\n".join(f"{record.label} {record.seed} {json.dumps(record.rows)}" for record in records)
    dataset = {"name": "records", "fingerprint": hashlib.sha256(read.encode()).hexdigest()[:16]}
    verdicts = [entry.verdict.record() for entry in judged]
    record = Record.of(run, status="ok", dataset=dataset, protocol={}, rows=[], claims=verdicts, environment={},
                       deviations=[])  # fmt: skip
    record.write(run.folder / "record.json")
    return record


# ---- the page --------------------------------------------------------------------------------------------------------


def render(records: Sequence[Record], judged: Sequence[Judged], scale: str, figures: Path) -> str:
    """Return the page; text is escaped, figures are inlined, nothing is fetched."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    groups = tables.group_records(records)
    gates = [entry for entry in judged if entry.verdict.claim.source == "P"]
    published = [entry for entry in judged if entry.verdict.claim.source != "P"]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
                              autoescape=True, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    return environment.get_template("report.html").render(
        scale=scale,
        number_of_records=len(records),
        counts=Counter(entry.verdict.word for entry in published),
        verdicts=_verdicts(entry for entry in published if entry.verdict.word != claims.NOT_ATTEMPTED),
        gates=_verdicts(gates),
        runs=[_run(label, group, figures) for label, group in groups.items()],
        cost=_cost(groups),
        failed=_failures(groups),
        open=_verdicts(entry for entry in published if entry.verdict.word == claims.NOT_ATTEMPTED),
        again=_commands(groups),
        ledger=_ledger(),
    )


def _table(columns: Sequence[str], rows: Iterable[Sequence]) -> dict:
    return {"columns": columns, "rows": [[_cell(value) for value in row] for row in rows]}


def _cell(value: object) -> dict:
    """Return one cell: its text, the number it is sorted by (none for text), its mark, and whether it is a command."""
    if isinstance(value, dict):  # an estimate
        text = value.get("text") or tables.format_estimate(*map(value.get, ("value", "low", "high")))
        return _cell(value.get("value")) | {"text": text}
    if value is None or isinstance(value, str):
        text = value or ""
        return {"text": text, "sort": None, "mark": MARKS.get(text), "code": text.startswith("textrec ")}
    digits = 0 if value == round(value) or abs(value) >= 100 else 1 if abs(value) >= 1 else 4
    return {"text": f"{value:,.{digits}f}", "sort": value, "mark": None, "code": False}


def _verdicts(judged: Iterable[Judged]) -> dict:
    columns = ("data set", "row", "metric", "published", "ours", "gap", "seeds", "verdict", "why", "where")
    rows = []
    for entry in judged:
        verdict, claim = entry.verdict, entry.verdict.claim
        ours = {"value": verdict.measured, "low": verdict.low, "high": verdict.high}
        gap = None if verdict.gap is None else {"value": verdict.gap, "text": f"{verdict.gap:+.1%}"}
        rows.append((claim.dataset, claim.subject, claim.metric, _published(claim), ours, gap, len(entry.seeds),
                     verdict.word, verdict.reason, f"{claim.paper}: {claim.where}"))  # fmt: skip
    return _table(columns, rows)


def _published(claim: claims.Claim) -> dict:
    return {"value": None, "text": tables.IN_WORDS} if claim.worded else {"value": claim.value}


def _run(label: str, group: Sequence[Record], figures: Path) -> dict:
    rows, first = tables.merged_rows(group), group[0]
    names = [name for name in METRICS if any(name in row["metrics"] for row in rows)]
    names = names or list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    slices = list(dict.fromkeys(name for row in rows for name in row["slices"] if "ndcg@10" in row["slices"][name]))
    cells = [
        (row["row"], row["changed"], len(row["seeds"]), *(row["metrics"].get(name) for name in names),
         *(row["slices"].get(name, {}).get("ndcg@10") for name in slices), row["status"], row["reason"])
        for row in rows
    ]  # fmt: skip
    columns = ("row", "changed", "seeds", *names, *(f"ndcg@10, {name}" for name in slices), "status", "reason")
    images = []
    for path in sorted([*figures.glob(f"{label}_*.svg"), *figures.glob(f"{REPORT}_{label}_*.svg")]):
        told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        stale = told["fingerprint"] not in (None, first.dataset["fingerprint"])
        images.append({"name": path.stem, "svg": base64.b64encode(path.read_bytes()).decode(), "stale": stale})
    return {"label": label, "dataset": first.dataset, "protocol": first.protocol, "figures": images,
            "seeds": [record.seed for record in group], "rows": _table(columns, cells),
            "deviations": dict.fromkeys(text for record in group for text in record.deviations)}  # fmt: skip


def _cost(groups: Mapping[str, Sequence[Record]]) -> dict:
    found = ((label, row) for label, group in groups.items() for row in tables.merged_rows(group) if row["cost"])
    rows = [(label, row["row"], len(row["seeds"]), *map(row["cost"].get, COSTS), row["metrics"].get("ndcg@10"))
            for label, row in found]  # fmt: skip
    return _table(("run", "row", "seeds", *COSTS.values(), "ndcg@10"), rows)


def _failures(groups: Mapping[str, Sequence[Record]]) -> dict:
    rows = []
    for record in (record for group in groups.values() for record in group):
        bad = [(row["row"], row["status"], row["reason"]) for row in record.rows if row.get("status", "ok") != "ok"]
        if record.status != "ok" and not bad:
            bad = [("the whole run", record.status, record.reason)]
        rows += [(record.label, record.seed, *told) for told in bad]
    return _table(("run", "seed", "row", "status", "reason"), rows)


def _commands(groups: Mapping[str, Sequence[Record]]) -> dict:
    rows = []
    for label, group in groups.items():
        commits = dict.fromkeys(record.commit[:10] + " + changes" * record.dirty for record in group)
        machines = dict.fromkeys(f"{e.get('device')}, {e.get('cores')} cores" for e in (r.environment for r in group))
        rows.append((label, tables.command(group), ", ".join(commits), "; ".join(machines)))
    return _table(("run", "command", "commit", "machine"), rows)


def _ledger() -> dict:
    rows = [
        (claim.dataset, claim.system, claim.metric, _published(claim), claim.kind, claim.row or claim.beside,
         ", ".join(f"{name}: {value}" for name, value in claim.protocol.items()), f"{claim.paper}: {claim.where}")
        for claim in claims.load_claims().values() if claim.source != "P"
    ]  # fmt: skip
    return _table(("data set", "system", "metric", "published", "kind", "our row", "protocol", "where"), rows)


# ---- the README ------------------------------------------------------------------------------------------------------


def readme_block(records: Mapping[str, Sequence[Record]] | None = None) -> str:
    """Return the verdicts of the tracked scales, from the records on disk where none are given, as Markdown."""
    records = {scale: study_records(scale) for scale in TRACKED} if records is None else records
    if not any(records.values()):
        return NO_RECORDS
    best: dict[str, tuple[Judged, str]] = {}
    for scale in TRACKED:
        for entry in tables.judge_study(records.get(scale, ()), scale):
            known = best.get(entry.verdict.claim.id)
            if known is None or known[0].verdict.word == claims.NOT_ATTEMPTED:
                best[entry.verdict.claim.id] = (entry, scale)
    tried = [(entry, scale) for entry, scale in best.values() if entry.verdict.word != claims.NOT_ATTEMPTED]
    lines = ["| data set | row | metric | published | ours, 95 % | seeds | verdict | scale |",
             "|---|---|---|--:|--:|--:|---|---|"]  # fmt: skip
    for entry, scale in tried:
        if entry.verdict.claim.source != "P":
            lines.append(f"| {' | '.join((*entry.shown(), str(len(entry.seeds)), entry.verdict.word, scale))} |")
    met = (claims.REPRODUCED, claims.ORDERING)
    gates = [entry.verdict.word in met for entry, _ in tried if entry.verdict.claim.source == "P"]
    return "\n".join([
        *lines, "",
        f"Levels and orders that this project set itself: {sum(gates)} of {len(gates)} tried are met. Claims not "
        f"attempted yet: {len(best) - len(tried)}; `figures/report.html` names each with its reason.",
    ])  # fmt: skip


def update_readme(path: Path = ROOT / "README.md", block: str | None = None) -> bool:
    """Put the verdicts between the two markers of a README; return whether the file changed."""
    text = path.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise InputError(f"{path} must hold the line {START} and, below it, the line {END}, once each")
    before, after = text.split(START)[0], text.split(END)[1]
    changed = f"{before}{START}\n{readme_block() if block is None else block}\n{END}{after}"
    if changed != text:
        write_text(path, changed)
    return changed != text
