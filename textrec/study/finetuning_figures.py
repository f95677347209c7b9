"""Figures of finetuned text models: rows under both rules for seen items, lines over slices and limits, arms."""

from collections.abc import Mapping, Sequence

import numpy as np

from textrec.evaluation.ranking import Ranks
from textrec.evaluation.significance import bootstrap_interval
from textrec.study.figures import GREY, PALETTE, WIDTH, colours, house_style, published_levels
from textrec.study.records import Record, intervals
from textrec.study.tables import merged_rows, shared_seeds, user_values

FREQUENCIES = ("cold_items", "rare_items", "middle_items", "popular_items")
MARKERS = "osD^vP*X"


def row_data(group: Sequence[Record], rows: Sequence[str], lines: Sequence[str] = (), metric: str = "ndcg@10") -> dict:
    """Return a ladder of `rows` with seen items filtered and kept, rows to be drawn as `lines`, and published levels.

    Published levels are those of the notebook's claims, whose papers keep seen items among the candidates.
    """
    first, told = group[0], {}
    for row in merged_rows(group):
        measured, with_seen = row["metrics"].get(metric, {}), row["slices"].get("seen_kept", {}).get(metric)
        told[row["row"]] = {"row": row["row"], "status": row["reason"] or row["status"]} | measured
        told[row["row"]] |= {"kept": with_seen["value"]} if with_seen else {}
    rows = [row for row in rows if row in told]
    published = published_levels(first, metric, first.protocol | {"seen": "kept"}, rows)
    published = [marker for marker in published if marker["notebook"] == first.notebook]
    return {"dataset": first.dataset["name"], "metric": metric, "rows": [told[row] for row in rows],
            "lines": [told[row] for row in lines if "value" in told.get(row, {})], "published": published}  # fmt: skip


def slice_data(group: Sequence[Record], rows: Sequence[str], metric: str = "ndcg@10") -> list[dict]:
    """Return lines {row, x, value, low, high}: the metric by how often training saw the target."""
    found = {row["row"]: row["slices"] for row in merged_rows(group)}
    return [
        {"row": row, "x": f"{name.partition('_')[0]}\n{found[row][name]['users']['value']:,.0f} targets"}
        | {part: found[row][name][metric][part] for part in ("value", "low", "high")}
        for row in rows for name in FREQUENCIES if name in found.get(row, {})
    ]  # fmt: skip


def run_lines(results: Mapping[float, Sequence], *, cost: str | None = None) -> list[dict]:
    """Return lines {row, x, value, low, high} of `RowResult`s by what was varied (`x`): ndcg@10, or a cost alone."""
    lines = []
    for x, result in ((key, each) for key in sorted(results) for each in results[key] if each.ranks is not None):
        told = {"value": result.cost[cost]} if cost else intervals(result.ranks.filtered, (10,))["ndcg@10"]
        lines.append({"row": result.row, "x": x} | told)
    return lines


def plot_lines(panels: Sequence[tuple[str, str, Sequence[Mapping]]]):
    """Draw panels (x label, y label, lines) side by side; lines are points {row, x, value, low?, high?}.

    Texts as `x` are categories, in which the rows stand beside each other; numbers lie on a logarithmic axis.
    """
    import matplotlib.pyplot as plt

    with house_style():
        widths = [2 + len({point["x"] for point in lines}) for *_, lines in panels]
        figure, ((*several,),) = plt.subplots(1, len(panels), figsize=(WIDTH, 3.4), squeeze=False, width_ratios=widths)
        names, handles = list(dict.fromkeys(point["row"] for *_, lines in panels for point in lines)), {}
        for axes, (xlabel, ylabel, lines) in zip(several, panels, strict=True):
            kinds = list(dict.fromkeys(point["x"] for point in lines))
            named = any(isinstance(kind, str) for kind in kinds)
            for number, (name, colour) in enumerate(colours(names).items()):
                points = [point for point in lines if point["row"] == name]
                aside = 0.08 * (number - (len(names) - 1) / 2)
                xs = [kinds.index(point["x"]) + aside if named else point["x"] for point in points]
                low, high = ([point.get(side, np.nan) for point in points] for side in ("low", "high"))
                axes.vlines(xs, low, high, color=colour, linewidth=1.2)
                style = {"color": colour, "linewidth": 1.4, "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
                if points:
                    handles[name], *_ = axes.plot(xs, [p["value"] for p in points], clip_on=False, **style)
            axes.set_xscale("linear" if named else "log")
            ticks = range(len(kinds)) if named else kinds
            axes.set_xticks(ticks, [kind if named else f"{kind:g}" for kind in kinds], fontsize=8)
            axes.xaxis.set_minor_locator(plt.NullLocator())
            axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4, fontsize=8)
    return figure


