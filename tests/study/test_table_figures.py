"""Gains are paired and by slice; matrices share one colour scale."""

from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from study.invented import ranks, record, row

from textrec.study import table_figures

matplotlib.use("Agg")
PAIR = ("sasrec_pretrained", "sasrec_random")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


@pytest.fixture
def results(monkeypatch):
    masks = {"rare_items": np.array([True, True, False, False]), "popular_items": np.array([False, False, True, True])}
    monkeypatch.setattr(table_figures, "slices", lambda ranks, prepared: masks)
    told = {"sasrec_pretrained": [0, 0, 50, 50], "sasrec_random": [50, 50, 0, 0], "sasrec_finetuned": None}
    return [SimpleNamespace(row=row, ranks=higher and ranks(higher)) for row, higher in told.items()]


def test_gains_are_paired_by_slice_and_missing_rows_have_none(results):
    pairs = [PAIR, ("sasrec_finetuned", "sasrec_random"), ("absent", "sasrec_random"), PAIR[::-1]]
    lines = table_figures.gain_data(results, pairs, None)
    assert [(line["row"], line["x"], line["value"]) for line in lines] == [
        (PAIR[0], "rare\n2 targets", 1.0), (PAIR[0], "popular\n2 targets", -1.0),
    ]  # fmt: skip
    assert all(line["low"] <= line["value"] <= line["high"] for line in lines)


def test_losses_are_drawn_below_zero(results):
    lines = table_figures.gain_data(results, [PAIR], None)
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


def test_a_row_differs_from_the_random_one_of_its_model_and_others_come_last():
    rows = ["popularity", "bert4rec_finetuned", "sasrec_random", "bert4rec_random", "sasrec_pretrained", "sasrec_ce"]
    higher = dict(zip(rows, ([9, 9], [0, 0], [0, 9], [50, 50], [50, 50], [0, 0]), strict=True))
    told = record([row(name, 0.1, changed="reference" if "random" in name else "other") for name in rows])
    frame = table_figures.paired_tables(told, {name: [ranks(given)] for name, given in higher.items()})
    order = ["sasrec_random", "sasrec_pretrained", "bert4rec_finetuned", "bert4rec_random", "popularity", "sasrec_ce"]
    assert frame["row"].tolist() == order
    differences = frame.set_index("row")["difference"]
    assert differences["bert4rec_finetuned"] == pytest.approx(1.0)  # of bert4rec_random, which finds nothing
    assert differences["sasrec_pretrained"] < -0.4 and differences["sasrec_ce"] > 0.2
    assert differences[["sasrec_random", "bert4rec_random"]].isna().all()


def test_the_spread_of_a_table_is_its_cosine_and_its_number_of_directions():
    rows = torch.nn.functional.pad(torch.cat([torch.eye(3), -torch.eye(3)]), (0, 2, 1, 0))
    moved = torch.nn.functional.normalize(rows + torch.tensor([0.0, 0, 0, 3, 0]), dim=1)
    moved[0] = 0
    told = table_figures.spread_table({"cross": rows, "narrow": moved})
    assert told.loc["cross"].tolist() == pytest.approx([5, 0, 3])  # three axes, none preferred
    assert told.loc["narrow", "mean cosine"] == pytest.approx(0.9) and told.loc["narrow", "directions"] > 2.9
