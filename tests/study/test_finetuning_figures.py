"""Rows under both rules for seen items, published levels of the paper's own sets alone, lines over what was varied."""

import types

import matplotlib
import pytest
from study.invented import PROTOCOL, estimate, failed, ranks, record, row

from textrec.study import finetuning_figures as figures

matplotlib.use("Agg")
PAPER = "amazon-2018-Industrial_and_Scientific"
OWN = PROTOCOL | {"time_tie_rule": "stable"}
ROWS = [row("two_stage", 0.1), row("zero_shot", 0.09), failed("no_pretraining"), row("sasrec_ce", 0.08)]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def group(dataset=PAPER, **changes):
    return [record(ROWS, variant=dataset, notebook="03", **({"protocol": OWN} | changes))]


def drawn(figure, marker):
    return [x for line in figure.axes[0].lines if line.get_marker() == marker for x in line.get_xdata()]


def test_rows_carry_both_rules_and_the_published_levels_of_the_papers_own_set_alone():
    data = figures.row_data(
        group(), ["two_stage", "zero_shot", "no_pretraining"], lines=["sasrec_ce", "no_pretraining"]
    )
    two_stage, _, broken = data["rows"]
    assert (two_stage["value"], two_stage["kept"]) == (0.1, pytest.approx(0.05))
    assert "value" not in broken and "nan at step 900" in broken["status"]
    assert [line["row"] for line in data["lines"]] == ["sasrec_ce"]
    assert {(marker["row"], marker["value"]) for marker in data["published"]} >= {
        ("two_stage", 0.1027), ("zero_shot", 0.08946), ("no_pretraining", 0.0722),
    }  # fmt: skip
    for other in (group("amazon-2018-scientific"), group(scale="smoke"), group(protocol=PROTOCOL)):
        assert figures.row_data(other, ["two_stage", "zero_shot"])["published"] == []


def test_every_row_is_drawn_with_its_ring_its_diamonds_and_the_line_through_it():
    data = figures.row_data(group(), ["two_stage", "zero_shot", "no_pretraining"], lines=["sasrec_ce"])
    figure = figures.plot_rows(data)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["two_stage", "zero_shot", "no_pretraining"]
    assert drawn(figure, "o") == pytest.approx([0.1, 0.05, 0.09, 0.045])  # a row and its ring
    assert set(drawn(figure, "d")) >= {0.1027, 0.0722}
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["RuntimeError: the loss is nan at step 900", "sasrec_ce"]


def test_slices_are_lines_and_a_set_without_cold_targets_has_no_such_point():
    with_slices = [
        each | {"slices": {f"{name}_items": {"users": estimate(1200, 0), "ndcg@10": estimate(value)}
                           for name, value in (("rare", 0.02), ("popular", 0.3))}}
        for each in (row("two_stage", 0.1), row("sasrec_ce", 0.08))
    ]  # fmt: skip
    lines = figures.slice_data([record(with_slices)], ["two_stage", "absent", "sasrec_ce"])
    assert [(line["row"], line["x"]) for line in lines[:2]] == [
        ("two_stage", "rare\n1,200 targets"), ("two_stage", "popular\n1,200 targets"),
    ]  # fmt: skip
    assert lines[0]["low"] == pytest.approx(0.01) and len(lines) == 4
    (axes,) = figures.plot_lines([("seen", "ndcg@10", lines)]).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["rare\n1,200 targets", "popular\n1,200 targets"]
    assert axes.lines[0].get_xdata()[0] < 0 < axes.lines[1].get_xdata()[0], "rows stand beside each other"


def test_runs_are_lines_over_what_was_varied_and_rows_without_ranks_are_left_out():
    result = types.SimpleNamespace(row="zero_shot", ranks=ranks([0, 5, 50]), cost={"cpu_s": 2.0})
    none = types.SimpleNamespace(row="two_stage", ranks=None, cost={})
    lines = figures.run_lines({128: [result, none], 32: [result]})
    assert [(line["row"], line["x"]) for line in lines] == [("zero_shot", 32), ("zero_shot", 128)]
    assert lines[0]["low"] < lines[0]["value"] < lines[0]["high"]
    costs = figures.run_lines({32: [result]}, cost="cpu_s")
    assert costs == [{"row": "zero_shot", "x": 32, "value": 2.0}]
    quality, cost = figures.plot_lines([("tokens", "ndcg@10", lines), ("tokens", "CPU seconds", costs)]).axes
    assert quality.get_xscale() == "log" and list(quality.lines[0].get_xdata()) == [32, 128]
    assert list(cost.lines[0].get_ydata()) == [2.0]


def test_a_row_has_one_colour_in_every_panel():
    results = {1.0: [types.SimpleNamespace(row=name, ranks=ranks([0, 5]), cost={}) for name in ("a", "b")]}
    only_b = {0.5: results[1.0][1:]}
    both, single = figures.plot_lines(
        [("x", "y", figures.run_lines(results)), ("x", "y", figures.run_lines(only_b))]
    ).axes
    assert both.lines[1].get_color() == single.lines[0].get_color() != both.lines[0].get_color()
