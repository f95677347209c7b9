"""The ledger is complete and consistent; the judge says what its words mean, and refuses what may not be compared."""

import copy
import dataclasses
import math
import re

import pytest
import yaml

from textrec.schema import InputError
from textrec.study import claims as ledger
from textrec.study.claims import NOT_REPRODUCED, ORDERING, Claim, judge, judge_rows, load_claims, mismatch
from textrec.study.tables import IN_WORDS, Judged, verdict_table

OURS = {"split": "leave_one_out", "validation": "all", "ranking": "full", "seen": "filtered", "ties": "expected",
        "time_tie_rule": "given"}  # fmt: skip
LEVEL = Claim(id="paper/model/ndcg@10", paper="Paper", where="table 1", system="Model", dataset="set",
              protocol={"split": "leave_one_out", "ranking": "full"}, metric="ndcg@10", value=0.2,
              row="model")  # fmt: skip


def judged(claim, value, low=None, high=None, **changes):
    return judge(claim, value, low, high, **({"protocol": OURS, "dataset": "set", "scale": "laptop"} | changes))


def with_(**changes):
    return dataclasses.replace(LEVEL, **changes)


# ---- the ledger ------------------------------------------------------------------------------------------------------


def test_every_claim_has_its_place_and_no_number_is_from_memory():
    claims = load_claims()
    assert len(claims) > 300
    for name, claim in claims.items():
        assert name == claim.id and claim.where and claim.paper and claim.source in ("D", "C", "I", "R", "P")
    assert not re.search(r"\[MEM?\]", ledger.LEDGER.read_text(encoding="utf-8"))


def test_a_row_has_one_judging_claim_per_metric_and_protocol_beside_the_gates():
    judging = [(c.row, c.over, c.metric, c.dataset, c.kind, tuple(c.protocol.items()))
               for c in load_claims().values() if c.row and c.source != "P"]  # fmt: skip
    assert len(judging) == len(set(judging))


@pytest.mark.parametrize(
    ("claim_id", "dataset", "value", "row"),
    [
        ("dross/sasrec/ndcg@10", "ml-1m-w1", 0.1341, "sasrec_bce"),
        ("dross/sasrec-plus/recall@10", "ml-1m-w1", 0.3152, "sasrec_ce"),
        ("gsasrec-pytorch/gsasrec/ndcg@10", "ml-1m-w1", 0.1726, "gsasrec"),
        ("esasrec-ml1m/sasrec-plus-ss/ndcg@10", "ml-1m-w3", 0.1684, "sasrec_ss"),
        ("esasrec-beauty/sasrec-plus-ss/ndcg@10", "amazon-2014-beauty-p5", 0.0531, "sasrec_ss"),
        ("rectools-hstu/hstu-large/ndcg@200", "ml-1m-w3", 0.3015, "hstu_large"),
        ("esasrec-fuxi-ml1m/fuxi-alpha/ndcg@10", "ml-1m-w3", 0.1813, "fuxi"),
        ("ml-1m-txt/statistics/interactions", "ml-1m-w1", 999611, "statistics"),
        ("arts-5-core/statistics/items", "amazon-2018-Arts_Crafts_and_Sewing", 22855, "statistics"),
        ("recformer-paper-scientific/recformer/ndcg@10", "amazon-2018-Industrial_and_Scientific", 0.1027, "two_stage"),
        ("recformer-scientific/recformer-over-sasrec/ndcg@10", "amazon-2018-scientific", 0.023, "two_stage"),
        ("gate-ml1m/sasrec-ce/recall@10", "ml-1m-w1", 0.305, "sasrec_ce"),
        ("gate-beauty/sasrec-ss/ndcg@10", "amazon-2014-beauty-p5", 0.050, "sasrec_ss"),
    ],
)
def test_claims_that_decide_the_study(claim_id, dataset, value, row):
    claim = load_claims()[claim_id]
    assert (claim.dataset, claim.value, claim.row) == (dataset, value, row)


