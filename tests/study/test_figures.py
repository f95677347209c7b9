"""A figure carries its data and where it comes from; plot data come from records; what is drawn is what was given."""

import json
import types

import matplotlib
import numpy as np
import pandas
import pytest
from study.invented import failed, record, row

from textrec.study import figures

matplotlib.use("Agg")
RUN = types.SimpleNamespace(scale="laptop", label="01-ml-1m-w1", seed=2, state=("0123456789abcdef", False))
SCATTER = [{"row": "sasrec_ce", "x": 0.1, "y": 0.2}, {"row": "popularity", "x": 0.05, "y": 0.01}]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def draw(data=SCATTER):
    return figures.plot_scatter(data, xlabel="full", ylabel="sampled")


def labels_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_figure_is_saved_with_its_data_and_provenance(tmp_path):
    path = figures.save_figure(draw(), RUN, "protocols", SCATTER, fingerprint="fedcba", folder=tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"01-ml-1m-w1_protocols.{suffix}" for suffix in ("json", "png", "svg")
    ]
    assert path.read_bytes().startswith(b"\x89PNG")
    told = json.loads(path.with_suffix(".json").read_text())
    assert told == {"scale": "laptop", "run": "01-ml-1m-w1", "seeds": [2], "commit": "0123456789abcdef", "dirty": False,
                    "fingerprint": "fedcba", "data": SCATTER}  # fmt: skip


def test_equal_data_give_equal_bytes(tmp_path):
    for folder in ("first", "second"):
        figures.save_figure(draw(), RUN, "protocols", SCATTER, folder=tmp_path / folder)
    for suffix in ("png", "svg", "json"):
        first, second = (tmp_path / folder / f"01-ml-1m-w1_protocols.{suffix}" for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), suffix


def test_the_footer_names_scale_seeds_commit_and_changes_and_is_there_once(tmp_path):
    figure = draw()
    smoke = types.SimpleNamespace(scale="smoke", label="01", seed=0, state=("0123456789", True))
    for _ in range(2):
        figures.save_figure(figure, smoke, "x", [], seeds=range(3), folder=tmp_path)
    (footer,) = [text.get_text() for text in figure.texts]
    assert footer.startswith("scale smoke · run 01 · seeds 0, 1, 2 · commit 0123456 + changes")
    assert "plumbing only" in footer


def test_plotted_data_of_every_kind_become_json():
    frame = pandas.DataFrame({"a": [1, 2], "b": [0.5, np.nan]})
    data = {"frame": frame, "array": np.arange(2), 3: (np.float32(0.5), float("inf")), "r": range(2)}
    assert figures.plain(data) == {
        "frame": [{"a": 1, "b": 0.5}, {"a": 2, "b": None}], "array": [0, 1], "3": [0.5, None], "r": [0, 1],
    }  # fmt: skip


# ---- data from records -----------------------------------------------------------------------------------------------

GROUP = [record([row("sasrec_ce", 0.18 + seed / 100), row("bert4rec", 0.15), failed("esasrec")], seed=seed)
         for seed in range(3)]  # fmt: skip


def test_ladder_has_our_rows_over_seeds_and_published_levels_of_the_same_set_and_protocol():
    data = figures.ladder_data(GROUP)
    ours = {line["row"]: line for line in data["rows"]}
    assert ours["sasrec_ce"]["value"] == pytest.approx(0.19) and ours["sasrec_ce"]["seeds"] == 3
    assert "value" not in ours["esasrec"] and "nan at step 900" in ours["esasrec"]["status"]
    published = {(marker["row"], marker["value"]): marker["judged"] for marker in data["published"]}
    assert published["sasrec_ce", 0.1821] and not published["bert4rec", 0.0546]
    assert not any(value in (0.5905, 0.0531, 0.175) for _, value in published)  # sampled, another set, a gate
    assert {row for row, _ in published} == {"sasrec_ce", "bert4rec"}


def test_another_tie_rule_is_another_test_set_and_smoke_shows_nothing_published():
    other = record([row("sasrec_ce", 0.18)], protocol=GROUP[0].protocol | {"time_tie_rule": "stable"})
    assert figures.ladder_data([other])["published"] == []
    assert figures.ladder_data([record([row("sasrec_ce", 0.18)], scale="smoke")])["published"] == []


def test_levels_of_another_preparation_are_named_and_judge_nothing():
    rebuilt = record([row("sasrec_ce", 0.18)], dataset={"name": "ml-1m-w3", "fingerprint": "f" * 16},
                     protocol=GROUP[0].protocol | {"time_tie_rule": "stable"})  # fmt: skip
    assert figures.ladder_data([rebuilt], preparations=["ml-1m-w3"])["published"] == []
    data = figures.ladder_data([rebuilt], preparations=["ml-1m-w1", "ml-1m-w3"])
    assert {(marker["preparation"], marker["judged"]) for marker in data["published"]} == {("ml-1m-w1", False)}
    assert 0.1821 in [marker["value"] for marker in data["published"]]
    legend = [text.get_text() for text in figures.plot_ladder(data).legends[0].get_texts()]
    assert legend == ["ours, 95 % interval", "published on ml-1m-w1"]


