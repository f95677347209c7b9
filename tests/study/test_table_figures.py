"""Gains are paired and by slice; gates are held under every rule; what rows cost; matrices share one colour scale."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from study.invented import failed, ranks, record, row
from training.text_sets import SMALL, brand_set

from textrec.models.recformer import RecFormer
from textrec.models.sequence_model import SequenceModel
from textrec.study import table_figures
from textrec.study.claims import load_claims
from textrec.study.tables import judge_study
from textrec.training.rows import RowResult
from textrec.training.table_rows import run_table_rows

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
    frame = table_figures.paired_tables([told], ranks={name: [ranks(given)] for name, given in higher.items()})
    order = ["sasrec_random", "sasrec_pretrained", "bert4rec_finetuned", "bert4rec_random", "popularity", "sasrec_ce"]
    assert frame["row"].tolist() == order
    differences = frame.set_index("row")["difference"]
    assert differences["bert4rec_finetuned"] == pytest.approx(1.0)  # of bert4rec_random, which finds nothing
    assert differences["sasrec_pretrained"] < -0.4 and differences["sasrec_ce"] > 0.2
    assert differences[["sasrec_random", "bert4rec_random"]].isna().all()


def test_a_row_on_rare_targets_whose_habits_no_random_row_has_differs_from_nothing():
    told = record([row(name, 0.1 + 0.1 * place, changed="reference" if "random" in name else "other")
                   for place, name in enumerate(("sasrec_random", "sasrec_finetuned_faithful",
                                                 "sasrec_finetuned_faithful_rare_targets"))])  # fmt: skip
    differences = table_figures.paired_tables([told], ranks={}).set_index("row")["difference"]
    assert differences["sasrec_finetuned_faithful"] == pytest.approx(0.1)
    assert np.isnan(differences["sasrec_finetuned_faithful_rare_targets"])  # .3 of other targets says nothing beside .1


def test_narrow_rows_are_paired_with_the_narrow_random_one_and_faithful_rows_with_none():
    pairs = {"sasrec_narrow_pca": "sasrec_narrow", "sasrec_narrow": "sasrec_narrow", "sasrec_ce": None,
             "bert4rec_finetuned": "bert4rec_random", "sasrec_finetuned_faithful": None}  # fmt: skip
    for row_name, other in pairs.items():
        assert table_figures._pair_of(row_name) == other
        assert table_figures._pair_of(row_name + "_rare_targets") == (other and other + "_rare_targets")


def test_the_spread_of_a_table_is_its_cosine_and_its_number_of_directions():
    rows = torch.nn.functional.pad(torch.cat([torch.eye(3), -torch.eye(3)]), (0, 2, 1, 0))
    moved = torch.nn.functional.normalize(rows + torch.tensor([0.0, 0, 0, 3, 0]), dim=1)
    moved[0] = 0
    told = table_figures.spread_table({"cross": rows, "narrow": moved})
    assert told.loc["cross"].tolist() == pytest.approx([5, 0, 3])  # three axes, none preferred
    assert told.loc["narrow", "mean cosine"] == pytest.approx(0.9) and told.loc["narrow", "directions"] > 2.9


# ---- pairs, rules, controls ------------------------------------------------------------------------------------------

SMOKE, LAPTOP = (SimpleNamespace(scale=scale) for scale in ("smoke", "laptop"))


def result(name, higher=None, curve=(), **parts):
    return RowResult(name, "changed", {}, "ok", None, ranks(higher) if higher else None, list(curve), **parts)


def test_rare_rows_hold_the_targets_that_training_saw_at_most_five_times(monkeypatch):
    monkeypatch.setattr(table_figures, "training_counts", lambda histories, split: np.array([0, 6, 5, 0, 1, 50]))
    results = [result("sasrec_random", [0, 1, 2, 3, 4]), result("sasrec_ce", [0] * 5), result("sasrec_pretrained")]
    given = SimpleNamespace(histories=None, split=None)
    (rare,) = table_figures.rare_results(results, given)
    assert (rare.row, rare.ranks.targets_U.tolist()) == ("sasrec_random_rare_targets", [2, 3, 4])
    assert rare.ranks.filtered.higher_U.tolist() == [1, 2, 3] and "at most 5 times" in rare.changed
    monkeypatch.setattr(table_figures, "training_counts", lambda histories, split: np.full(6, 6))
    assert table_figures.rare_results(results, given) == []


def test_rows_on_rare_targets_are_paired_with_each_other_and_have_their_interval_over_seeds():
    names = ("sasrec_random", "sasrec_pretrained", "sasrec_random_rare_targets", "sasrec_pretrained_rare_targets")
    told = record([row(name, 0.1, changed="reference" if name == "sasrec_random" else "other") for name in names])
    few = {name: [ranks(given, users)] for name, given, users in
           zip(names, ([0, 99], [99, 0], [99], [0]), ([0, 1], [0, 1], [1], [1]), strict=True)}  # fmt: skip
    frame = table_figures.paired_tables([told], ranks=few).set_index("row")
    assert frame.loc["sasrec_pretrained", "difference"] == 0 and list(frame.index) == list(names)
    assert frame.loc["sasrec_pretrained_rare_targets", "difference"] == pytest.approx(1.0)
    claim = next(c for c in load_claims().values() if c.row == names[3] and c.dataset == "amazon-2018-scientific")
    group = []
    for seed, (value, low) in enumerate([(0.02, 0.01), (0.04, 0.01), (0.03, -0.02)]):
        entry = {"id": claim.id, "measured": value, "low": low, "high": 2 * value - low}
        rows = [row(name, 0.1) for name in names]
        group.append(record(rows, seed=seed, notebook="07", variant=claim.dataset, claims=[entry]))
    judged = {each.verdict.claim.id: each for each in judge_study(group, "laptop")}[claim.id]
    assert judged.verdict.measured == pytest.approx(0.03) and judged.seeds == (0, 1, 2)
    assert judged.verdict.low < 0 < judged.verdict.high and judged.verdict.word == "not reproduced"
    two = {each.verdict.claim.id: each for each in judge_study(group[:2], "laptop")}[claim.id]
    assert two.verdict.word == "ordering reproduced"


def test_gates_are_held_under_every_rule_that_there_are_items_for():
    pair = ("sasrec_finetuned", "sasrec_random")
    higher = {pair[0]: [0] * 40, pair[1]: [50] * 40}
    kept = {row: [replace(ranks(given), kept=ranks(higher[other]).filtered)]
            for (row, given), other in zip(higher.items(), pair[::-1], strict=True)}  # fmt: skip
    frame = table_figures.gate_table(LAPTOP, [pair], kept)
    assert frame["rule"].tolist() == ["seen_filtered", "seen_kept"] and frame["value"].tolist() == [1.0, -1.0]
    assert frame["verdict"].tolist() == ["holds", "does not hold"]
    many = {row: [replace(each, filtered=replace(each.filtered, candidates_U=each.filtered.candidates_U * 10))]
            for row, (each,) in kept.items()}  # fmt: skip
    frame = table_figures.gate_table(LAPTOP, [pair], many).set_index("rule")
    assert 0 < frame.loc["sampled_uniform_100", "value"] < 1  # the fiftieth of a thousand is fifth of a hundred
    assert set(table_figures.gate_table(SMOKE, [pair], kept)["verdict"]) == {"plumbing only"}


CASES = [(0, "equal"), (1, "equal"), (40, "below"), (-40, "above"), (3, "undecided")]


@pytest.mark.parametrize(("lost", "word"), CASES)
def test_a_control_is_equal_to_random_only_if_its_whole_interval_lies_within_the_margin(lost, word):
    ahead, behind = ([50] * abs(lost) + [0] * (400 - abs(lost)), [0] * 400)
    order = (ahead, behind) if lost >= 0 else (behind, ahead)
    told = dict(zip(("bert4rec_embedder_permuted", "bert4rec_random"), order, strict=True))
    told |= {"bert4rec_embedder": [0] * 400, "sasrec_finetuned_permuted": [0] * 400}  # no control; no random row
    given = {row: [ranks(higher)] for row, higher in told.items()}
    frame = table_figures.control_table(LAPTOP, given, margin=0.01)
    assert list(frame.index) == ["bert4rec_embedder_permuted"]
    assert frame["verdict"].tolist() == [word] and frame["beyond random"].item() == pytest.approx(-lost / 400)
    assert set(table_figures.control_table(SMOKE, given)["verdict"]) == {"plumbing only"}


def test_levels_stand_beside_their_place_under_each_rule():
    first, second = row("sasrec_random", 0.2), row("sasrec_embedder", 0.1)
    second["slices"]["seen_kept"]["ndcg@10"]["value"] = 0.3
    frame = table_figures.rule_table(record([first, second, row("sasrec_random_rare_targets", 0.9), failed("gru4rec")]))
    assert frame["seen_filtered"].to_dict() == {"sasrec_random": 0.2, "sasrec_embedder": 0.1}
    assert frame["seen_filtered, place"].tolist() == [1, 2] and frame["seen_kept, place"].tolist() == [2, 1]


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    return brand_set(tmp_path / "brands", seed=0, num_users=24)


def test_a_table_that_starts_from_text_has_the_parameters_of_a_random_one_and_experts_have_not(prepared, tmp_path):
    rows = torch.randn(prepared.num_items, 8, generator=torch.Generator().manual_seed(0))
    tables = dict.fromkeys(("finetuned", "embedder"), torch.nn.functional.pad(rows, (0, 0, 1, 0)))
    rows = ["sasrec_random", "sasrec_finetuned", "sasrec_embedder_experts", "sasrec_finetuned_frozen"]
    brief = {"all": {"max_epochs": 1, "batch_size": 16, "max_sequence_length": 8}}
    results = run_table_rows(rows, prepared, tables, seed=0, run_dir=tmp_path, overrides=brief)
    frame = table_figures.efficiency_table([*results, result("sasrec_ce", [0])], tmp_path, prepared, rounds=3)
    assert list(frame.index) == rows
    random, own, experts, frozen = (frame.loc[row] for row in rows)
    assert (own["parameters"], own["trained"]) == (random["parameters"], random["trained"])
    assert experts["parameters"] > random["parameters"] == random["trained"]
    assert frozen["parameters"] - frozen["trained"] == tables["finetuned"].numel()
    assert random["beside random"] == 1 and (frame["seconds an epoch"] > 0).all()
    shutil.rmtree(tmp_path / "rows" / "sasrec_finetuned" / "model")  # its ranks and curve may travel alone
    left = table_figures.efficiency_table(results, tmp_path, prepared, rounds=1).loc["sasrec_finetuned"]
    assert left.isna().tolist() == [True, True, False, True, True, False, False, False]


def test_rows_take_turns_and_the_ratio_is_that_of_the_same_round(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(SequenceModel, "from_pretrained", lambda folder: torch.nn.Linear(1, 1))
    clock, seen = iter(np.cumsum([0, 9, 0, 9, 0, 1, 0, 2, 0, 10, 0, 20, 0, 3, 0, 6.0])), []
    monkeypatch.setattr("textrec.training.trainer.evaluate", lambda model, *given: seen.append(model))
    monkeypatch.setattr(table_figures.time, "process_time", lambda: next(clock))
    curve = [{"epoch": 0, "seconds": 2.0}, {"epoch": 1, "seconds": 4.0, "ndcg@10": 0.1}]
    results = [result(row, [0], curve) for row in ("sasrec_random", "sasrec_finetuned")]
    for each in results:
        (tmp_path / "rows" / each.row / "model").mkdir(parents=True)
    frame = table_figures.efficiency_table(results, tmp_path, prepared, rounds=3)
    assert frame["beside random"].tolist() == [1, 2] and frame["seconds an epoch"].tolist() == [3, 3]
    assert frame.filter(like="CPU s").iloc[:, 0].tolist() == [3, 6] and len(seen) == 8 and seen[0] is seen[2]


def test_a_start_that_saves_time_is_told_from_one_that_ends_higher(prepared, tmp_path):
    def curve(*values):
        return [{"epoch": epoch, "seconds": 1.0} | ({} if value is None else {"ndcg@10": value})
                for epoch, value in enumerate(values)]  # fmt: skip

    rows = {"sasrec_random": (0.1, None, 0.2, 0.3), "sasrec_finetuned": (0.3, 0.2), "sasrec_embedder": (0.1, 0.4, 0.4),
            "sasrec_pretrained": (0.1, 0.2), "sasrec_ce": (0.9,), "bert4rec_embedder": (0.5,)}  # fmt: skip
    results = [result(row, [0], curve(*values)) for row, values in rows.items()]
    frame = table_figures.efficiency_table(results, tmp_path, prepared, rounds=1).iloc[:, -3:]
    told = {row: line.tolist() for row, line in frame.iterrows()}
    assert told["sasrec_random"] == [0.3, 4, 4] and told["sasrec_finetuned"] == [0.3, 1, 1]
    assert told["sasrec_embedder"] == [0.4, 2, 2] and told["sasrec_pretrained"][:2] == [0.2, 2]
    assert np.isnan([told["sasrec_pretrained"][2], told["bert4rec_embedder"][2]]).all() and "sasrec_ce" not in told


# ---- attention -------------------------------------------------------------------------------------------------------


def test_heads_are_kept_beside_their_mean_and_the_first_layer_is_drawn_beside_the_last():
    encoders = {}
    for seed, name in enumerate(("language_model", "finetuned")):
        torch.manual_seed(seed)
        encoders[name] = RecFormer(SMALL).eval()
    tokens = torch.tensor([1, 5, 6, 7, 8])
    packed = (tokens, torch.tensor([0, 1, 2, 1, 2]), torch.tensor([0, 1, 1, 2, 2]), torch.tensor([5]))
    drawn = table_figures.attention_figures(encoders, packed)
    assert list(drawn) == ["attention", "items", "alignment"]
    heads = drawn["attention"][1]["heads"]["finetuned"]
    assert len(heads) == SMALL.num_layers * SMALL.num_heads and {"head", "layer", "entropy"} <= heads[0].keys()
    figure, maps = drawn["items"]
    titles = [f"{name}, {place} layer" for place in ("first", "last") for name in encoders]
    assert [panel["title"] for panel in maps] == titles == [axes.get_title(loc="left") for axes in figure.axes[:4]]
    assert maps[1]["rows"] != maps[3]["rows"]
    assert figure.axes[0].get_position().y0 > figure.axes[2].get_position().y1 - 0.2
    assert drawn["alignment"][1][0]["rows"][1][1] == pytest.approx(1.0)