def test_gate_of_the_single_negative_row_is_a_band_of_015():
    gate = load_claims()["gate-ml1m-bce/sasrec-bce/ndcg@10"]
    assert gate.tolerance * gate.value == pytest.approx(0.015, abs=1e-5)


def test_orderings_and_ratios_are_computed_from_their_systems():
    ordering = load_claims()["gsasrec-pytorch/gsasrec-over-sasrec-bce/ndcg@10"]
    assert (ordering.value, ordering.row, ordering.over) == (pytest.approx(0.1726 - 0.1259), "gsasrec", "sasrec_bce")
    assert load_claims()["dross/sasrec-plus-per-sasrec/ndcg@10"].value == pytest.approx(0.1821 / 0.1341, abs=1e-6)


def test_recformers_levels_are_of_its_own_preparation_and_elsewhere_only_orders_are_held():
    claims = [claim for claim in load_claims().values() if claim.id.startswith("recformer-")]
    for claim in claims:
        assert (claim.kind == "ordering") != claim.id.startswith("recformer-paper-")
        assert claim.row is None or claim.kind == "level" or claim.over
    orders = [claim for claim in claims if claim.over]
    assert len(orders) > 5 and not any(mismatch(claim, OURS, claim.dataset) for claim in orders)
    for claim in (claim for claim in claims if claim.kind == "level"):  # no marker of a table that filters seen items
        assert "seen: published under kept" in mismatch(claim, OURS, claim.dataset)


GROUP = {"id": "g", "paper": "P", "where": "table", "dataset": "set", "systems": {"A": {"values": [0.1]}}}
DEFAULTS = {"source": "D", "notebook": "01", "kind": "level", "metrics": ["ndcg@10"], "tolerance": 0.05}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wher": "x"}, r"unknown key `wher` \(did you mean 'where'"),
        ({"where": ""}, "has no `where`"),
        ({"source": "M"}, "source 'M' is none of"),
        ({"kind": "levle"}, "kind 'levle'"),
        ({"protocol": {"sen": "kept"}}, r"no protocol field `sen` \(did you mean 'seen'"),
        ({"systems": {"A": {"values": [0.1, 0.2]}}}, "2 values for 1 metrics"),
        ({"systems": {"A": {"values": ["0.1"]}}}, "value is '0.1'"),
        ({"systems": {"A": {"valuse": [0.1]}}}, "unknown key `valuse`"),
    ],
)
def test_a_broken_group_is_refused_in_one_sentence(tmp_path, change, message):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"defaults": DEFAULTS, "groups": [copy.deepcopy(GROUP) | change]}))
    with pytest.raises(InputError, match=message):
        load_claims(path)


def test_a_claim_that_occurs_twice_is_refused(tmp_path):
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump({"defaults": DEFAULTS, "groups": [GROUP, GROUP]}))
    with pytest.raises(InputError, match="g/a/ndcg@10 occurs twice"):
        load_claims(path)


# ---- the judge: published 0.2 within 5 %, so the band is [0.19, 0.21] ------------------------------


@pytest.mark.parametrize(
    ("value", "low", "high", "word", "reason"),
    [
        (0.20, 0.195, 0.205, "reproduced", "equivalent"),
        (0.19, 0.19, 0.21, "reproduced", "equivalent"),  # the rim is inside
        (0.20, 0.18, 0.22, "reproduced", "the interval reaches out"),
        (0.20, None, None, "reproduced", "the mean lies within"),
        (0.185, 0.18, 0.192, "not reproduced", "below ±5 %, the interval reaches in"),
        (0.185, 0.18, 0.1899, "not reproduced", "below ±5 %$"),
        (0.25, 0.24, 0.26, "not reproduced", "above ±5 %$"),
        (0.0, 0.0, 0.0, "not reproduced", "below"),  # a dead model
    ],
)
def test_level(value, low, high, word, reason):
    verdict = judged(LEVEL, value, low, high)
    assert verdict.word == word and re.search(reason, verdict.reason)
    assert verdict.gap == pytest.approx(value / 0.2 - 1)


def test_a_count_must_be_exact_where_the_tolerance_is_zero():
    claim = with_(metric="users", value=6040, tolerance=0)
    assert judged(claim, 6040, 6040, 6040).word == "reproduced"
    assert judged(claim, 6039, 6039, 6039).word == "not reproduced"


