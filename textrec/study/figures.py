"""Figures in one house style: plain plot data in, a figure out, and a saved figure carries its data and provenance.

Every `plot_*` function takes what its sidecar JSON will hold, so that a colour never costs a run and every point can
be looked up. Colours after Okabe and Ito, told apart with any colour vision; lines and points are labelled directly.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from textrec.data.files import replacing, write_text
from textrec.paths import FIGURES
from textrec.study.claims import load_claims, mismatch
from textrec.study.records import Record, Run
from textrec.study.tables import merged_rows

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D31", "#000000")
GREY = "#6B6B6B"
CONTROLS = ("popularity", "last_item", "markov", "random", "random_vectors", "chance", "optimum")
WIDTH = 7.2  # inches: a report column


@contextmanager
def house_style():
    """Draw in the house style inside this block; what is drawn elsewhere keeps its own."""
    import matplotlib.style

    with matplotlib.style.context(Path(__file__).with_name("house.mplstyle")):
        yield


def save_figure(figure, run: Run, name: str, data: object, *, seeds: Sequence[int] | None = None,
                fingerprint: str | None = None, folder: Path | None = None) -> Path:  # fmt: skip
    """Write `figures/<scale>/<label>_<name>` as .png, .svg and .json (the plotted data and its provenance).

    `data` is whatever the `plot_*` function took: frames, arrays, mappings and lists of numbers and text. Equal data,
    commit and library versions give equal bytes. Returns the path of the PNG.
    """
    provenance = {"scale": run.scale, "run": run.label, "seeds": [run.seed] if seeds is None else list(seeds),
                  "commit": run.state[0], "dirty": run.state[1], "fingerprint": fingerprint}  # fmt: skip
    _footer(figure, provenance)
    folder = FIGURES / run.scale if folder is None else folder
    png, svg, sidecar = (folder / f"{run.label}_{name}.{suffix}" for suffix in ("png", "svg", "json"))
    for path, metadata in ((png, {"Software": None}), (svg, {"Date": None, "Creator": None})):
        with house_style(), replacing(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], bbox_inches="tight", metadata=metadata)
    told = json.dumps(provenance | {"data": plain(data)}, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(sidecar, f"{told}\n")
    return png


def plain(data: object) -> object:
    """Return frames, arrays and NumPy numbers as lists and numbers of JSON; what is not finite becomes null."""
    if hasattr(data, "to_dict"):  # a frame or a series
        return plain(data.to_dict(orient="records") if hasattr(data, "columns") else data.to_dict())
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, np.ndarray | np.generic):
        return plain(data.tolist())
    if isinstance(data, list | tuple | range):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and not np.isfinite(data) else data


def _footer(figure, provenance: Mapping) -> None:
    """Write where the figure comes from under it, once however often it is saved."""
    for text in [text for text in figure.texts if text.get_gid() == "provenance"]:
        text.remove()
    seeds = ", ".join(map(str, provenance["seeds"]))
    parts = [f"scale {provenance['scale']}", f"run {provenance['run']}", f"seeds {seeds}",
             f"commit {provenance['commit'][:7]}{' + changes' if provenance['dirty'] else ''}"]  # fmt: skip
    if provenance["fingerprint"]:
        parts.append(f"data {provenance['fingerprint'][:10]}")
    if provenance["scale"] == "smoke":
        parts.append("plumbing only: these numbers say nothing")
    figure.text(0.0, -0.02, " · ".join(parts), fontsize=7, color=GREY, va="top", gid="provenance")


def _subplots(height: float):
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(WIDTH, height))


def colours(rows: Iterable[str]) -> dict[str, str]:
    """Return a colour per row: controls grey, models in the order of the palette."""
    rows = list(dict.fromkeys(rows))
    models = [row for row in rows if row not in CONTROLS]
    return dict.fromkeys(rows, GREY) | {row: PALETTE[place % len(PALETTE)] for place, row in enumerate(models)}


def _ink(colour: str) -> tuple[float, ...]:
    """Return a colour dark enough for text."""
    return tuple(0.72 * int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))


# ---- ladder of rows --------------------------------------------------------------------------------------------------


def ladder_data(group: Sequence[Record], metric: str = "ndcg@10", preparations: Collection[str] = ()) -> dict:
    """Return our rows over seeds and the published levels of the same set, metric and protocol, from records.

    Published levels of other `preparations` of the same ratings are marked as such.
    """
    first = group[0]
    rows = [{"row": row["row"], "changed": row["changed"], "status": row["reason"] or row["status"],
             "seeds": len(row["seeds"])} | row["metrics"].get(metric, {}) for row in merged_rows(group)]  # fmt: skip
    published = published_levels(first, metric, first.protocol, {row["row"] for row in rows}, preparations)
    return {"dataset": first.dataset["name"], "metric": metric, "rows": rows, "published": published}


def published_levels(record: Record, metric: str, protocol: Mapping[str, str], rows: Collection[str],
                     preparations: Collection[str] = ()) -> list[dict]:  # fmt: skip
    """Return the published levels on the record's set that stand beside `rows`; smoke has none.

    They are of this `protocol` but for the validation, which takes no test target away, and on other `preparations` of
    the set for the order of equal times, which does; those judge nothing.
    """
    own, found = record.dataset["name"], []
    for claim in load_claims().values():
        row, other = claim.row or claim.beside, claim.dataset in {*preparations} - {own}
        free = ("validation", "time_tie_rule") if other else ("validation",)
        measured = protocol | {name: claim.protocol.get(name) for name in free}
        told = (claim.kind, claim.metric) == ("level", metric) and claim.source != "P" and row in rows
        if told and record.scale != "smoke" and not mismatch(claim, measured, claim.dataset if other else own):
            found.append({
                "row": row, "judged": claim.row is not None and not other, "system": claim.system, "value": claim.value,
                "paper": claim.paper, "notebook": claim.notebook, "claim": claim.id, "preparation": claim.dataset,
            })  # fmt: skip
    return found


def plot_ladder(data: Mapping):
    """Draw every row of ours with its 95 % interval, the published levels beside it, and failed rows by name.

    A row may have a value with seen items `kept` among the candidates, a ring; `lines` are rows drawn through all.
    """
    with house_style():
        rows, lines = data["rows"], data.get("lines", ())
        figure, axes = _subplots(0.9 + 0.34 * len(rows))
        colour = colours(row["row"] for row in rows if row.get("value") is not None)  # the same as the curves'
        place = {row["row"]: -index for index, row in enumerate(rows)}
        for row in rows:
            y = place[row["row"]]
            if row.get("value") is None:
                at_left = axes.get_yaxis_transform()
                axes.text(0.01, y, row["status"][:90], color=_ink(PALETTE[1]), va="center", transform=at_left)
                continue
            axes.hlines(y, row["low"], row["high"], color=colour[row["row"]], linewidth=2.4)
            axes.plot(row["value"], y, "o", color=colour[row["row"]], markersize=6)
            axes.plot(row.get("kept", []), [y] * ("kept" in row), "o", color="black", fillstyle="none", markersize=5)
        others = sorted({marker["preparation"] for marker in data["published"]} - {data["dataset"]})
        shapes = {data["dataset"]: "d"} | dict(zip(others, "s^v", strict=False))
        for marker in sorted(data["published"], key=lambda marker: marker["judged"]):
            style = {"color": "black", "markersize": 7} if marker["judged"] else {"color": GREY, "markersize": 5}
            shape = shapes[marker["preparation"]]
            axes.plot(marker["value"], place[marker["row"]] - 0.3, shape, fillstyle="none", **style)
        for line in lines:
            axes.axvline(line["value"], color=GREY, linestyle="--", linewidth=1.2)
            axes.text(line["value"], 0.65, line["row"], color=GREY, fontsize=8, ha="center", va="bottom")
        axes.plot([], [], "o", color=PALETTE[0], label="ours, 95 % interval")
        if any("kept" in row for row in rows):
            axes.plot([], [], "o", color="black", fillstyle="none", markersize=5, label="ours, seen items kept")
        if any(marker["judged"] for marker in data["published"]):
            axes.plot([], [], "d", color="black", fillstyle="none", label="published, the level we are judged by")
        unjudged = {m["preparation"] for m in data["published"] if not m["judged"]}
        for name in (name for name in shapes if name in unjudged):
            told = "published by others" if name == data["dataset"] else f"published on {name}"
            axes.plot([], [], shapes[name], color=GREY, fillstyle="none", markersize=5, label=told)
        axes.set_yticks(list(place.values()), list(place))
        axes.set_ylim(-len(rows) + 0.4, 0.6)
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{data['metric']}, full ranking")
        axes.set_title(data["dataset"], pad=18 if lines else None)
        figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


# ---- curves of training ----------------------------------------------------------------------------------------------


def curve_data(results: Iterable) -> list[dict]:
    """Return the epochs of `RowResult`s as lines: row, epoch, minutes so far, train_loss, ndcg@10 (validation)."""
    lines = []
    for result in results:
        seconds = 0.0
        for entry in result.curve:
            seconds += entry["seconds"]
            lines.append({"row": result.row, **entry, "minutes": seconds / 60})
    return lines


def plot_validation_curves(data: Sequence[Mapping], *, x: str = "epoch"):
    """Draw the ndcg@10 of every row, its best point marked and its name at its end; `x` may be "minutes"."""
    with house_style():
        figure, axes = _subplots(3.6)
        names = list(dict.fromkeys(line["row"] for line in data))
        ends = []
        for name, colour in colours(names).items():
            lines = (line for line in data if line["row"] == name and line.get("ndcg@10") is not None)
            points = [(line[x], line["ndcg@10"]) for line in lines]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5)
                axes.plot(*max(points, key=lambda point: point[1]), "o", color=colour, markersize=5)
                ends.append((*points[-1], name, colour))
        axes.set_xlabel({"epoch": "epoch", "minutes": "minutes of training"}.get(x, x))
        axes.set_ylabel("ndcg@10 on validation targets")
        axes.xaxis.get_major_locator().set_params(integer=x == "epoch")
        _label_ends(axes, ends)
    return figure


def _label_ends(axes, ends: Sequence[tuple]) -> None:
    """Name each point at the right edge, a line to it; names are moved just so far that none covers another."""
    from scipy.optimize import isotonic_regression

    if not ends:
        return
    (bottom, top), ends = axes.get_ylim(), sorted(ends, key=lambda end: end[1])
    steps_N = min(0.055, 1 / len(ends)) * (top - bottom) * np.arange(len(ends))
    levels_N = isotonic_regression([y for _, y, _, _ in ends] - steps_N).x.clip(bottom, top - steps_N[-1]) + steps_N
    for (x, y, name, colour), level in zip(ends, levels_N, strict=True):
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2, "relpos": (0, 0.5)}
        axes.annotate(name, (x, y), xytext=(1.01, level), textcoords=axes.get_yaxis_transform(), color=_ink(colour),
                      va="center", fontsize=8.5, arrowprops=arrow)  # fmt: skip


# ---- data ------------------------------------------------------------------------------------------------------------


def length_data(lengths: Mapping[str, np.ndarray]) -> dict[str, list]:
    """Return the percentiles 0..100 of history lengths per data set."""
    shares = np.arange(101)
    return {name: np.percentile(values_U, shares, method="inverted_cdf").tolist() for name, values_U in lengths.items()}


def plot_history_lengths(data: Mapping[str, Sequence[float]], *, cutoffs: Sequence[int] = (50, 200)):
    """Draw the share of users with at most so many interactions, and where the models cut histories."""
    with house_style():
        figure, axes = _subplots(3.4)
        for (name, percentiles), colour in zip(data.items(), PALETTE * 3, strict=False):
            axes.step(percentiles, range(101), where="post", color=colour, linewidth=1.6, label=name)
        for cutoff in cutoffs:
            axes.axvline(cutoff, color=GREY, linewidth=0.9, linestyle=":")
            axes.text(cutoff, 101, f"cut at {cutoff}", color=GREY, fontsize=8, ha="center", va="bottom")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        figure.legend(loc="outside right center", fontsize=8.5)
        axes.set_xlabel("interactions of a user (log scale)")
        axes.set_ylabel("users with at most so many (%)")
        axes.set_ylim(0, 100)
    return figure


def plot_bars(data: Sequence[Mapping], *, xlabel: str, percent: bool = False):
    """Draw labelled bars {label, value, low?, high?, group?}: e.g. test targets that another tie rule changes.

    With `percent` values are shares and are drawn as percentages. Bars of one `group` share a colour and a name.
    """
    with house_style():
        figure, axes = _subplots(0.9 + 0.32 * len(data))
        factor = 100 if percent else 1
        colour = dict(zip(dict.fromkeys(bar.get("group") for bar in data), PALETTE * 3, strict=False))
        for place, bar in enumerate(data):
            value = bar["value"] * factor
            axes.barh(-place, value, color=colour[bar.get("group")], height=0.62)
            end = value
            if bar.get("low") is not None:
                end = max(end, bar["high"] * factor)
                axes.hlines(-place, bar["low"] * factor, bar["high"] * factor, color="black", linewidth=1.2)
            told = f"{value:.1f} %" if percent else f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"
            axes.annotate(told, (end, -place), xytext=(4, 0),
                          textcoords="offset points", va="center", fontsize=8.5)  # fmt: skip
        axes.set_yticks([-place for place in range(len(data))], [bar["label"] for bar in data])
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.12)
        if any(min(bar["value"], bar.get("low") or 0) < 0 for bar in data):
            axes.axvline(0, color=GREY, linewidth=1)
        else:
            axes.set_xlim(0, axes.get_xlim()[1] if any(bar["value"] for bar in data) else 1)
        axes.set_xlabel(f"{xlabel} (%)" if percent else xlabel)
        if len(colour) > 1:
            handles = [axes.barh(np.nan, np.nan, color=shade, label=name) for name, shade in colour.items()]
            figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=8)
    return figure


# ---- protocols and cost ----------------------------------------------------------------------------------------------


def protocol_data(group: Sequence[Record], metric: str = "ndcg@10", *, other: str = "seen_kept") -> list[dict]:
    """Return per row the metric under the main protocol (x) and in the slice `other` (y), from records."""
    return [
        {"row": row["row"], "x": row["metrics"][metric]["value"], "y": row["slices"][other][metric]["value"]}
        for row in merged_rows(group)
        if metric in row["metrics"] and metric in row["slices"].get(other, {})
    ]


def cost_data(group: Sequence[Record], metric: str = "ndcg@10") -> list[dict]:
    """Return per row the mean wall time of one seed (x) and the metric with its interval (y, low, high)."""
    lines = []
    for row in (row for row in merged_rows(group) if metric in row["metrics"] and "wall_s" in row["cost"]):
        measured, seconds = row["metrics"][metric], row["cost"]["wall_s"] / max(1, len(row["seeds"]))
        bounds = {"low": measured["low"], "high": measured["high"]}
        lines.append(
            {"row": row["row"], "x": max(seconds, 0.01), "y": measured["value"], **bounds}
        )  # 0 has no logarithm
    return lines


def plot_scatter(data: Sequence[Mapping], *, xlabel: str, ylabel: str, diagonal: bool = False, log_x: bool = False):
    """Draw named points {row, x, y, low?, high?}: two protocols against each other, or cost against quality.

    `diagonal` draws x = y. The title says how far the two axes agree on the order of the rows (Kendall's tau).
    """
    with house_style():
        figure, axes = _subplots(4.2)
        colour = colours(point["row"] for point in data)
        if diagonal and data:
            top = max(max(point["x"], point["y"]) for point in data) * 1.05
            axes.plot([0, top], [0, top], color=GREY, linewidth=0.9, linestyle=":")
        for point in data:
            if point.get("low") is not None:
                axes.vlines(point["x"], point["low"], point["high"], color=colour[point["row"]], linewidth=1.4)
            axes.plot(point["x"], point["y"], "o", color=colour[point["row"]], markersize=6)
        if log_x:
            from matplotlib.ticker import LogLocator, NullFormatter

            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.margins(0.12)
        if not log_x and len(data) > 1:
            from scipy.stats import kendalltau

            tau = kendalltau([point["x"] for point in data], [point["y"] for point in data]).statistic
            axes.set_title(f"{len(data)} rows, Kendall's tau {tau:.2f}")
        _label_ends(axes, [(point["x"], point["y"], point["row"], colour[point["row"]]) for point in data])
    return figure
