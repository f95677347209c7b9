"""Rows under both rules for seen items, published levels of the paper's own sets alone, lines over what was varied."""

import types

import matplotlib
import numpy as np
import pytest
from study.invented import PROTOCOL, estimate, failed, ranks, record, row

from textrec.evaluation.metrics import per_user_metrics
from textrec.study import finetuning_figures as figures
from textrec.study.figures import plot_ladder

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
    figure = plot_ladder(data)
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


ARMS = {"full": ["nothing", "zero_shot", "two_stage"], "random": ["words", "random_words", ""],
        "frozen": ["training", "", "frozen_words"], "not run": ["words", "permuted_words", ""]}  # fmt: skip


def arm_ranks():
    chance = np.random.default_rng(0)
    places = {"zero_shot": 20, "random_words": 90, "two_stage": 12, "frozen_words": 15}
    return {row: [ranks(chance.integers(0, most, 400))] for row, most in places.items()}


def test_an_arm_is_the_ratio_of_means_over_the_same_users_with_a_paired_interval():
    found = arm_ranks()
    means = {row: per_user_metrics(each.filtered, ks=(10,))["ndcg@10"].mean() for row, (each,) in found.items()}
    before, after = figures.arm_data(ARMS, found)
    assert [row["row"] for row in before["rows"]] == ["full", "random"]
    assert [(row["row"], row["kind"]) for row in after["rows"]] == [("full", "nothing"), ("frozen", "training")]
    assert [before["rows"][0][part] for part in ("value", "low", "high")] == [1.0, 1.0, 1.0]  # paired with itself
    random = before["rows"][1]
    assert random["value"] == pytest.approx(means["random_words"] / means["zero_shot"])
    assert random["low"] < random["value"] < random["high"] < 1.0
    nobody = [ranks(np.full(400, 50))]
    assert np.isnan(figures.paired_ratio(found["zero_shot"], nobody)["value"])
    (unseen,), (tuned,) = found["zero_shot"], found["two_stage"]  # a second seed that one side lacks does not count
    assert figures.paired_ratio([unseen, None], [tuned, unseen]) == figures.paired_ratio([unseen], [tuned])
    assert np.isnan(figures.paired_ratio([None], [None])["value"])


def test_arms_stand_in_one_order_in_all_panels_beside_a_line_at_the_first():
    panels = figures.arm_data(ARMS, arm_ranks())
    panels.append({"title": "size", "xlabel": "parameters", "log": True,
                   "rows": [{"row": "frozen", "kind": "training", "value": 10.0}]})  # fmt: skip
    figure = figures.plot_arms(panels, legend="taken away")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["full", "random", "frozen"]
    places = [[tuple(float(x) for x in line.get_xydata()[0]) for line in axes.lines if line.get_marker() == "o"]
              for axes in figure.axes]  # fmt: skip
    assert [[y for _, y in points] for points in places] == [[0.0, -1.0], [0.0, -2.0], [-2.0]]
    lines = [line.get_xdata()[0] for axes in figure.axes for line in axes.lines if line.get_linestyle() == "--"]
    assert lines == [1.0, 1.0, 10.0] and figure.axes[2].get_xscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nothing", "words", "training"]