@pytest.mark.parametrize(
    ("value", "low", "high", "word"),
    [
        (0.01, 0.005, 0.015, "ordering reproduced"),
        (0.01, -0.005, 0.025, "not reproduced"),
        (-0.01, -0.015, -0.005, "not reproduced"),
        (0.01, None, None, "not attempted"),
    ],
)
def test_ordering(value, low, high, word):
    ordering = with_(kind="ordering", value=0.05, over="other")
    assert judged(ordering, value, low, high).word == word
    mirrored = with_(kind="ordering", value=-0.05, over="other")
    bounds = (None, None) if low is None else (-high, -low)
    assert judged(mirrored, -value, *bounds).word == word


def test_ratio():
    ratio = with_(kind="ratio", value=1.5, over="other")
    assert judged(ratio, 1.48).word == "reproduced"
    assert judged(ratio, 1.2, 1.1, 1.3).word == "ordering reproduced"
    assert judged(ratio, 1.2, 0.9, 1.5).word == "not reproduced"
    assert judged(ratio, 0.9, 0.8, 0.95).word == "not reproduced"


def test_floor():
    floor = with_(kind="floor")
    assert judged(floor, 0.2).word == judged(floor, 0.3).word == "reproduced"
    assert judged(floor, 0.199, 0.19, 0.21).word == "not reproduced"


def test_smoke_may_say_one_thing_only():
    assert str(judged(LEVEL, 0.2, 0.2, 0.2, scale="smoke")) == "plumbing only"
    assert str(judged(LEVEL, 0.2, 0.2, 0.2, scale="smoke", dataset="synthetic")) == "plumbing only"


def test_unlike_things_are_not_compared():
    with pytest.raises(InputError, match="data set: published on set, measured on other"):
        judged(LEVEL, 0.2, dataset="other")
    with pytest.raises(InputError, match="ranking: published under full, measured under sampled_uniform_100"):
        judged(LEVEL, 0.2, protocol=OURS | {"ranking": "sampled_uniform_100"})
    with pytest.raises(InputError, match="time_tie_rule: published under given, measured under stable"):
        claim, other_targets = load_claims()["dross/sasrec/ndcg@10"], OURS | {"time_tie_rule": "stable"}
        judge(claim, 0.13, None, None, other_targets, "ml-1m-w1", "paper")
    assert mismatch(LEVEL, OURS | {"ties": "optimistic"}, "set") is None  # the document does not say


def test_a_difference_is_accepted_only_where_the_ledger_says_so():
    claim = with_(protocol={"split": "leave_one_out", "validation": 512})
    assert "validation" in mismatch(claim, OURS, "set")
    claim = dataclasses.replace(claim, accepts={"validation": "same targets"})
    assert mismatch(claim, OURS, "set") is None
    assert judged(claim, 0.2).reason.endswith("accepted although validation differs: same targets")
    assert "accepted" not in judged(claim, 0.2, protocol=OURS | {"validation": 512}).reason


@pytest.mark.parametrize("numbers", [(math.nan, None, None), (0.2, 0.3, 0.4), (0.2, 0.1, math.inf)])
def test_a_measurement_that_is_none_is_an_error(numbers):
    with pytest.raises(InputError, match="expected low <= value <= high"):
        judged(LEVEL, *numbers)


def test_record_entry_has_the_keys_of_the_record():
    entry = judged(LEVEL, 0.21, 0.2, 0.22).record()
    assert entry == {"id": "paper/model/ndcg@10", "published": 0.2, "measured": 0.21, "low": 0.2, "high": 0.22,
                     "verdict": "reproduced"}  # fmt: skip


# ---- judging the rows of a record ------------------------------------------------------------------------------------


def row(name, value, section=None, **extra):
    numbers = {"ndcg@10": {"value": value, "low": value - 0.01, "high": value + 0.01}}
    metrics, slices = ({}, {section: numbers}) if section else (numbers, {})
    return {"row": name, "metrics": metrics, "slices": slices} | extra


