"""Pretraining curves carry what guessing reaches and the step that was kept; smoke judges nothing."""

import types

import matplotlib
import numpy as np
import pytest
from study.invented import ranks, record, row

from textrec.study import figures, text_figures
from textrec.study.records import Record
from textrec.training.pretraining import PretrainingConfig

matplotlib.use("Agg")
SETTINGS = {"batch_size": 32, "accumulate": 2, "validation_batch": 8, "max_steps": 20, "validate_every_steps": 10,
            "checkpoint_every_steps": 5}  # fmt: skip


def entry(step, **values):
    trained = {"train_in_batch": 0.2, "train_contrast": 2.0, "train_mlm": 9.0, "tokens_per_s": 100.0 + step}
    return {"step": step} | (trained if step else {}) | values


def validated(in_batch, ndcg):
    return {"in_batch": in_batch, "ndcg@10": ndcg, "validation_contrast": 1.9, "validation_mlm": 9.5}


CURVE = [entry(0, **validated(0.9, 0.9)), entry(5), entry(10, **validated(0.5, 0.02)), entry(15),
         entry(20, **validated(0.4, 0.03))]  # fmt: skip


@pytest.fixture(autouse=True)
def close_figures():
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def data(curve=CURVE, **changes):
    return text_figures.pretraining_data(curve, PretrainingConfig(**SETTINGS | changes), 100, 1000)


@pytest.mark.parametrize(("rule", "step"), [("in_batch", 10), ("zero_shot", 20), ("last", 20)])
def test_the_kept_entry_is_the_best_trained_one_by_the_rule_of_the_run(rule, step):
    found = data(select_by=rule)
    assert found["kept"]["step"] == step and found["untrained"]["step"] == 0
    assert found["batches"] == {"train": 16, "held out": 8}


def test_guessing_is_known():
    chance = data()["chance"]
    assert chance["in_batch"] == 1 / 8 and chance["validation_contrast"] == pytest.approx(np.log(8))
    assert chance["ndcg@10"] == pytest.approx((1 / np.log2(np.arange(2, 12))).sum() / 100)  # each rank alike
    assert chance["train_contrast"] == pytest.approx(np.log(16)) and chance["train_in_batch"] == 1 / 16
    assert chance["train_mlm"] == chance["validation_mlm"] == pytest.approx(np.log(1000) * 2)


def test_each_panel_shows_its_curves_chance_and_the_kept_step_and_unknown_peaks_none():
    figure = text_figures.plot_pretraining(data())
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    training, guessing_16, watched, guessing_8, kept = panels["in-batch accuracy (of 16 in training, 8 held out)"].lines
    assert list(training.get_xdata()) == [5, 10, 15, 20] and list(watched.get_ydata()) == [0.9, 0.5, 0.4]
    assert set(guessing_16.get_ydata()) == {1 / 16} and set(guessing_8.get_ydata()) == {1 / 8}
    assert list(kept.get_xdata()) == [10] and list(kept.get_ydata()) == [0.5]
    assert len(figure.axes) == 5 and "share of the device's peak" not in panels
    peaks = [line | {"peak_share": 0.3} if line["step"] else line for line in CURVE]
    (shown,) = [
        axes for axes in text_figures.plot_pretraining(data(peaks)).axes if "peak" in axes.get_title(loc="left")
    ]
    assert list(shown.lines[0].get_ydata()) == [0.3] * 4


def test_masked_words_that_were_not_asked_for_have_no_panel():
    titles = [[axes.get_title(loc="left") for axes in text_figures.plot_pretraining(data(**changes)).axes]
              for changes in ({}, {"mlm_weight": 0.0})]  # fmt: skip
    assert [title for title in titles[0] if not title.startswith("masked words")] == titles[1] != titles[0]


def test_a_figure_without_a_zero_shot_set_is_drawn_and_saved(tmp_path):
    blind = [{key: value for key, value in line.items() if key != "ndcg@10"} for line in CURVE]
    run = types.SimpleNamespace(scale="laptop", label="02-mini", seed=0, state=("0123456789", False))
    found = data(blind)
    path = figures.save_figure(text_figures.plot_pretraining(found), run, "pretraining", found, folder=tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_an_expectation_holds_where_its_interval_lies_above_zero_and_smoke_says_nothing():
    expected = {"a": (0.2, 0.1, 0.3), "b": (0.0, -0.1, 0.1), "c": (-0.2, -0.3, -0.1)}
    table = text_figures.expectation_table(types.SimpleNamespace(scale="laptop"), expected)
    assert list(table["verdict"]) == ["holds", "undecided", "does not hold"] and list(table["low"]) == [0.1, -0.1, -0.3]
    smoke = text_figures.expectation_table(types.SimpleNamespace(scale="smoke"), expected)
    assert set(smoke["verdict"]) == {"plumbing only"}


def test_pairs_are_compared_over_the_seeds_whose_ranks_are_at_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(Record, "folder", property(lambda self: tmp_path / str(self.seed)))
    above = {("a", 0): [0] * 40, ("b", 0): [4] * 40, ("a", 1): [0] * 40, ("b", 1): [1] * 40, ("a", 2): [0] * 40}
    for (name, seed), higher in above.items():
        (tmp_path / str(seed) / "rows" / name).mkdir(parents=True)
        ranks(higher).save(tmp_path / str(seed) / "rows" / name / "ranks.parquet")
    group = [record([row(name, 0.1) for name in "ab"], seed=seed) for seed in range(3)]
    found = text_figures.seed_differences(group, [("a", "b"), ("b", "a"), ("a", "c")])
    gain = 1 - (1 / np.log2(6) + 1 / np.log2(3)) / 2
    assert found["a over b, 2 seeds"][0] == pytest.approx(gain) == -found["b over a, 2 seeds"][0]
    assert len(found) == 2 and found["a over b, 2 seeds"][1] > 0
    few, nobody = (lambda of: of.subset(of.users_U < 5)), (lambda of: of.subset(of.users_U < 0))
    assert [*text_figures.seed_differences(group, [("a", "b")], among=few)] == ["a over b, 2 seeds"]
    assert text_figures.seed_differences(group, [("a", "b")], among=nobody) == {}
    (alone,) = text_figures.seed_differences(group[:1], [("a", "b")]).items()
    assert alone[0] == "a over b, 1 seed" and alone[1][0] == pytest.approx(1 - 1 / np.log2(6))
