"""What a split does not say about itself: time leaks, cold items, ties, repeats, duplicate texts; and the data card."""

from dataclasses import dataclass, field

import numpy as np

from textrec.data.histories import Histories
from textrec.data.prepared import PreparedSet
from textrec.data.splitting import training_counts
from textrec.seeding import generator

TARGETS = ("validation", "test")
DESCRIPTIONS = {
    "targets": "users with a target",
    "without_target": "users without a target",
    "later_share": "training interactions later than the target, mean share",
    "cold": "targets whose item no training interaction has",
    "repeats": "targets already in the user's history",
    "tied": "targets whose second another interaction of the user shares",
    "churn": "targets that change when ties are redrawn, mean",
    "churn_highest": "the same, highest of the draws",
}


@dataclass(frozen=True)
class Audit:
    """Findings of a split. Counts are numbers of targets, shares lie in 0..1, None is not applicable (no times).

    `redrawn[which]` holds the target items [draws, targets] of `Split.targets(which)` when the order inside equal times
    is drawn anew; `redraw_ties(histories, seed)` gives the histories that belong to draw `seed`.
    """

    name: str
    fingerprint: str
    findings: dict[str, dict]  # target kind: finding
    titles: dict[str, int]
    draws: int
    redrawn: dict[str, np.ndarray] = field(repr=False, compare=False)

    def to_frame(self):
        """Return the findings as a pandas frame: a row per finding, a column per kind of target."""
        import pandas

        columns = {which: pandas.Series(found, dtype=object) for which, found in self.findings.items()}
        return pandas.DataFrame(columns).rename(index=DESCRIPTIONS)  # objects: counts stay whole numbers beside shares

    def __repr__(self) -> str:
        titles = ", ".join(f"{count:,} {text}" for text, count in self.titles.items())
        head = f"audit of {self.name} ({self.fingerprint[:12]}), ties redrawn {self.draws} times; items: {titles}"
        return f"{head}\n{self.to_frame().map(_shown).to_string()}"


def audit(prepared: PreparedSet, *, draws: int = 5) -> Audit:
    """Measure the leaks and ambiguities of a prepared split; `draws` is how often tied times are redrawn."""
    histories, split = prepared.histories, prepared.split
    counts_I = training_counts(histories, split)
    timed, findings, redrawn = has_times(histories), {}, {}
    training_times = _training_times(prepared) if timed else None
    redraws = [redraw_ties(histories, seed) for seed in range(draws)] if timed else []
    for which in TARGETS:
        users, positions = split.targets(which)
        items = histories.at(users, positions)
        redrawn[which] = np.array([drawn.at(users, positions) for drawn in redraws]).reshape(len(redraws), len(users))
        churn = [float((drawn != items).mean()) for drawn in redrawn[which]] if len(users) else []
        findings[which] = {
            "targets": len(users),
            "without_target": histories.num_users - len(users),
            "later_share": _later_share(histories, users, positions, training_times),
            "cold": int((counts_I[items] == 0).sum()),
            "repeats": _repeats(histories, users, positions, items),
            "tied": _tied(histories, users, positions) if timed else None,
            "churn": float(np.mean(churn)) if churn else None,
            "churn_highest": max(churn) if churn else None,
        }
    return Audit(prepared.name, prepared.fingerprint, findings, _titles(prepared), len(redraws), redrawn)


def redraw_ties(histories: Histories, seed: int) -> Histories:
    """Return the histories with the order inside equal times of a user drawn at random; times and lengths stay."""
    users_E = np.repeat(np.arange(histories.num_users, dtype=np.int32), histories.lengths_U)
    noise_E = generator(seed, "redraw ties").random(len(users_E), dtype=np.float32)
    order_E = np.lexsort((noise_E, histories.times_E, users_E))
    return Histories(histories.items_E[order_E], histories.times_E, histories.offsets_U1)


def has_times(histories: Histories) -> bool:
    """Return whether the source had times or only an order."""
    return bool(histories.times_E.any())