def verdicts_of(rows, claims, **options):
    options = {"notebook": "01", "dataset": "set", "protocol": OURS, "scale": "laptop"} | options
    return [str(v) for v in judge_rows(rows, claims={claim.id: claim for claim in claims}, **options)]


def test_rows_are_judged_by_the_metrics_of_the_claims_protocol():
    sampled = with_(id="s", protocol={"ranking": "sampled_uniform_100"}, value=0.6)
    kept = with_(id="k", protocol={"seen": "kept"}, value=0.1)
    model = row("model", 0.2)
    model["slices"] = {"seen_kept": row("", 0.1)["metrics"], "sampled_uniform_100": row("", 0.6)["metrics"]}
    assert verdicts_of([model], [LEVEL, sampled, kept]) == ["reproduced"] * 3
    model["slices"] = {}
    assert verdicts_of([model], [sampled]) == ["not attempted (row model has no ndcg@10 under sampled_uniform_100)"]


def test_rows_that_could_not_be_judged_say_why():
    assert verdicts_of([], [LEVEL]) == ["not attempted (row model was not run)"]
    failed = row("model", 0.2, status="failed", reason="diverged at step 900")
    assert verdicts_of([failed], [LEVEL]) == ["not attempted (row model: failed, diverged at step 900)"]
    other = OURS | {"split": "global_time"}
    assert verdicts_of([row("model", 0.2)], [LEVEL], protocol=other) == [
        "not attempted (split: published under leave_one_out, measured under global_time)"
    ]
    assert verdicts_of([row("model", 0.2)], [with_(dataset="another")]) == []
    assert verdicts_of([row("model", 0.2)], [with_(row=None, beside="model")]) == []  # only a marker


def test_orderings_need_the_paired_difference():
    ordering = with_(kind="ordering", value=0.05, over="other")
    rows = [row("model", 0.2), row("other", 0.1)]
    assert verdicts_of(rows, [ordering])[0].startswith("not attempted (an ordering needs the interval")
    paired = {("model", "other", "ndcg@10"): (0.1, 0.08, 0.12)}
    assert verdicts_of(rows, [ordering], differences=paired) == ["ordering reproduced"]
    sampled = dataclasses.replace(ordering, protocol={"ranking": "sampled_uniform_100"})
    for each in rows:
        each["slices"] = {"sampled_uniform_100": each["metrics"]}
    assert verdicts_of(rows, [sampled], differences=paired)[0].startswith("not attempted (an ordering needs")


def test_smoke_rows_are_plumbing_whatever_they_reach():
    verdicts = judge_rows([row("sasrec_ce", 0.9)], notebook="01", dataset="synthetic", protocol=OURS, scale="smoke")
    assert {str(verdict) for verdict in verdicts} == {"plumbing only"}
    assert all(verdict.measured is None for verdict in verdicts)


def test_a_sentence_without_a_number_is_judged_by_its_order_and_shows_none():
    claim = load_claims()["words-scientific/random-blocks-over-random-words/ndcg@10"]
    assert (claim.row, claim.over, claim.worded) == ("random_blocks", "random_words", True)
    lows = (0.001, -0.005, -0.05)
    told = {low: judge(claim, low + 0.01, low, low + 0.02, {}, claim.dataset, "laptop") for low in lows}
    assert [verdict.word for verdict in told.values()] == [ORDERING, NOT_REPRODUCED, NOT_REPRODUCED]
    assert Judged(told[0.001]).shown()[3] == IN_WORDS and told[0.001].record()["published"] is None
    assert verdict_table(told.values())["published"].eq(IN_WORDS).all()


def test_a_group_that_claims_nothing_is_refused(tmp_path):
    (tmp_path / "claims.yaml").write_text("""
defaults: {source: D, notebook: "01", kind: level, tolerance: 0.05, metrics: [ndcg@10]}
groups: [{id: empty, paper: p, where: w, dataset: d}]
""")
    with pytest.raises(InputError, match="claims group empty has neither `systems` nor `worded`"):
        load_claims(tmp_path / "claims.yaml")