def paired_ratio(first: Sequence[Ranks], second: Sequence[Ranks], metric: str = "ndcg@10") -> dict[str, float]:
    """Return the mean of first over that of second, for the same users, seed by seed, with its 95 % interval.

    The interval is that of the ratio's linear part, the mean of first - ratio * second. Without any hit of second there
    is no ratio: nan. Seeds that one side lacks do not count.
    """
    sides = [*zip(*shared_seeds(first, second), strict=True)] or ((), ())
    a_SU, b_SU = (np.array([user_values(ranks, metric) for ranks in side]) for side in sides)
    if not b_SU.any():
        return dict.fromkeys(("value", "low", "high"), float("nan"))
    ratio = a_SU.mean() / b_SU.mean()
    low, high = bootstrap_interval(a_SU - ratio * b_SU)
    return {"value": float(ratio)} | {k: float(ratio + x / b_SU.mean()) for k, x in (("low", low), ("high", high))}


def arm_data(arms: Mapping[str, Sequence[str]], ranks: Mapping[str, Sequence[Ranks]]) -> list[dict]:
    """Return panels for `plot_arms`: the ndcg@10 of every arm relative to the first one's, as pretrained and finetuned.

    `arms` gives by name what was taken away, the row as pretrained and the row finetuned, empty where there is none.
    """
    panels = []
    for place, title in ((1, "as pretrained"), (2, "finetuned")):
        reference = ranks.get(next(iter(arms.values()))[place])
        found = [(name, arm[0], ranks[arm[place]]) for name, arm in arms.items() if reference and arm[place] in ranks]
        rows = [{"row": name, "kind": kind} | paired_ratio(own, reference) for name, kind, own in found]
        panels.append({"title": title, "xlabel": "relative ndcg@10", "from_zero": True, "rows": rows})
    return panels


def plot_arms(panels: Sequence[Mapping], *, legend: str):
    """Draw panels {title, xlabel, rows, from_zero?, log?} side by side, with the same rows from top to bottom.

    Rows are {row, kind, value, low?, high?}, coloured by their kind; a dashed line marks the first one's value.
    """
    import matplotlib.pyplot as plt

    with house_style():
        rows = [row for panel in panels for row in panel["rows"]]
        names, kinds = (list(dict.fromkeys(row[key] for row in rows)) for key in ("row", "kind"))
        colour = dict(zip(kinds, (GREY, *PALETTE), strict=False))
        figure, several = plt.subplots(1, len(panels), figsize=(WIDTH, 1.3 + 0.28 * len(names)), sharey=True)
        for axes, panel in zip(several, panels, strict=True):
            for row in panel["rows"]:
                y, shade = -names.index(row["row"]), colour[row["kind"]]
                axes.hlines(y, row.get("low", np.nan), row.get("high", np.nan), color=shade, linewidth=2.4)
                axes.plot(row["value"], y, "o", color=shade, markersize=6)
            axes.axvline(
                panel["rows"][0]["value"] if panel["rows"] else np.nan, color=GREY, linestyle="--", linewidth=1
            )
            axes.set_xscale("log" if panel.get("log") else "linear")
            axes.margins(x=0.1)
            axes.set_xlim(left=0 if panel.get("from_zero") else None)
            axes.set_title(panel["title"])
            axes.set_xlabel(panel["xlabel"])
            axes.set_yticks([-place for place in range(len(names))], names)
            axes.set_ylim(0.4 - len(names), 0.6)
            axes.grid(axis="y", visible=False)
        handles = [plt.Line2D([], [], marker="o", color=colour[kind]) for kind in kinds]
        style = {"fontsize": 8, "title_fontsize": 8, "loc": "outside upper center", "ncols": 4}
        figure.legend(handles, kinds, title=legend, **style)
    return figure
