"""Means, intervals, verdicts and failures as the records give them; nothing from the smoke scale gets out."""

import dataclasses
import math

import numpy as np
import pandas
import pytest
from study.invented import estimate, failed, ranks, record, row

from textrec.schema import InputError
from textrec.study import tables
from textrec.study.claims import Claim


def test_one_seed_keeps_its_interval_and_two_state_no_spread():
    assert tables.combine([estimate(0.2)]) == pytest.approx({"value": 0.2, "low": 0.19, "high": 0.21})
    assert tables.combine([estimate(0.2, 0.01), estimate(0.3, 0.03)]) == pytest.approx(
        {"value": 0.25, "low": 0.23, "high": 0.27}
    )


def test_three_seeds_join_the_spread_over_seeds_to_the_interval_over_users():
    # mean 0.2, sd 0.01, t(0.975; 2) = 4.3027; half = sqrt(0.02² + (4.3027 * 0.01 / sqrt 3)²)
    half = math.hypot(0.02, 4.302653 * 0.01 / math.sqrt(3))
    combined = tables.combine([estimate(value, 0.02) for value in (0.19, 0.20, 0.21)])
    assert combined == pytest.approx({"value": 0.2, "low": 0.2 - half, "high": 0.2 + half, "sd": 0.01})


def test_exact_counts_stay_exact_over_seeds():
    assert tables.combine([estimate(6040, 0)] * 3) == {"value": 6040, "low": 6040, "high": 6040, "sd": 0}


def test_rows_are_merged_over_seeds_and_a_row_that_failed_is_a_row():
    group = [record([row("sasrec_ce", 0.18), failed("esasrec"), row("gru4rec", 0.16)], seed=0),
             record([row("sasrec_ce", 0.20), failed("esasrec"), failed("gru4rec")], seed=1)]  # fmt: skip
    merged = {r["row"]: r for r in tables.merged_rows(group)}
    assert merged["sasrec_ce"]["metrics"]["ndcg@10"]["value"] == pytest.approx(0.19)
    assert merged["sasrec_ce"]["seeds"] == (0, 1) and merged["sasrec_ce"]["cost"]["wall_s"] == 20
    assert merged["sasrec_ce"]["cost"]["peak_rss_gib"] == 1.5 and "energy_wh" not in merged["sasrec_ce"]["cost"]
    assert (merged["esasrec"]["status"], merged["esasrec"]["seeds"]) == ("failed", ())
    assert "nan at step 900" in merged["esasrec"]["reason"]
    assert (merged["gru4rec"]["status"], merged["gru4rec"]["seeds"]) == ("ok", (0,))
    assert "nan at step 900" in tables.results_table(group).set_index("row").loc["esasrec", "status"]


def test_seeds_tested_on_different_things_are_not_averaged():
    other = record([row("sasrec_ce", 0.2)], seed=1, dataset={"name": "ml-1m-w1", "fingerprint": "other"})
    with pytest.raises(InputError, match="01-ml-1m-w1: seeds 0 and 1 differ in their dataset"):
        tables.group_records([record([row("sasrec_ce", 0.2)]), other])


CLAIMS = {
    claim.id: claim
    for claim in (
        Claim(id="level", paper="P", where="t", system="A", dataset="ml-1m-w1", protocol={"ranking": "full"},
              metric="ndcg@10", value=0.19, row="sasrec_ce"),
        Claim(id="order", paper="P", where="t", system="A over B", dataset="ml-1m-w1", protocol={}, metric="ndcg@10",
              value=0.05, kind="ordering", row="sasrec_ce", over="sasrec_bce"),
        Claim(id="elsewhere", paper="P", where="t", system="A", dataset="ml-20m", protocol={}, metric="ndcg@10",
              value=0.19, row="sasrec_ce"),
        Claim(id="marker", paper="P", where="t", system="A", dataset="ml-1m-w1", protocol={}, metric="ndcg@10",
              value=0.1),
    )
}  # fmt: skip


