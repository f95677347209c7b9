"""Published numbers as data, and the one rule by which a measurement of ours is held against one of them.

What a verdict means (`tolerance` is fixed in claims.yaml before any run; intervals are 95 %):

* `reproduced`: our mean differs from the published level (or ratio) by at most the tolerance. If the whole interval
  lies inside that band, the reason says `equivalent`: the stronger, statistical statement.
* `ordering reproduced`: who wins is the same, by an interval of the paired difference that excludes zero.
* `not reproduced`: neither; the reason says by how much, and whether the interval still reaches into the band.
* `not attempted (why)`: not run, failed, or run under another data set or protocol, which is named.
* `plumbing only`: all that the smoke scale may say.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from textrec.data.choices import closest
from textrec.schema import InputError

LEDGER = Path(__file__).with_name("claims.yaml")
KINDS = ("level", "ordering", "ratio", "floor")
SOURCES = ("D", "C", "I", "R", "P")
PROTOCOL = ("split", "validation", "ranking", "seen", "ties", "time_tie_rule")
REPRODUCED, ORDERING, NOT_REPRODUCED = "reproduced", "ordering reproduced", "not reproduced"
NOT_ATTEMPTED, PLUMBING = "not attempted", "plumbing only"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One published number and the place where it stands."""

    id: str  # group/system/metric
    paper: str
    where: str  # document, table, row
    system: str  # its name there
    dataset: str
    protocol: Mapping[str, str]  # a field that the document does not state is absent
    metric: str
    value: float  # of an ordering: the published difference
    kind: str = "level"
    tolerance: float = 0.05  # relative
    source: str = "D"
    notebook: str = "01"
    row: str | None = None  # the row of ours that is judged; None: only a marker in figures
    over: str | None = None  # of an ordering or ratio: the row that is beaten
    beside: str | None = None  # the row of ours beside which a marker is drawn
    accepts: Mapping[str, str] = field(default_factory=dict)  # protocol field -> why a difference is accepted
    worded: bool = False  # an ordering that the document states without a number; of `value` the sign alone counts

    @property
    def subject(self) -> str | None:
        """Return what of ours is judged: a row, a difference or a quotient of two."""
        return f"{self.row} {'−' if self.kind == 'ordering' else '/'} {self.over}" if self.over else self.row

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("source", SOURCES)):
            if getattr(self, name) not in known:
                raise InputError(f"claim {self.id}: {name} {getattr(self, name)!r} is none of {', '.join(known)}")
        for name in (*self.protocol, *self.accepts):
            if name not in PROTOCOL:
                raise InputError(f"claim {self.id}: no protocol field `{name}`{closest(name, PROTOCOL)}")
        if type(self.value) not in (int, float) or not math.isfinite(self.value) or not self.value:
            raise InputError(f"claim {self.id}: value is {self.value!r}; expected a number other than 0")


@dataclass(frozen=True)
class Verdict:
    """What may be said about one claim."""

    claim: Claim
    word: str
    measured: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.word == NOT_ATTEMPTED else self.word

    @property
    def gap(self) -> float | None:
        """Return ours relative to the published value, e.g. -0.04; None for an ordering or without a measurement."""
        if self.measured is None or self.claim.kind == "ordering":
            return None
        return self.measured / self.claim.value - 1

    def record(self) -> dict:
        """Return the entry of `claims` in record.json."""
        published = None if self.claim.worded else self.claim.value
        return {"id": self.claim.id, "published": published, "measured": self.measured,
                "low": self.low, "high": self.high, "verdict": str(self)}  # fmt: skip


@cache
def load_claims(path: Path = LEDGER) -> dict[str, Claim]:
    """Read the ledger: claims by id, in the order of the file; an `InputError` names what is wrong in which group."""
    import yaml

    ledger = yaml.safe_load(path.read_text(encoding="utf-8"))
    claims: dict[str, Claim] = {}
    for group in ledger["groups"]:
        for claim in _claims_of_group(ledger["defaults"], group):
            if claim.id in claims:
                raise InputError(f"{path.name}: claim {claim.id} occurs twice")
            claims[claim.id] = claim
    return claims


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower().replace("+", " plus ")).strip("-")


GROUP_KEYS = ("id", "paper", "where", "dataset", "protocol", "accepts", "source", "notebook", "kind", "tolerance",
              "metrics", "systems", "orderings", "ratios", "worded")  # fmt: skip
SYSTEM_KEYS = ("row", "beside", "values")


