"""Tables from records: published beside ours, ablations with paired differences, verdicts. No number is typed.

Over seeds, a value is the mean; its 95 % interval joins the users' part (the mean half width of the runs, which rank
the same users) and, from three seeds on, the seeds' part (Student's t). With fewer seeds no spread is stated.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from textrec.data.files import write_text
from textrec.data.prepared import PreparedSet
from textrec.evaluation.ranking import Ranks
from textrec.schema import InputError
from textrec.study.claims import NOT_ATTEMPTED, PLUMBING, Claim, Verdict, judge_rows, load_claims
from textrec.study.records import SAMPLED, Record, Run, protocol

SUMMED_COSTS = ("wall_s", "cpu_s", "tokens", "energy_wh")  # over seeds; of memory the largest counts
FEWEST_SEEDS = 3  # for a spread
RULES = ("seen_filtered", "seen_kept", f"sampled_uniform_{SAMPLED}")  # how the candidates of a rank are chosen
IN_WORDS = "in words"  # in place of a published number that there is none of


@dataclass(frozen=True)
class Judged:
    """A verdict over all seeds, and the command that makes its number again."""

    verdict: Verdict
    seeds: tuple[int, ...] = ()
    command: str = ""

    def shown(self) -> tuple[str, ...]:
        """Return the texts of a line: data set, row, metric, the published value, ours with its interval."""
        claim, ours = self.verdict.claim, (self.verdict.measured, self.verdict.low, self.verdict.high)
        published = IN_WORDS if claim.worded else format_estimate(claim.value)
        return claim.dataset, claim.subject, claim.metric, published, format_estimate(*ours)


def combine(estimates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return {value, low, high} over seeds, and `sd` over them from three seeds on."""
    values_S = np.array([estimate["value"] for estimate in estimates], dtype=float)
    mean = float(values_S.mean())
    below, above = (float(np.mean([abs(e["value"] - e[side]) for e in estimates])) for side in ("low", "high"))
    if len(values_S) < FEWEST_SEEDS:
        return {"value": mean, "low": mean - below, "high": mean + above}
    from scipy.stats import t

    sd = float(values_S.std(ddof=1))
    seeds_part = float(t.ppf(0.975, len(values_S) - 1)) * sd / math.sqrt(len(values_S))
    return {"value": mean, "low": mean - math.hypot(below, seeds_part), "high": mean + math.hypot(above, seeds_part),
            "sd": sd}  # fmt: skip


