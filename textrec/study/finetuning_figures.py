"""Figures of finetuned text models: rows under both rules for seen items, and lines over slices, shares and limits."""

from collections.abc import Mapping, Sequence

import numpy as np

from textrec.study.claims import load_claims, mismatch
from textrec.study.figures import GREY, WIDTH, colours, house_style
from textrec.study.records import Record, intervals
from textrec.study.tables import merged_rows

FREQUENCIES = ("cold_items", "rare_items", "middle_items", "popular_items")
MARKERS = "osD^vP*X"


def row_data(group: Sequence[Record], rows: Sequence[str], lines: Sequence[str] = (), metric: str = "ndcg@10") -> dict:
    """Return rows with seen items filtered and kept, rows to be drawn as `lines`, and the published levels of the set.

    Published levels are those of the notebook's claims, whose papers keep seen items among the candidates.
    """
    first, found = group[0], {row["row"]: row for row in merged_rows(group)}
    told = {
        name: {"row": name, "status": row["reason"] or row["status"]} | row["metrics"].get(metric, {})
        | {"kept": row["slices"].get("seen_kept", {}).get(metric, {}).get("value")}
        for name, row in found.items()
    }  # fmt: skip
    kept, name = first.protocol | {"seen": "kept"}, first.dataset["name"]
    published = [
        {"row": claim.row or claim.beside, "system": claim.system, "value": claim.value, "claim": claim.id}
        for claim in load_claims().values()
        if (claim.kind, claim.metric, claim.notebook) == ("level", metric, first.notebook) and first.scale != "smoke"
        and (claim.row or claim.beside) in rows and not mismatch(claim, kept, name)
    ]  # fmt: skip
    return {"dataset": name, "metric": metric, "rows": [told[row] for row in rows if row in told],
            "lines": [told[row] for row in lines if "value" in told.get(row, {})], "published": published}  # fmt: skip


def plot_rows(data: Mapping):
    """Draw a bar per row with its 95 % interval, a ring where seen items are kept, and `lines` through all rows."""
    import matplotlib.pyplot as plt

    with house_style():
        figure, axes = plt.subplots(figsize=(WIDTH, 1.3 + 0.34 * len(data["rows"])))
        colour, place = colours(row["row"] for row in data["rows"] if "value" in row), {}
        for y, row in enumerate(data["rows"]):
            place[row["row"]] = y
            if "value" not in row:
                axes.text(0.01, y, row["status"][:90], color=GREY, va="center", transform=axes.get_yaxis_transform())
                continue
            axes.barh(y, row["value"], color=colour[row["row"]], height=0.6, alpha=0.85)
            axes.hlines(y, row["low"], row["high"], color="black", linewidth=1.3)
            axes.plot(row["kept"], y, "o", color="black", markerfacecolor="white", markersize=5)
        for line in data["lines"]:
            axes.axvline(line["value"], color=GREY, linestyle="--", linewidth=1.2)
            axes.annotate(f"{line['row']}, trained", (line["value"], -0.55), xytext=(3, 0), color=GREY, fontsize=8,
                          textcoords="offset points", va="bottom", annotation_clip=False)  # fmt: skip
        for marker in data["published"]:
            axes.plot(marker["value"], place[marker["row"]] + 0.33, "d", color="black", fillstyle="none", markersize=7)
        axes.plot([], [], "-", color="black", linewidth=1.3, label="95 % interval, seen items filtered")
        axes.plot([], [], "o", color="black", markerfacecolor="white", markersize=5, label="seen items kept")
        if data["published"]:
            axes.plot([], [], "d", color="black", fillstyle="none", label="published, seen items kept")
        axes.set_yticks(range(len(place)), list(place))
        axes.set_ylim(len(place) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"{data['metric']}, full ranking, {data['dataset']}")
        figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return figure


def slice_data(group: Sequence[Record], rows: Sequence[str], metric: str = "ndcg@10") -> list[dict]:
    """Return lines {row, x, value, low, high}: the metric by how often training saw the target."""
    found = {row["row"]: row["slices"] for row in merged_rows(group)}
    return [
        {"row": row, "x": f"{name.partition('_')[0]}\n{found[row][name]['users']['value']:,.0f} targets"}
        | {part: found[row][name][metric][part] for part in ("value", "low", "high")}
        for row in rows for name in FREQUENCIES if name in found.get(row, {})
    ]  # fmt: skip


def run_lines(results: Mapping[float, Sequence], metric: str = "ndcg@10", *, cost: str | None = None) -> list[dict]:
    """Return lines {row, x, value, low, high} of `RowResult`s by what was varied (`x`): the metric, or a cost alone."""
    lines = []
    for x, result in ((key, each) for key in sorted(results) for each in results[key] if each.ranks is not None):
        measured = intervals(result.ranks.filtered, (int(metric.partition("@")[2]),))[metric]
        lines.append({"row": result.row, "x": x} | ({"value": result.cost[cost]} if cost else measured))
    return lines


def plot_lines(panels: Sequence[tuple[str, str, Sequence[Mapping]]]):
    """Draw panels (x label, y label, lines) side by side; lines are points {row, x, value, low?, high?}.

    Texts as `x` are categories, in which the rows stand beside each other; numbers lie on a logarithmic axis.
    """
    import matplotlib.pyplot as plt

    with house_style():
        figure, ((*several,),) = plt.subplots(1, len(panels), figsize=(WIDTH, 3.4), squeeze=False)
        names = list(dict.fromkeys(point["row"] for *_, lines in panels for point in lines))
        for axes, (xlabel, ylabel, lines) in zip(several, panels, strict=True):
            kinds = list(dict.fromkeys(point["x"] for point in lines))
            named = any(isinstance(kind, str) for kind in kinds)
            for number, (name, colour) in enumerate(colours(names).items()):
                points = [point for point in lines if point["row"] == name]
                aside = 0.08 * (number - (len(names) - 1) / 2)
                xs = [kinds.index(point["x"]) + aside if named else point["x"] for point in points]
                low, high = ([point.get(side, np.nan) for point in points] for side in ("low", "high"))
                axes.vlines(xs, low, high, color=colour, linewidth=1.2)
                style = {"color": colour, "linewidth": 1.4, "marker": MARKERS[number % len(MARKERS)], "markersize": 5,
                         "clip_on": False, "label": name if axes is several[0] else None}  # fmt: skip
                axes.plot(xs, [p["value"] for p in points], **style)
            if named:
                axes.set_xticks(range(len(kinds)), kinds)
            else:
                axes.set_xscale("log")
                axes.set_xticks(kinds, [f"{kind:g}" for kind in kinds])
                axes.xaxis.set_minor_locator(plt.NullLocator())
            axes.set_ylim(bottom=0)
            axes.set_xlabel(xlabel)
            axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    return figure