def study(scale="laptop"):
    entry = {"id": "order", "published": 0.05, "measured": 0.04, "low": 0.03, "high": 0.05, "verdict": "any"}
    rows = [[row("sasrec_ce", 0.18 + seed / 100), row("sasrec_bce", 0.14)] for seed in (0, 1)]
    return [record(rows[seed], seed=seed, claims=[entry], scale=scale) for seed in (0, 1)]


def test_every_claim_is_judged_once_over_all_seeds():
    judged = {entry.verdict.claim.id: entry for entry in tables.judge_study(study(), "laptop", CLAIMS)}
    assert list(judged) == ["level", "order", "elsewhere"]  # a marker is not judged
    level = judged["level"]
    assert level.verdict.word == "reproduced" and level.verdict.measured == pytest.approx(0.185)
    assert level.seeds == (0, 1)
    assert level.command == "textrec run 01 --scale laptop --variant ml-1m-w1 --seeds 0 1"
    assert judged["order"].verdict.word == "ordering reproduced"
    assert str(judged["elsewhere"].verdict) == "not attempted (no record of notebook 01 on ml-20m)"


def test_an_ordering_counts_the_seeds_that_have_both_rows():
    first, second = study()
    second = record([row("sasrec_ce", 0.19)], seed=1, claims=[second.claims[0] | {"low": None}])
    judged = {entry.verdict.claim.id: entry for entry in tables.judge_study([first, second], "laptop", CLAIMS)}
    assert (judged["level"].seeds, judged["order"].seeds) == ((0, 1), (0,))


def test_an_ordering_without_a_paired_interval_is_not_judged():
    group = [record([row("sasrec_ce", 0.2), row("sasrec_bce", 0.1)])]
    judged = {entry.verdict.claim.id: entry.verdict for entry in tables.judge_study(group, "laptop", CLAIMS)}
    assert judged["order"].word == "not attempted"


def test_the_smoke_scale_says_plumbing_only_and_shows_no_number():
    frame = tables.verdict_table(tables.judge_study(study("smoke"), "smoke", CLAIMS))
    assert set(frame["verdict"]) == {"plumbing only"} and frame["ours"].isna().all()


def test_verdict_table_has_published_ours_gap_verdict_and_command():
    frame = tables.verdict_table(tables.judge_study(study(), "laptop", CLAIMS)).set_index("claim")
    line = frame.loc["level"]
    assert (line["published"], line["seeds"], line["verdict"]) == (0.19, 2, "reproduced")
    assert line["gap"] == pytest.approx(0.185 / 0.19 - 1) and line["command"].startswith("textrec run 01")
    assert frame.loc["order", "row"] == "sasrec_ce − sasrec_bce"


# ---- paired differences ----------------------------------------------------------------------------------------------

BETTER, WORSE = [0, 1, 0, 2, 0, 1] * 60, [3, 9, 30, 4, 2, 12] * 60


def test_paired_difference_is_the_mean_difference_of_the_metric_over_users():
    mean, low, high, p = tables.paired_difference([ranks(BETTER)], [ranks(WORSE)], "recall@10")
    assert mean == pytest.approx(2 / 6)  # by hand: two in six of the worse ranks stand below the tenth place
    assert low < mean < high and p < 0.001
    gain = sum(1 / math.log2(b + 2) for b in BETTER) - sum(1 / math.log2(w + 2) for w in WORSE if w < 10)
    gain /= len(BETTER)
    assert tables.paired_difference([ranks(BETTER)], [ranks(WORSE)], "ndcg@10")[0] == pytest.approx(gain)