def data_card(prepared: PreparedSet, findings: Audit | None = None) -> str:
    """Return a description of the set in Markdown: sources, filters, statistics against the publisher's, choices."""
    details, histories, lengths_U = prepared.details, prepared.histories, prepared.histories.lengths_U
    counts, published, targets = details["counts"], details["published"], details["targets"]
    texts = prepared.catalogue.drop(columns="item")
    facts = {
        "interactions per user": f"{lengths_U.min()} to {lengths_U.max():,}, median {np.median(lengths_U):g}, "
        f"mean {lengths_U.mean():.1f}",
        "density": f"{counts['interactions'] / counts['users'] / counts['items']:.3%}",
        "times": _time_range(histories) if has_times(histories) else "an order only",
        "validation and test targets": f"{targets['validation']:,} and {targets['test']:,}",
        "item rows": ", ".join(f"{key.replace('_', ' ')} {value:,}" for key, value in details["catalogue"].items()),
        "texts filled": ", ".join(f"{name} {(texts[name] != '').mean():.1%}" for name in texts),
        "choices": ", ".join(f"{key} {value}" for key, value in details["choices"].items()),
        "fingerprint": f"`{prepared.fingerprint}`",
    }
    if details["ties"]:
        tied, last = details["ties"]["interactions"], details["ties"]["last"]
        facts["tied times"] = f"{tied:.1%} of interactions, the newest two of {last:.1%} of users"
    parts = [
        f"# {prepared.name}",
        details["note"],
        _table(("", "ours", "published"), [(key, counts[key], published.get(key)) for key in counts]),
        _table(("step", "users", "items", "interactions"), [step.values() for step in details["steps"]]),
        "\n".join(f"- {key}: {value}" for key, value in facts.items()),
        _table(("source", "bytes", "sha256"), [(s["file"], s["bytes"], s["sha256"]) for s in details["sources"]]),
        f"```\n{findings}\n```" if findings else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(header: tuple[str, ...], rows) -> str:
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *([_shown(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _training_times(prepared: PreparedSet) -> np.ndarray:
    histories, split = prepared.histories, prepared.split
    starts_U = histories.offsets_U1[:-1]
    counts_E1 = np.zeros(len(histories.items_E) + 1, dtype=np.int32)
    np.add.at(counts_E1, starts_U, 1)
    np.add.at(counts_E1, starts_U + split.train_end_U, -1)
    return np.sort(histories.times_E[np.cumsum(counts_E1[:-1]) > 0])


def _later_share(histories, users, positions, training_times) -> float | None:
    if training_times is None or not len(users) or not len(training_times):
        return None
    times = histories.times_E[histories.offsets_U1[users] + positions]
    earlier = np.searchsorted(training_times, times, side="right")
    return float(1 - earlier.mean() / len(training_times))


def _repeats(histories, users, positions, items) -> int:
    if not len(users):
        return 0
    flat, offsets = histories.prefixes(users, positions)
    equal = np.concatenate([[0], np.cumsum(flat == np.repeat(items, positions))])
    return int((np.diff(equal[offsets]) > 0).sum())


def _tied(histories, users, positions) -> int:
    rows = histories.offsets_U1[users] + positions
    times = histories.times_E[rows]
    before = (positions > 0) & (histories.times_E[np.maximum(rows - 1, 0)] == times)
    following = np.minimum(rows + 1, len(histories.times_E) - 1)
    after = (positions + 1 < histories.lengths_U[users]) & (histories.times_E[following] == times)
    return int((before | after).sum())


def _titles(prepared: PreparedSet) -> dict[str, int]:
    titles = prepared.catalogue["title"]
    filled = titles[titles != ""]
    shared = int(filled.duplicated(keep=False).sum())
    return {"without a title": len(titles) - len(filled), "sharing their title with another": shared}


def _time_range(histories: Histories) -> str:
    seconds = np.array([histories.times_E.min(), histories.times_E.max()], "datetime64[s]")
    return " to ".join(seconds.astype("datetime64[D]").astype(str))


def _shown(value) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
