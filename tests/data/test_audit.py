"""The audit against hand counts, and the card."""

import numpy as np
import pytest

from textrec.data.audit import audit, data_card, redraw_ties
from textrec.data.preparing import prepare, prepare_frames

LOG = """user_id\titem_id\ttimestamp
u\ta\t1
u\tb\t2
u\tc\t6
u\ta\t6
v\tb\t3
v\td\t4
v\te\t9
w\ta\t5
w\tb\t7
"""
ITEMS = '{"item_id": "a", "title": "Same"}\n{"item_id": "b", "title": "Same"}\n{"item_id": "c", "title": "Other"}\n'


@pytest.fixture
def prepared(tmp_path):
    (tmp_path / "log.tsv").write_text(LOG, encoding="utf-8")
    (tmp_path / "items.jsonl").write_text(ITEMS, encoding="utf-8")
    return prepare_frames("hand", tmp_path / "log.tsv", tmp_path / "items.jsonl", processed=tmp_path / "out")


def test_findings_by_hand(prepared):
    # training: u a1 b2 | v b3 | w a5 b7. Validation targets: u c6, v d4. Test targets: u a6, v e9. w only trains.
    found = audit(prepared, draws=40)
    assert found.findings["test"]["targets"] == 2 and found.findings["test"]["without_target"] == 1
    assert found.findings["test"]["later_share"] == pytest.approx((1 / 5 + 0 / 5) / 2)  # after 6: the 7; after 9: none
    assert found.findings["validation"]["later_share"] == pytest.approx(
        (1 / 5 + 2 / 5) / 2
    )  # after 6: 7; after 4: 5, 7
    assert found.findings["test"]["cold"] == 1  # e
    assert found.findings["validation"]["cold"] == 2  # c, d
    assert found.findings["test"]["repeats"] == 1  # u had a
    assert found.findings["validation"]["repeats"] == 0
    assert found.findings["test"]["tied"] == 1 and found.findings["validation"]["tied"] == 1  # u's c6 and a6
    # c and a change places in half of the draws: half of u's target, a quarter of all
    assert 0.1 < found.findings["test"]["churn"] < 0.4 and found.findings["test"]["churn_highest"] == 0.5
    assert found.titles == {"without a title": 2, "sharing their title with another": 2}
    assert found.redrawn["test"].shape == (40, 2) and set(found.redrawn["test"][:, 1]) == {5}
    assert set(found.redrawn["test"][:, 0]) == {1, 3}


def test_redrawn_histories_keep_users_times_and_lengths(prepared):
    histories = prepared.histories
    found = audit(prepared, draws=3)
    users, positions = prepared.split.targets("test")
    for seed in range(3):
        drawn = redraw_ties(histories, seed)
        assert drawn.at(users, positions).tolist() == found.redrawn["test"][seed].tolist()
        assert np.array_equal(drawn.times_E, histories.times_E) and np.array_equal(
            drawn.offsets_U1, histories.offsets_U1
        )
        pairs = [sorted(zip(h.times_E.tolist(), h.items_E.tolist(), strict=True)) for h in (drawn, histories)]
        assert pairs[0] == pairs[1]
        assert drawn.items_E[4:].tolist() == histories.items_E[4:].tolist()  # v and w have no ties


def test_a_set_without_times_says_so(tmp_path):
    (tmp_path / "log.tsv").write_text("user_id\titem_id\nu\ta\nu\tb\nu\tc\n", encoding="utf-8")
    found = audit(prepare_frames("order", tmp_path / "log.tsv", processed=tmp_path / "out"))
    assert found.draws == 0 and found.redrawn["test"].shape == (0, 1)
    assert [found.findings["test"][key] for key in ("later_share", "tied", "churn")] == [None, None, None]
    assert found.findings["test"]["cold"] == 1


def test_the_audit_prints_itself_and_becomes_a_frame(prepared):
    found = audit(prepared)
    assert repr(found).startswith(f"audit of hand ({prepared.fingerprint[:12]}), ties redrawn 5 times")
    words = [line.split() for line in repr(found).splitlines()]
    assert [*"users with a target".split(), "2", "2"] in words  # counts are whole numbers
    assert [*"targets whose item no training interaction has".split(), "2", "1"] in words
    frame = found.to_frame()
    assert frame.loc["targets whose item no training interaction has"].tolist() == [2, 1]
    assert list(frame.columns) == ["validation", "test"]


def test_global_time_has_no_training_interaction_later_than_a_target(tmp_path):
    split = {"split": "global_time", "test_share": 0.2}
    prepared = prepare("synthetic", processed=tmp_path, **split)
    assert audit(prepared).findings["test"]["later_share"] == 0
    leaking = prepare("synthetic", processed=tmp_path)
    assert audit(leaking).findings["test"]["later_share"] > 0


def test_the_card_names_sources_counts_choices_and_findings(prepared):
    card = data_card(prepared, audit(prepared))
    for part in (
        "# hand",
        "| interactions | 9 | - |",
        "| read | 3 | 5 | 9 |",
        "interactions per user: 2 to 4, median 3, mean 3.0",
        "times: 1970-01-01 to 1970-01-01",
        "texts filled: title 60.0%",
        "time_tie_rule stable",
        prepared.fingerprint,
        prepared.details["sources"][0]["sha256"],
        "audit of hand",
    ):
        assert part in card
    assert card == data_card(prepared, audit(prepared))


@pytest.mark.real
def test_a_quarter_of_the_ml_1m_targets_is_a_matter_of_the_tie_rule(real_data, tmp_path):
    found = audit(prepare("ml-1m-w3", raw=real_data, processed=tmp_path)).findings["test"]
    assert found["churn"] == pytest.approx(
        0.25, abs=0.03
    )  # the authors of eSASRec report "about 25 %" for two unstable sorts
    assert found["targets"] == 6038 and found["without_target"] == 2 and found["repeats"] == 0