def test_protocols_and_cost_come_from_slices_and_cost():
    (ce, bert) = figures.protocol_data(GROUP)
    assert (ce["row"], ce["x"], ce["y"]) == ("sasrec_ce", pytest.approx(0.19), pytest.approx(0.095))
    assert bert["y"] == pytest.approx(0.075)
    assert [point["x"] for point in figures.cost_data(GROUP)] == [10.0, 10.0]  # of one seed, not of all


def test_curves_add_up_their_minutes_and_lengths_are_percentiles():
    result = types.SimpleNamespace(row="a", curve=[{"epoch": e, "seconds": 90.0, "ndcg@10": 0.1 * e} for e in (1, 2)])
    assert [line["minutes"] for line in figures.curve_data([result])] == [1.5, 3.0]
    percentiles = figures.length_data({"set": np.arange(1, 101)})["set"]
    assert (percentiles[50], percentiles[100], len(percentiles)) == (50, 100, 101)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def test_ladder_draws_each_estimate_and_names_the_failure():
    figure = figures.plot_ladder(figures.ladder_data(GROUP))
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["sasrec_ce", "bert4rec", "esasrec"]
    points = [x for line in axes.lines if line.get_marker() == "o" for x in line.get_xdata()]
    assert points == pytest.approx([0.19, 0.15])
    assert labels_of(figure) == ["RuntimeError: the loss is nan at step 900"]


def test_curves_are_named_at_their_ends_apart_from_each_other_and_the_best_epoch_is_marked():
    curves = {"a": [0.1, 0.2, 0.15], "b": [0.1, 0.2001, 0.15]}
    data = [{"row": name, "epoch": epoch, "ndcg@10": value}
            for name, values in curves.items() for epoch, value in enumerate(values, 1)]  # fmt: skip
    figure = figures.plot_validation_curves(data)
    (axes,) = figure.axes
    best = [float(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    assert best == [2, 2] and sorted(labels_of(figure)) == ["a", "b"]
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert heights[1] - heights[0] >= 0.05 * np.ptp(axes.get_ylim())


def test_bars_show_shares_as_percentages():
    bars = [{"label": "hash", "group": "ml", "value": 0.25, "low": 0.24, "high": 0.26}, {"label": "id", "value": 0.3}]
    figure = figures.plot_bars(bars, xlabel="targets that change", percent=True)
    assert [patch.get_width() for patch in figure.axes[0].patches][:2] == [25, 30]
    assert labels_of(figure) == ["25.0 %", "30.0 %"]


def test_scatter_names_every_point_once_and_states_the_agreement_of_the_orders():
    figure = draw([{"row": name, "x": x, "y": y} for name, x, y in (("a", 1, 2), ("b", 2, 1), ("c", 3, 3))])
    assert sorted(labels_of(figure)) == ["a", "b", "c"]
    assert "tau 0.33" in figure.axes[0].get_title(loc="left")  # two of three pairs agree: (2 - 1) / 3


def test_crowded_names_stay_beside_the_axes_and_move_no_further_than_they_must():
    figure = draw([{"row": str(n), "x": n, "y": y} for n, y in enumerate((0.0, 0.96, 0.97, 0.98, 0.99, 1.0))])
    (axes,) = figure.axes
    height = {text.get_text(): text.xyann[1] for text in axes.texts}
    (bottom, top), apart = axes.get_ylim(), np.diff(sorted(height.values()))
    assert height["0"] == pytest.approx(0.0) and apart.min() >= 0.0549 * (top - bottom)
    assert bottom <= min(height.values()) and max(height.values()) <= top
    assert np.mean([height[str(n)] for n in range(1, 6)]) == pytest.approx(0.98, abs=0.01)


def test_lengths_and_empty_data_are_drawn():
    figures.plot_history_lengths({"set": list(range(1, 102))})
    figures.plot_validation_curves([])
    figures.plot_ladder({"dataset": "none", "metric": "ndcg@10", "rows": [], "published": []})
    figures.plot_bars([], xlabel="nothing")
    figures.plot_scatter([], xlabel="x", ylabel="y", diagonal=True)


def test_controls_are_grey_and_models_differ():
    colour = figures.colours(["popularity", "sasrec_ce", "gru4rec"])
    assert colour["popularity"] == figures.GREY and colour["sasrec_ce"] != colour["gru4rec"]


def test_bars_below_zero_are_seen():
    bars = [{"label": "a", "value": 0.1}, {"label": "b", "value": 0.0, "low": -0.2, "high": 0.2}]
    (axes,) = figures.plot_bars(bars, xlabel="difference").axes
    assert axes.get_xlim()[0] < -0.2
    (axes,) = figures.plot_bars(bars[:1], xlabel="value").axes
    assert axes.get_xlim()[0] == 0