def group_records(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return records by run label, seeds in order; refuse seeds that were not tested on the same thing."""
    groups: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.label, record.seed)):
        groups.setdefault(record.label, []).append(record)
    for label, group in groups.items():
        for record in group[1:]:
            for field in ("dataset", "protocol"):
                first, other = (getattr(one, field) for one in (group[0], record))
                if first != other:
                    seeds = f"seeds {group[0].seed} and {record.seed}"
                    raise InputError(f"{label}: {seeds} differ in their {field}: {first} and {other}")
    return groups


def merged_rows(group: Sequence[Record]) -> list[dict]:
    """Return the rows of one run label over its seeds: metrics combined, costs summed, and what failed with its reason.

    A row that succeeded with some seeds is `ok` and `seeds` lists those.
    """
    names = dict.fromkeys(row["row"] for record in group for row in record.rows)
    merged = []
    for name in names:
        found = [(record.seed, row) for record in group for row in record.rows if row["row"] == name]
        good = [(seed, row) for seed, row in found if row.get("status", "ok") == "ok"]
        _, first = (good or found)[0]
        sections = {section for _, row in good for section in row["slices"]}
        merged.append({
            "row": name,
            "changed": first["changed"],
            "status": "ok" if good else first["status"],
            "reason": None if good else first["reason"],
            "seeds": tuple(seed for seed, _ in good),
            "metrics": _combine_metrics([row["metrics"] for _, row in good]),
            "slices": {s: _combine_metrics([row["slices"].get(s, {}) for _, row in good]) for s in sorted(sections)},
            "cost": _combine_costs([row["cost"] for _, row in found]),
        })  # fmt: skip
    return merged


def _combine_metrics(of_seeds: Sequence[Mapping]) -> dict[str, dict]:
    names = dict.fromkeys(name for metrics in of_seeds for name in metrics)
    return {name: combine([metrics[name] for metrics in of_seeds if name in metrics]) for name in names}


def _combine_costs(of_seeds: Sequence[Mapping]) -> dict[str, float]:
    known = {name: [cost[name] for cost in of_seeds if cost.get(name) is not None]
             for cost in of_seeds for name in cost}  # fmt: skip
    return {name: sum(values) if name in SUMMED_COSTS else max(values) for name, values in known.items() if values}


def command(group: Sequence[Record]) -> str:
    """Return the command that makes the records of one run label again."""
    first, seeds = group[0], " ".join(str(record.seed) for record in group)
    variant = f" --variant {first.variant}" if first.variant else ""
    return f"textrec run {first.notebook} --scale {first.scale}{variant} --seeds {seeds}"


def judge_study(records: Iterable[Record], scale: str, claims: Mapping[str, Claim] | None = None) -> list[Judged]:
    """Judge every claim that has a row once, over all seeds, from the records of one scale; statistics come last.

    Levels are judged anew from the rows; an ordering takes its paired difference from the records' `claims`,
    one that was claimed after them from the ranks at hand.
    """
    claims = load_claims() if claims is None else claims
    if scale == "smoke":
        return [Judged(Verdict(claim, PLUMBING)) for claim in claims.values() if claim.row]
    judged: dict[str, Judged] = {}
    for group in group_records(records).values():
        first, rows = group[0], merged_rows(group)
        seeds = {row["row"]: row["seeds"] for row in rows}
        verdicts = judge_rows(rows, notebook=first.notebook, dataset=first.dataset["name"], protocol=first.protocol,
                              scale=first.scale, differences=_differences(group, claims), claims=claims)  # fmt: skip
        for verdict in verdicts:
            claim, earlier = verdict.claim, judged.get(verdict.claim.id)
            shared = tuple(seed for seed in seeds.get(claim.row, ()) if seed in seeds.get(claim.over or claim.row, ()))
            if earlier is None or earlier.verdict.word == NOT_ATTEMPTED:
                judged[claim.id] = Judged(verdict, shared, command(group))
    for claim in (claim for claim in claims.values() if claim.row and claim.id not in judged):
        reason = f"no record of notebook {claim.notebook} on {claim.dataset}"
        judged[claim.id] = Judged(Verdict(claim, NOT_ATTEMPTED, reason=reason))
    known = [judged[name] for name, claim in claims.items() if claim.row]
    return sorted(known, key=lambda entry: entry.verdict.claim.row == "statistics")


def _differences(group: Sequence[Record], claims: Mapping[str, Claim]) -> dict[tuple[str, str, str], tuple]:
    found: dict[tuple[str, str, str], list[dict]] = {}
    for entry in (entry for record in group for entry in record.claims):
        claim = claims.get(entry["id"])
        if claim is not None and claim.kind == "ordering" and entry["low"] is not None:
            place = (claim.row, claim.over, claim.metric)
            found.setdefault(place, []).append(entry | {"value": entry["measured"]})
    combined = {place: combine(entries) for place, entries in found.items()}
    told = {place: (entry["value"], entry["low"], entry["high"]) for place, entry in combined.items()}
    here = [(claim.row, claim.over, claim.metric) for claim in claims.values() if claim.kind == "ordering"
            and (claim.notebook, claim.dataset) == (group[0].notebook, group[0].dataset["name"])]  # fmt: skip
    ranks = ranks_at_hand(group) if {*here} - told.keys() else {}
    return {(row, over, metric): paired_difference(ranks[row], ranks[over], metric)[:3] for row, over, metric in here
            if shared_seeds(ranks.get(row), ranks.get(over))} | told  # fmt: skip


def judge_run(run: Run, prepared: PreparedSet, rows: Sequence[Mapping], results: Iterable = ()) -> list[Verdict]:
    """Judge the rows of one execution in record form; `results` (with ranks) supply the paired differences."""
    ranks = {result.row: [result.ranks] for result in results if result.ranks is not None}
    differences = {
        (claim.row, claim.over, claim.metric): paired_difference(ranks[claim.row], ranks[claim.over], claim.metric)[:3]
        for claim in load_claims().values()
        if claim.kind == "ordering" and claim.dataset == prepared.name and {claim.row, claim.over} <= ranks.keys()
    }
    return judge_rows(rows, notebook=run.notebook, dataset=prepared.name, protocol=protocol(prepared), scale=run.scale,
                      differences=differences)  # fmt: skip


def paired_difference(
    first: Sequence[Ranks], second: Sequence[Ranks], metric: str, rule: str = RULES[0]
) -> tuple[float, ...]:
    """Return (mean, low, high, p) of first minus second over the same users, seed by seed: 95 % and randomisation.

    `rule` is one of `RULES`; the sampled one is its expectation. Seeds that one side lacks (None) do not count.
    """
    from textrec.evaluation.significance import bootstrap_interval, paired_randomisation

    first, second = zip(*shared_seeds(first, second), strict=True)
    for a, b in zip(first, second, strict=True):
        if not (np.array_equal(a.users_U, b.users_U) and np.array_equal(a.targets_U, b.targets_U)):
            raise InputError("two rows rank different users or targets; a paired difference needs the same")
    a_SU, b_SU = (np.stack([user_values(ranks, metric, rule) for ranks in side]) for side in (first, second))
    low, high = bootstrap_interval(a_SU - b_SU)
    return float((a_SU - b_SU).mean()), float(low), float(high), float(paired_randomisation(a_SU, b_SU))


def shared_seeds(
    first: Sequence[Ranks | None] | None, second: Sequence[Ranks | None] | None
) -> list[tuple[Ranks, Ranks]]:
    """Return the ranks of two rows for the seeds that both have; none where a row has none at all."""
    both = zip(first, second, strict=True) if first and second else ()
    return [(a, b) for a, b in both if a is not None and b is not None]


def user_values(ranks: Ranks, metric: str, rule: str = RULES[0]) -> np.ndarray:
    """Return the metric of each user under one of `RULES`."""
    from textrec.evaluation.conventions import expected_sampled_metrics
    from textrec.evaluation.metrics import per_user_metrics

    ks = (int(metric.partition("@")[2] or 1),)
    if rule == RULES[2]:
        return expected_sampled_metrics(ranks.filtered, SAMPLED, ks)[metric]
    return per_user_metrics({RULES[0]: ranks.filtered, RULES[1]: ranks.kept}[rule], ks=ks)[metric]


def ranks_at_hand(group: Sequence[Record]) -> dict[str, list[Ranks | None]]:
    """Return per row the ranks by seed that lie in the run folders, None where a seed has none; rows without any lack.

    They are of the users whom all rows of a run rank: one that asks a sample is compared on that sample.
    """
    found: dict[str, list[Ranks | None]] = {}
    for name in dict.fromkeys(row["row"] for record in group for row in record.rows):
        files = [record.folder / "rows" / name / "ranks.parquet" for record in group]
        if any(path.is_file() for path in files):
            found[name] = [Ranks.load(path) if path.is_file() else None for path in files]
    for seed in range(len(group) if found else 0):
        here = {name: ranks[seed] for name, ranks in found.items() if ranks[seed] is not None}
        shared = reduce(np.intersect1d, (ranks.users_U for ranks in here.values())) if here else ()
        for name, ranks in here.items():
            found[name][seed] = ranks.subset(np.isin(ranks.users_U, shared))
    return found


def ablation_table(group: Sequence[Record], metric: str = "ndcg@10", *, reference: str | None = None,
                   ranks: Mapping[str, Sequence[Ranks]] | None = None):  # fmt: skip
    """Return a frame of one run label: row, changed, value, interval, difference from the reference row, status, cost.

    The reference is the row whose `changed` begins with "reference", or the first. Where the ranks of both are at hand
    the difference is paired over users and the seeds that both have, with its interval and a p-value corrected by Holm
    over the table; else it is that of the values, if these are of the same seeds.
    """
    import pandas

    from textrec.evaluation.significance import holm

    rows = merged_rows(group)
    known = {row["row"]: row for row in rows}
    if reference is None:
        reference = next((row["row"] for row in rows if row["changed"].startswith("reference")), rows[0]["row"])
    if reference not in known:
        raise InputError(f"reference row {reference} is none of {', '.join(known)}")
    ranks = ranks_at_hand(group) if ranks is None else ranks
    paired = {name: paired_difference(ranks[name], ranks[reference], metric)
              for name in known if name != reference and shared_seeds(*map(ranks.get, (name, reference)))}  # fmt: skip
    corrected = dict(zip(paired, holm([p for *_, p in paired.values()]), strict=True))
    lines = []
    for name, row in known.items():
        measured, base = (known[key]["metrics"].get(metric, {}) for key in (name, reference))
        alike = name != reference and row["seeds"] == known[reference]["seeds"]
        difference = measured["value"] - base["value"] if measured and base and alike else None
        mean, low, high, _ = paired.get(name, (difference, None, None, None))
        lines.append({
            "row": name, "changed": row["changed"], "status": row["reason"] or row["status"],
            "seeds": len(row["seeds"]), metric: measured.get("value"), "low": measured.get("low"),
            "high": measured.get("high"), "sd": measured.get("sd"), "difference": mean, "difference_low": low,
            "difference_high": high, "p_holm": corrected.get(name), "wall_s": row["cost"].get("wall_s"),
        })  # fmt: skip
    return pandas.DataFrame(lines)


def verdict_table(verdicts: Iterable[Verdict | Judged]):
    """Return a frame: published beside ours, interval, seeds, gap, verdict and the command; orderings hold differences.

    Verdicts of the smoke scale carry no measured number.
    """
    import pandas

    lines = []
    for entry in verdicts:
        judged = entry if isinstance(entry, Judged) else Judged(entry)
        verdict, claim = judged.verdict, judged.verdict.claim
        lines.append({
            "claim": claim.id, "dataset": claim.dataset, "row": claim.subject, "metric": claim.metric,
            "kind": claim.kind, "published": IN_WORDS if claim.worded else claim.value, "ours": verdict.measured,
            "low": verdict.low, "high": verdict.high, "seeds": len(judged.seeds), "gap": verdict.gap,
            "verdict": verdict.word, "reason": verdict.reason, "where": f"{claim.paper}: {claim.where}",
            "command": judged.command,
        })  # fmt: skip
    frame = pandas.DataFrame(lines)
    frame["published"] = pandas.Series([line["published"] for line in lines], dtype=object)  # counts stay whole
    return frame


def results_table(records: Iterable[Record], metrics: Sequence[str] = ("recall@10", "ndcg@10")):
    """Return a frame with every row of every run label, failed ones with their reason: metrics, intervals, cost."""
    import pandas

    lines = []
    for label, group in group_records(records).items():
        for row in merged_rows(group):
            line = {"run": label, "dataset": group[0].dataset["name"], "row": row["row"], "changed": row["changed"],
                    "status": row["reason"] or row["status"], "seeds": len(row["seeds"])}  # fmt: skip
            for metric in metrics:
                estimate = row["metrics"].get(metric, {})
                line |= {metric if part == "value" else f"{metric} {part}": estimate.get(part)
                         for part in ("value", "low", "high", "sd")}  # fmt: skip
            lines.append(line | row["cost"] | {"command": command(group)})
    return pandas.DataFrame(lines)


def format_estimate(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """Return `0.1790 [0.1725, 0.1853]`, whole numbers as `6,040`, nothing as `–`."""
    if value is None or math.isnan(value):
        return "–"
    if value == round(value) and abs(value) > 1 and low in (None, value):
        return f"{value:,.0f}"
    return f"{value:.4f}" if low is None or math.isnan(low) else f"{value:.4f} [{low:.4f}, {high:.4f}]"


def export_table(frame, stem: Path, *, scale: str) -> list[Path]:
    """Write a frame as `<stem>.csv` and `<stem>.tex`; the smoke scale has nothing that may be tracked."""
    if scale == "smoke":
        raise InputError(f"{stem.name} is asked for at scale smoke, whose numbers never reach a tracked table")
    csv, tex = (stem.with_name(stem.name + suffix) for suffix in (".csv", ".tex"))
    write_text(csv, frame.to_csv(index=False, lineterminator="\n"))
    write_text(tex, frame.to_latex(index=False, escape=True, na_rep="", float_format="%.4f"))
    return [csv, tex]
