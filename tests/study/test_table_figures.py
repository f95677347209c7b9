"""Gains are paired and by slice; matrices share one colour scale."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from study.invented import ranks

from textrec.study import table_figures

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def results(monkeypatch):
    masks = {"rare_items": np.array([True, True, False, False]), "popular_items": np.array([False, False, True, True])}
    monkeypatch.setattr(table_figures, "slices", lambda ranks, prepared: masks)
    told = {"given": [0, 0, 50, 50], "random": [50, 50, 0, 0], "broken": None}
    return [SimpleNamespace(row=row, ranks=higher and ranks(higher)) for row, higher in told.items()]


def test_gains_are_paired_by_slice_and_missing_rows_have_none(results):
    lines = table_figures.gain_data(results, [("given", "random"), ("broken", "random"), ("absent", "given")], None)
    assert [(line["row"], line["x"], line["value"]) for line in lines] == [
        ("given", "rare\n2 targets", 1.0), ("given", "popular\n2 targets", -1.0),
    ]  # fmt: skip
    assert all(line["low"] <= line["value"] <= line["high"] for line in lines)


def test_losses_are_drawn_below_zero(results):
    lines = table_figures.gain_data(results, [("given", "random")], None)
    (axes,) = table_figures.plot_gains([("seen in training", "gain", lines)]).axes
    low, high = axes.get_ylim()
    assert low < -1 < 1 < high
    assert list(axes.lines[0].get_ydata()) == [1.0, -1.0]


@pytest.mark.parametrize("log", [False, True])
def test_matrices_share_one_scale(log):
    panels = [{"title": "a", "rows": [[1.0, 0.5], [0.0, 0.25]]}, {"title": "b", "rows": [[0.1, 0.2], [0.3, 0.4]]}]
    figure = table_figures.plot_matrices(panels, xlabel="x", ylabel="y", log=log)
    first, second = figure.axes[:2]
    assert [axes.get_title(loc="left") for axes in (first, second)] == ["a", "b"]
    scales = [axes.images[0].norm for axes in (first, second)]
    assert {(scale.vmin, scale.vmax) for scale in scales} == {(0.1 if log else 0, 1.0)}
