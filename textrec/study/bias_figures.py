"""Figures of HSTU: what its relative biases have learned, as curves over elapsed time and over distance."""

import math
from collections.abc import Mapping, Sequence

from textrec.models.hstu import BUCKET_WIDTH, HSTU
from textrec.study.figures import WIDTH, colours, house_style

MARKS = {1: "1 s", 60: "1 min", 3600: "1 h", 86_400: "1 day", 30 * 86_400: "30 d", 365 * 86_400: "1 y"}
LONGEST = 3 * 365 * 86_400  # seconds; the buckets beyond it were never trained on the sets that we have


def bias_data(model: HSTU) -> dict[str, list[dict]]:
    """Return curves {block, x, value}: `time` over elapsed seconds (where a bucket starts), `position` over distance.

    Distance 0 is the newest item itself. Each curve has its mean taken off: a level common to all keys says nothing of
    what the block prefers. A block without a bias has no curve.
    """
    curves = {"time": [], "position": []}
    for number, block in enumerate(model.blocks, start=1):
        if getattr(block, "buckets", None) is not None:
            seconds = [math.exp(BUCKET_WIDTH * bucket) for bucket in range(len(block.buckets))]
            kept = sum(each <= LONGEST for each in seconds)
            curves["time"] += _curve(number, seconds[:kept], block.buckets[:kept])
        if getattr(block, "distances", None) is not None:
            length = min(model.config.max_sequence_length, model.config.block_length)
            newest_first = block.distances[: model.config.block_length].flip(0)[:length]
            curves["position"] += _curve(number, range(length), newest_first)
    return curves


def _curve(block: int, x: Sequence[float], bias) -> list[dict]:
    centred = (bias - bias.mean()).tolist()
    return [{"block": block, "x": float(at), "value": value} for at, value in zip(x, centred, strict=True)]


def plot_biases(data: Mapping[str, Sequence[Mapping]]):
    """Draw what `bias_data` returned, time and position side by side; what the model lacks stays an empty panel."""
    import matplotlib.pyplot as plt

    with house_style():
        figure, panels = plt.subplots(1, 2, figsize=(WIDTH, 3.2))
        labels = {"time": "time since the item was consumed", "position": "items in between"}
        for axes, (name, label) in zip(panels, labels.items(), strict=True):
            blocks = list(dict.fromkeys(point["block"] for point in data[name]))
            for block, colour in colours(f"block {number}" for number in blocks).items():
                points = [point for point in data[name] if f"block {point['block']}" == block]
                axes.plot([p["x"] for p in points], [p["value"] for p in points], color=colour, label=block)
            axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            axes.set(xlabel=label, ylabel="bias, its mean taken off")
            if not blocks:
                axes.text(0.5, 0.5, "no such bias", ha="center", transform=axes.transAxes)
        if data["time"]:
            panels[0].set_xscale("log")
            panels[0].set_xticks(list(MARKS), list(MARKS.values()), fontsize=8)
            panels[0].xaxis.set_minor_locator(plt.NullLocator())
        handles, names = panels[0].get_legend_handles_labels()
        if not handles:
            handles, names = panels[1].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper left", ncols=4, fontsize=8)
    return figure