def _claims_of_group(defaults: dict, group: dict) -> list[Claim]:
    group = defaults | {"protocol": {}, "accepts": {}, "systems": {}} | group
    label = f"claims group {group.get('id')}"
    _refuse_unknown(label, group, GROUP_KEYS)
    if missing := [key for key in ("id", "paper", "where", "dataset") if not group.get(key)]:
        raise InputError(f"{label} has no `{missing[0]}`: a number without its place is no claim")
    if not group["systems"] and not group.get("worded"):
        raise InputError(f"{label} has neither `systems` nor `worded`: it claims nothing")
    names = ("paper", "dataset", "protocol", "accepts", "source", "notebook", "tolerance")
    shared = {name: group[name] for name in names}
    found = []
    for name, system in group["systems"].items():
        _refuse_unknown(f"{label}, {name}", system, SYSTEM_KEYS)
        if len(system["values"]) != len(group["metrics"]):
            raise InputError(f"{label}, {name}: {len(system['values'])} values for {len(group['metrics'])} metrics")
        row = system.get("row")
        found += [
            Claim(id=f"{group['id']}/{_slug(name)}/{metric}", where=f"{group['where']}, row {name}", system=name,
                  metric=metric, value=value, kind=group["kind"], row=row, beside=system.get("beside", row), **shared)
            for metric, value in zip(group["metrics"], system["values"], strict=True) if value is not None
        ]  # fmt: skip
    pairs = [("ordering", *pair) for pair in group.get("orderings", ())]
    pairs += [("ratio", *pair) for pair in group.get("ratios", ())]
    by_system = {(claim.system, claim.metric): claim for claim in found}
    found += [_pair(kind, by_system[a, metric], by_system[b, metric], group, shared) for kind, a, b, metric in pairs]
    return found + [
        Claim(id=f"{group['id']}/{_slug(row)}-over-{_slug(over)}/{metric}", where=group["where"], kind="ordering",
              system=f"{row} over {over}", metric=metric, value=1, worded=True, row=row, over=over, **shared)
        for row, over in group.get("worded", ()) for metric in group["metrics"]
    ]  # fmt: skip


def _pair(kind: str, first: Claim, second: Claim, group: dict, shared: dict) -> Claim:
    value = first.value - second.value if kind == "ordering" else first.value / second.value
    word = {"ordering": "over", "ratio": "per"}[kind]
    return Claim(id=f"{group['id']}/{_slug(first.system)}-{word}-{_slug(second.system)}/{first.metric}", kind=kind,
                 where=f"{group['where']}, rows {first.system} and {second.system}", metric=first.metric,
                 system=f"{first.system} {word} {second.system}", value=round(value, 6), row=first.beside,
                 over=second.beside, **shared)  # fmt: skip