def test_the_rule_for_the_candidates_may_turn_a_difference_round():
    first, second = (dataclasses.replace(ranks(a), kept=ranks(b).kept) for a, b in ((BETTER, WORSE), (WORSE, BETTER)))
    filtered, kept = (tables.paired_difference([first], [second], "ndcg@10", rule) for rule in tables.RULES[:2])
    assert kept[0] == pytest.approx(-filtered[0]) and filtered[0] > 0
    assert filtered == tables.paired_difference([first], [second], "ndcg@10")
    many = [[dataclasses.replace(each, filtered=dataclasses.replace(each.filtered, candidates_U=np.full(360, 9000)))]
            for each in (first, second)]  # fmt: skip
    sampled = tables.paired_difference(*many, "recall@10", tables.RULES[2])
    assert abs(sampled[0]) < 1e-6 < filtered[0]  # of a hundred drawn from 9,000 hardly any stands above either target
    with pytest.raises(KeyError, match="kept"):
        tables.paired_difference([first], [second], "ndcg@10", "kept")


def test_equal_rows_do_not_differ():
    mean, low, high, p = tables.paired_difference([ranks(BETTER)], [ranks(BETTER)], "ndcg@10")
    assert (mean, low, high, p) == (0, 0, 0, 1)


def test_rows_of_different_users_are_not_paired():
    with pytest.raises(InputError, match="different users or targets"):
        tables.paired_difference([ranks([1, 2])], [ranks([1, 2], users=[1, 0])], "ndcg@10")


def ablation(**options):
    group = [record([row("popularity", 0.01), row("sasrec_ce", 0.18, changed="reference: softmax"),
                     row("sasrec_bce", 0.13), failed("esasrec")])]  # fmt: skip
    return tables.ablation_table(group, **options).set_index("row")


def test_ablation_names_the_change_and_pairs_with_the_reference_row():
    at_hand = {"sasrec_ce": [ranks(BETTER)], "sasrec_bce": [ranks(WORSE)]}
    frame = ablation(ranks=at_hand)
    mean, low, high, p = tables.paired_difference(at_hand["sasrec_bce"], at_hand["sasrec_ce"], "ndcg@10")
    line = frame.loc["sasrec_bce"]
    assert (line["difference"], line["difference_low"], line["difference_high"]) == pytest.approx((mean, low, high))
    assert frame.loc["sasrec_bce", "p_holm"] == pytest.approx(p)  # one comparison: nothing to correct
    assert math.isnan(frame.loc["sasrec_ce", "difference"])
    assert frame.loc["popularity", "difference"] == pytest.approx(-0.17)  # no ranks at hand: the plain difference
    assert math.isnan(frame.loc["popularity", "p_holm"])
    assert "nan at step 900" in frame.loc["esasrec", "status"] and frame.loc["sasrec_bce", "changed"] == "loss: other"


def test_holm_corrects_over_the_table():
    at_hand = {"sasrec_ce": [ranks(BETTER)], "sasrec_bce": [ranks(WORSE)], "popularity": [ranks(WORSE)]}
    frame = ablation(ranks=at_hand)
    p = tables.paired_difference([ranks(WORSE)], [ranks(BETTER)], "ndcg@10")[3]
    assert frame.loc["sasrec_bce", "p_holm"] == pytest.approx(2 * p)


def test_rows_of_a_sample_are_compared_on_the_sample(tmp_path, monkeypatch):
    """A run that asks some users keeps the ranks of all beside them, for the rows that rank all."""
    monkeypatch.setattr(tables.Record, "folder", property(lambda self: tmp_path))
    asked = [3, 4, 8]
    for name, one in {"sasrec_ce": ranks([9] * 12), "listwise": ranks([0, 1, 2], users=asked)}.items():
        (tmp_path / "rows" / name).mkdir(parents=True)
        one.save(tmp_path / "rows" / name / "ranks.parquet")
    group = [record([row("sasrec_ce", 0.2), row("listwise", 0.3), failed("pointwise")])]
    found = tables.ranks_at_hand(group)
    assert [one[0].users_U.tolist() for one in found.values()] == [asked, asked]
    frame = tables.ablation_table(group, reference="sasrec_ce").set_index("row")
    gains = [1 / math.log2(higher + 2) - 1 / math.log2(11) for higher in (0, 1, 2)]
    assert frame.loc["listwise", "difference"] == pytest.approx(sum(gains) / 3)


