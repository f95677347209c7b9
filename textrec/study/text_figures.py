"""Figures of the text models' notebooks in the house style of `figures.py`, and what was expected of their runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from textrec.evaluation.metrics import mean_metrics
from textrec.evaluation.ranking import Counts, Ranks
from textrec.study.claims import PLUMBING
from textrec.study.figures import GREY, PALETTE, WIDTH, house_style
from textrec.study.records import Record, Run
from textrec.study.tables import paired_difference, ranks_at_hand, shared_seeds


def expectation_table(run: Run, expected: Mapping[str, tuple[float, float, float]]):
    """Return a frame with a verdict on each expectation {what should exceed zero: (value, low, high)}.

    It holds where the whole interval lies above zero; the smoke scale says nothing.
    """
    import pandas

    lines = []
    for what, (value, low, high) in expected.items():
        word = "holds" if low > 0 else "does not hold" if high < 0 else "undecided"
        lines.append([what, value, low, high, PLUMBING if run.scale == "smoke" else word])
    return pandas.DataFrame(lines, columns=["should exceed zero", "value", "low", "high", "verdict"])


def seed_differences(
    group: Sequence[Record], pairs: Iterable[Sequence[str]], metric: str = "ndcg@10", *,
    among: Callable[[Ranks], Ranks] = lambda ranks: ranks,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """Return {"a over b, n seeds": (value, low, high)}, paired over users and all seeds whose ranks are at hand.

    A pair of which no seed has both rows is left out; `among` picks the users that count, without any there is no pair.
    """
    found, ranks = {}, ranks_at_hand(group)
    for pair in pairs:
        sides = [list(map(among, side)) for side in zip(*shared_seeds(*map(ranks.get, pair)), strict=True)]
        if sides and all(len(ranks.users_U) for ranks in sides[0]):
            seeds = f"{len(sides[0])} seed{'s' * (len(sides[0]) > 1)}"
            found[f"{' over '.join(pair)}, {seeds}"] = paired_difference(*sides, metric)[:3]
    return found


def pretraining_data(curve: Sequence[Mapping], training, num_items: int, vocabulary_size: int) -> dict:
    """Return the curve of `pretrain`, its untrained and its kept entry, and what guessing reaches.

    `training` is the `PretrainingConfig`; `num_items` are the candidates of the zero-shot set.
    """
    rule = {"in_batch": "in_batch", "zero_shot": "ndcg@10", "last": "step"}[training.select_by]
    if not training.mlm_weight:  # nothing was asked of masked words
        curve = [{name: value for name, value in entry.items() if not name.endswith("mlm")} for entry in curve]
    validated = [entry for entry in curve if "in_batch" in entry]
    train, held_out = training.batch_size // training.accumulate, training.validation_batch
    guess = Counts(np.array([0]), np.array([num_items - 1]), np.array([num_items]))  # all tie
    words = float(2 * np.log(vocabulary_size))
    chance = {"train_in_batch": 1 / train, "in_batch": 1 / held_out, "train_contrast": float(np.log(train)),
              "validation_contrast": float(np.log(held_out)), "train_mlm": words, "validation_mlm": words,
              "ndcg@10": mean_metrics(guess, ks=(10,))["ndcg@10"]}  # fmt: skip
    return {"curve": list(curve), "untrained": validated[0], "kept": max(validated[1:], key=lambda e: e[rule]),
            "chance": chance, "batches": {"train": train, "held out": held_out}}  # fmt: skip


def plot_pretraining(data: Mapping):
    """Draw over the steps: accuracy and losses, trained and held out, their worth on the zero-shot set, the speed."""
    import matplotlib.pyplot as plt

    train, held_out = data["batches"].values()
    panels = [
        ("train_in_batch", "in_batch", f"in-batch accuracy (of {train} in training, {held_out} held out)"),
        (None, "ndcg@10", "zero-shot ndcg@10 (validation, seen items kept)"),
        ("train_contrast", "validation_contrast", f"contrast (nats; of {train}, {held_out})"),
        ("train_mlm", "validation_mlm", "masked words, sum of both views (nats)"),
        ("tokens_per_s", None, "real tokens per second"),
        ("peak_share", None, "share of the device's peak"),
    ]
    masked, peak = (any(entry.get(name) for entry in data["curve"]) for name in ("validation_mlm", "peak_share"))
    panels = [panel for panel in panels if masked or panel[1] != "validation_mlm"]
    layout = f"AB;{'CD' if masked else 'CC'};{'EF' if peak else 'EE'}"
    with house_style():
        figure, grid = plt.subplot_mosaic(layout, figsize=(WIDTH, 6.4), height_ratios=[1, 1, 0.7])
        for axes, (trained, watched, title) in zip(grid.values(), panels, strict=False):
            for key, colour, style in ((trained, PALETTE[4], "-"), (watched, PALETTE[0], "o-")):
                points = [(entry["step"], entry[key]) for entry in data["curve"] if entry.get(key) is not None]
                axes.plot(*zip(*points, strict=True) if points else ([], []), style, color=colour, markersize=3.5)
                if points and key in data["chance"]:
                    axes.axhline(data["chance"][key], color=colour, linewidth=1.2, linestyle=":")
            if watched in data["kept"]:
                axes.plot(data["kept"]["step"], data["kept"][watched], "o", color=PALETTE[1], markersize=6)
            if watched is None:
                axes.set_xlim(left=0)
                axes.set_ylim(0, 1.15 * axes.get_ylim()[1])
                axes.yaxis.set_major_formatter("{x:,.4g}")
            axes.set_title(title, fontsize=8.5)
            axes.set_xlabel("optimizer steps", fontsize=8.5)
        handles = [axes.plot([], [], style, color=colour)[0] for style, colour in
                   (("-", PALETTE[4]), ("o-", PALETTE[0]), ("o", PALETTE[1]), (":", GREY))]  # fmt: skip
        names = ("training", "not trained on", "the kept model", "guessing")
        figure.legend(handles, names, loc="outside upper center", ncols=4, fontsize=8.5)
    return figure