def _refuse_unknown(where: str, given: Mapping, known: Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise InputError(f"{where}: unknown key `{name}`{closest(name, known)}")


def mismatch(claim: Claim, protocol: Mapping[str, str], dataset: str) -> str | None:
    """Return the first field in which a measurement differs from the claim, in words; None: they may be compared.

    A field which the document does not state is not compared; a difference that `claim.accepts` names is accepted.
    """
    if dataset != claim.dataset:
        return f"data set: published on {claim.dataset}, measured on {dataset}"
    for name, published in claim.protocol.items():
        if protocol.get(name) != published and name not in claim.accepts:
            return f"{name}: published under {published}, measured under {protocol.get(name)}"
    return None


def judge(claim: Claim, value: float, low: float | None, high: float | None, protocol: Mapping[str, str],
          dataset: str, scale: str) -> Verdict:  # fmt: skip
    """Hold a mean and its 95 % interval against a claim; what the words mean stands on top of this module.

    For an ordering `value` is the paired difference of the two rows, for a ratio their quotient. An unlike data set or
    protocol is refused with an `InputError` that names the field; the smoke scale may say `plumbing only` and no more.
    """
    if scale == "smoke":
        return Verdict(claim, PLUMBING, reason="the smoke scale judges nothing")
    if difference := mismatch(claim, protocol, dataset):
        raise InputError(f"claim {claim.id} may not be compared: {difference}")
    bounds = [value] if low is None or high is None else [low, value, high]
    if not all(map(math.isfinite, bounds)) or bounds != sorted(bounds):
        raise InputError(f"claim {claim.id}: measured {value} in [{low}, {high}]; expected low <= value <= high")
    word, reason = _word_and_reason(claim, value, *(bounds[::2] if len(bounds) == 3 else (math.nan, math.nan)))
    for name, why in claim.accepts.items():
        if protocol.get(name) != claim.protocol.get(name):
            reason += f"; accepted although {name} differs: {why}"
    return Verdict(claim, word, value, low, high, reason)


def _word_and_reason(claim: Claim, value: float, low: float, high: float) -> tuple[str, str]:
    """Judge a measurement that may be compared; without an interval its ends are nan, of which no comparison holds."""
    if claim.kind == "floor":
        if value >= claim.value:
            return REPRODUCED, "at or above the floor" + ", with the whole interval" * (low >= claim.value)
        return NOT_REPRODUCED, "below the floor" + ", the interval reaches it" * (high >= claim.value)
    if claim.kind == "ordering":
        if math.isnan(low):
            return NOT_ATTEMPTED, "an ordering needs the interval of the paired difference"
        if claim.value < 0:
            low, high = -high, -low
        if low > 0:
            return ORDERING, "the interval of the paired difference excludes zero"
        reversed_, open_ = "the order is reversed", "the interval of the paired difference holds zero"
        return NOT_REPRODUCED, reversed_ if high < 0 else open_
    slack = claim.tolerance * abs(claim.value) * (1 + 1e-9)  # a value on the rim of the band is inside
    bottom, top = claim.value - slack, claim.value + slack
    band = f"±{100 * claim.tolerance:.3g} %"
    if bottom <= value <= top:
        if bottom <= low and high <= top:
            return REPRODUCED, f"equivalent: the whole interval lies within {band}"
        return REPRODUCED, f"the mean lies within {band}" + ", the interval reaches out" * (not math.isnan(low))
    reason = f"{'above' if value > top else 'below'} {band}" + ", the interval reaches in" * (
        bottom <= high and low <= top
    )
    if claim.kind == "ratio" and (low > 1 if claim.value > 1 else high < 1):
        return ORDERING, f"{reason}; the interval excludes 1 on the published side"
    return NOT_REPRODUCED, reason


def judge_rows(rows: Iterable[Mapping], *, notebook: str, dataset: str, protocol: Mapping[str, str], scale: str,
               differences: Mapping[tuple[str, str, str], tuple[float, float, float]] | None = None,
               claims: Mapping[str, Claim] | None = None) -> list[Verdict]:  # fmt: skip
    """Judge every claim of a notebook and data set by rows in record form; what could not be judged says why.

    `protocol` is that of the rows' main `metrics`; a sampled claim is held against `slices[<its ranking>]`, a claim
    that keeps seen items against `slices["seen_kept"]`. `differences[row, over, metric]` is (mean, low, high) of a
    paired difference, for the orderings. At smoke scale every claim of the notebook, on any set, is `plumbing only`.
    """
    claims = load_claims() if claims is None else claims
    mine = [claim for claim in claims.values() if claim.notebook == notebook and claim.row]
    if scale == "smoke":
        return [judge(claim, math.nan, None, None, protocol, dataset, scale) for claim in mine]
    by_name = {row["row"]: row for row in rows}
    verdicts = []
    for claim in (claim for claim in mine if claim.dataset == dataset):
        section, measured_under = _section(claim, protocol)
        measured = _measured(claim, section, by_name, differences or {})
        why_not = mismatch(claim, measured_under, dataset) or (measured if isinstance(measured, str) else None)
        verdicts.append(Verdict(claim, NOT_ATTEMPTED, reason=why_not) if why_not
                        else judge(claim, *measured, measured_under, dataset, scale))  # fmt: skip
    return verdicts


def _section(claim: Claim, protocol: Mapping[str, str]) -> tuple[str | None, dict[str, str]]:
    """Return the slice of a row that follows the claim's protocol (None: its main metrics) and its protocol."""
    ranking = claim.protocol.get("ranking", "full")
    if ranking != "full":
        return ranking, protocol | {"ranking": ranking}
    if claim.protocol.get("seen") == "kept":
        return "seen_kept", protocol | {"seen": "kept"}
    return None, dict(protocol)


def _measured(claim: Claim, section: str | None, rows: Mapping[str, Mapping], differences: Mapping) -> tuple | str:
    """Return (value, low, high) of what the claim is about, or why there is none."""
    found = []
    for name in filter(None, (claim.row, claim.over)):
        row = rows.get(name)
        if row is None or row.get("status", "ok") != "ok":
            return f"row {name} was not run" if row is None else f"row {name}: {row['status']}, {row['reason']}"
        metrics = row["metrics"] if section is None else row["slices"].get(section, {})
        if claim.metric not in metrics:
            return f"row {name} has no {claim.metric}" + (f" under {section}" if section else "")
        found.append(metrics[claim.metric])
    if claim.kind == "ordering":
        difference = (found[0]["value"] - found[1]["value"], None, None)
        paired = differences.get((claim.row, claim.over, claim.metric))
        return paired if paired and section is None else difference  # ranks are those of the main metrics
    if claim.kind == "ratio":
        return found[0]["value"] / found[1]["value"], None, None
    return found[0]["value"], found[0]["low"], found[0]["high"]