def kept(tmp_path, monkeypatch, rows):
    """Two seeds of a run, whose rows have the ranks that are given by seed, or none."""
    monkeypatch.setattr(tables.Record, "folder", property(lambda self: tmp_path / str(self.seed)))
    for name, of_seeds in rows.items():
        for seed, one in enumerate(of_seeds):
            if one is not None:
                (tmp_path / str(seed) / "rows" / name).mkdir(parents=True)
                one.save(tmp_path / str(seed) / "rows" / name / "ranks.parquet")
    values = {"sasrec_ce": (0.2, 0.4), "sasrec_bce": (0.1, None)}
    return [
        record([row(name, of[seed]) if of[seed] else failed(name) for name, of in values.items()], seed=seed)
        for seed in (0, 1)
    ]


def test_a_row_of_one_seed_is_compared_on_that_seed(tmp_path, monkeypatch):
    rows = {"sasrec_ce": [ranks(BETTER), ranks(WORSE)], "sasrec_bce": [ranks(WORSE), None]}
    group = kept(tmp_path, monkeypatch, rows)
    found = tables.ranks_at_hand(group)
    assert [one is None for one in found["sasrec_bce"]] == [False, True]
    line = tables.ablation_table(group, reference="sasrec_ce").set_index("row").loc["sasrec_bce"]
    mean, low, high, _ = tables.paired_difference([ranks(WORSE)], [ranks(BETTER)], "ndcg@10")
    assert (line["difference"], line["difference_low"], line["difference_high"]) == pytest.approx((mean, low, high))
    without = tables.ablation_table(group, reference="sasrec_ce", ranks={}).set_index("row")
    assert pandas.isna(without.loc["sasrec_bce", "difference"])  # .1 of one seed is not set against .3 of two


def test_an_order_that_was_claimed_after_the_run_is_judged_from_the_ranks(tmp_path, monkeypatch):
    rows = {"sasrec_ce": [ranks(BETTER), None], "sasrec_bce": [ranks(WORSE), None]}
    group = kept(tmp_path, monkeypatch, rows)
    judged = {e.verdict.claim.id: e for e in tables.judge_study(group, "laptop", {"order": CLAIMS["order"]})}
    assert judged["order"].verdict.measured == pytest.approx(
        tables.paired_difference([ranks(BETTER)], [ranks(WORSE)], "ndcg@10")[0]
    )
    told = [{"id": "order", "measured": 0.5, "low": 0.4, "high": 0.6}]
    group[0] = dataclasses.replace(group[0], claims=told)  # what a record tells goes first
    (entry,) = tables.judge_study(group, "laptop", {"order": CLAIMS["order"]})
    assert entry.verdict.measured == 0.5


def test_an_unknown_reference_row_is_an_error():
    with pytest.raises(InputError, match="reference row sasrec_cf is none of popularity, sasrec_ce"):
        ablation(reference="sasrec_cf", ranks={})


# ---- written out -----------------------------------------------------------------------------------------------------


def test_exported_tables_read_back_and_the_smoke_scale_is_refused(tmp_path):
    frame = tables.results_table(study())
    csv, tex = tables.export_table(frame, tmp_path / "11_results", scale="laptop")
    assert pandas.read_csv(csv)["ndcg@10"].tolist() == pytest.approx(frame["ndcg@10"].tolist())
    assert "\\begin{tabular}" in tex.read_text() and "sasrec\\_ce" in tex.read_text()
    with pytest.raises(InputError, match="never reach a tracked table"):
        tables.export_table(frame, tmp_path / "11_smoke", scale="smoke")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["11_results.csv", "11_results.tex"]


def test_numbers_are_written_with_their_interval():
    assert tables.format_estimate(0.17901, 0.1725, 0.1853) == "0.1790 [0.1725, 0.1853]"
    assert tables.format_estimate(6040, 6040, 6040) == "6,040"
    assert tables.format_estimate(None) == "–" and tables.format_estimate(0.2) == "0.2000"
