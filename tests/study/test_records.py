"""What a record holds, what it refuses, and what its intervals and slices are worth."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from textrec.data.histories import Histories, Split
from textrec.data.prepared import PreparedSet
from textrec.evaluation.ranking import Counts, Ranks
from textrec.schema import InputError
from textrec.study import records
from textrec.study.records import Record, Run, exact, intervals, load_records, measured_row, write_record

KEYS = [
    "schema", "notebook", "variant", "scale", "seed", "status", "reason", "dataset", "protocol", "rows", "claims",
    "environment", "commit", "dirty", "deviations",
]  # fmt: skip


def make_run(folder, scale="smoke", dirty=False, label="01-toy", seed=0):
    return Run(scale=scale, dataset="toy", seed=seed, device="cpu", run_dir=f"{folder}/{label}/seed{seed}",
               state=("c0ffee", dirty))  # fmt: skip


def make_prepared(num_users=40, length=6):
    """Users take turns through the items; item 12 is nobody's but the last user's test target."""
    items = (np.arange(num_users)[:, None] + np.arange(length)) % 11 + 1
    items[-1, -1] = 12
    histories = Histories(items.ravel().astype(np.int32), np.zeros(items.size, np.int64),
                          np.arange(num_users + 1) * length)  # fmt: skip
    split = Split(*(np.full(num_users, length - back) for back in (2, 2, 1)))
    choices = {"split": "leave_one_out", "validation": "all", "time_tie_rule": "given"}
    details = {"fingerprint": "f1", "choices": choices}
    return PreparedSet("toy", None, histories, split, 12, details)


def make_result(prepared, higher_U=None, ties_U=None, **changes):
    users_U, positions_U = prepared.split.targets("test")
    zeros_U, full_U = np.zeros_like(users_U), np.full_like(users_U, prepared.num_items)
    counts = Counts(zeros_U if higher_U is None else higher_U, zeros_U if ties_U is None else ties_U, full_U)
    ranks = Ranks(users_U, prepared.histories.at(users_U, positions_U), counts, counts)
    row = {"row": "popularity", "changed": "no personalisation", "parameters": {"model": "popularity"}, "status": "ok",
           "reason": None, "ranks": ranks, "curve": [], "cost": {"wall_s": 0.1}, "commit": "c0ffee"}  # fmt: skip
    return SimpleNamespace(**(row | changes))


def test_the_file_has_the_agreed_keys_in_order_and_reads_back_equal(tmp_path):
    run, prepared = make_run(tmp_path), make_prepared()
    row = measured_row(make_result(prepared), prepared)
    record = write_record(run, prepared, [row], deviations=["none to speak of"])
    path = run.folder / "record.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    assert list(stored) == KEYS and stored["schema"] == 1
    assert (stored["notebook"], stored["variant"], stored["status"], stored["reason"]) == ("01", "toy", "ok", None)
    assert stored["protocol"] == {"split": "leave_one_out", "validation": "all", "ranking": "full", "seen": "filtered",
                                  "ties": "expected", "time_tie_rule": "given"}  # fmt: skip
    assert list(stored["rows"][0]) == ["row", "changed", "parameters", "metrics", "slices", "cost"]
    assert stored["environment"]["versions"]["numpy"] == np.__version__ and stored["environment"]["cores"] >= 1
    assert Record.read(path) == record
    assert [entry.name for entry in run.folder.iterdir()] == ["record.json"]


def test_a_hundred_sampled_candidates_flatter_and_chance_stays_chance():
    prepared = dataclasses.replace(make_prepared(), num_items=1001)
    users = np.zeros(40, np.int64)
    tenth = measured_row(make_result(prepared, higher_U=users + 99), prepared)  # rank 100 of 1,001: one in ten above
    sampled = tenth["slices"]["sampled_uniform_100"]
    assert tenth["metrics"]["recall@10"]["value"] == 0.0 < 0.4 < sampled["recall@10"]["value"] < 0.6
    constant = measured_row(make_result(prepared, ties_U=users + 1000), prepared)
    assert constant["slices"]["sampled_uniform_100"]["recall@10"]["value"] == pytest.approx(10 / 101)
    assert "sampled_uniform_100" not in measured_row(make_result(make_prepared()), make_prepared())["slices"]


def test_a_perfect_and_a_constant_model_are_what_they_are(tmp_path):
    prepared = make_prepared()
    perfect = measured_row(make_result(prepared), prepared)
    assert perfect["metrics"]["ndcg@10"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    users = np.zeros(40, np.int64)
    constant = measured_row(make_result(prepared, ties_U=users + 11), prepared)
    assert constant["metrics"]["recall@1"]["value"] == pytest.approx(1 / 12), "chance, not first place"
    assert set(perfect["metrics"]) == {f"{m}@{k}" for m in ("recall", "ndcg") for k in records.MAIN_KS} | {"mrr", "auc"}


def test_intervals_hold_the_mean_and_narrow_with_users():
    rng = np.random.default_rng(0)
    widths = []
    for users in (50, 5_000):
        counts = Counts(rng.integers(0, 20, users), np.zeros(users, np.int64), np.full(users, 21))
        hit = intervals(counts, (10,))["recall@10"]
        assert hit["low"] < hit["value"] < hit["high"]
        widths.append(hit["high"] - hit["low"])
    assert widths[0] > 5 * widths[1], "a hundred times the users, a tenth of the width"


def test_slices_follow_the_training_part():
    prepared = make_prepared()
    row = measured_row(make_result(prepared, higher_U=np.arange(40)), prepared)
    users = {name: metrics["users"]["value"] for name, metrics in row["slices"].items() if name != "seen_kept"}
    assert users["cold_items"] == 1 and users["middle_items"] == 39, "each other item 14 times"
    assert users["short_histories"] == 40 and "long_histories" not in users, "all are equally long; nobody is no slice"
    assert row["slices"]["cold_items"]["ndcg@10"]["value"] == 0.0
    assert list(row["slices"])[0] == "seen_kept" and set(row["slices"]["seen_kept"]) == set(row["metrics"])


def test_rare_items_are_those_that_training_saw_at_most_five_times():
    prepared = make_prepared(num_users=11)  # each item 4 times in training
    row = measured_row(make_result(prepared), prepared)
    assert row["slices"]["rare_items"]["users"]["value"] == 10


def test_a_row_that_failed_gives_the_record_its_status_and_reason(tmp_path):
    run, prepared = make_run(tmp_path), make_prepared()
    good = measured_row(make_result(prepared), prepared)
    late = measured_row(make_result(prepared, row="a", status="not_attempted", reason="needs a GPU"), prepared)
    full = measured_row(make_result(prepared, row="b", status="out_of_memory", reason="2 GiB wanted"), prepared)
    record = write_record(run, prepared, [good, late, full])
    assert record.status == "out_of_memory" and record.reason == "a: needs a GPU; b: 2 GiB wanted"
    stored = Record.read(run.folder / "record.json").rows[2]
    assert (stored["status"], stored["metrics"]) == ("out_of_memory", {})
    record = write_record(run, prepared, [good, late])
    assert (record.status, record.reason) == ("ok", None), "a row left out on purpose does not fail the run"
    assert record.deviations == ["a was not attempted: needs a GPU"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": [{"metrics": {"ndcg@10": {"value": float("nan"), "low": 0.0, "high": 0.0}}}]}, "finite numbers only"),
        ({"rows": [{"parameters": {"rate": float("inf")}}]}, "rate is inf"),
        ({"rows": [{"metrics": exact(hits=0.1)}]}, "unknown metric hits"),
        ({"rows": [{"metrics": {"mrr": {"value": 0.5}}}]}, "expected value, low, high"),
        ({"rows": [{"slices": {"cold_items": exact(ndgc=0.1)}}]}, "unknown metric ndgc"),
        ({"rows": [{}, {}]}, "not all different"),
        ({"rows": [{"note": "extra in front"}]}, None),
        ({"status": "fine"}, "status is 'fine'"),
        ({"status": "failed"}, "all but ok need one"),
        ({"reason": "none"}, "all but ok need one"),
        ({"scale": "laptop", "dirty": True}, "uncommitted code"),
        ({"scale": "tiny"}, "scale is 'tiny'"),
        ({"schema": 2}, "schema is 2"),
    ],
)
def test_what_a_record_refuses(tmp_path, changes, said):
    row = {"row": "a", "changed": "", "parameters": {}, "metrics": exact(mrr=0.5), "slices": {}, "cost": {}}
    record = write_record(make_run(tmp_path), make_prepared(), [row])
    changes = {**changes, "rows": [row | change for change in changes.get("rows", [{}])]}
    path = tmp_path / "other.json"
    changed = dataclasses.replace(record, **changes)
    if said is None:
        changed.write(path)
        return
    with pytest.raises(InputError, match=said):
        changed.write(path)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', "{"])
def test_a_broken_record_is_one_sentence(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    with pytest.raises(InputError, match="record"):
        Record.read(tmp_path / "record.json")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": "huge"}, "expected one of smoke, laptop, paper"),
        ({"run_dir": "papermill_runs/smoke/01/seed1"}, "expected it to end in"),
        ({"run_dir": "somewhere"}, "expected it to end in"),
        ({"scale": "laptop", "state": ("c0ffee", True)}, "committed code only"),
    ],
)
def test_a_run_checks_its_block(changes, said):
    block = {"scale": "smoke", "dataset": "toy", "seed": 0, "device": "cpu", "run_dir": "papermill_runs/smoke/01/seed0"}
    run = Run(**block, state=("c0ffee", True))
    assert (run.notebook, run.variant, run.label) == ("01", None, "01")
    with pytest.raises(InputError, match=said):
        Run(**({"state": ("c0ffee", False)} | block | changes))


def test_the_records_of_a_variant_come_in_the_order_of_their_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RUNS", tmp_path)
    for label, seed in (("01-toy", 10), ("01-toy", 2), ("01-other", 0), ("01", 0), ("00", 0)):
        write_record(make_run(tmp_path / "smoke", label=label, seed=seed), make_prepared(), [])
    assert [record.seed for record in load_records("smoke", "01", "toy")] == [2, 10]
    assert [record.label for record in load_records("smoke", "01")] == ["01", "01-other", "01-toy", "01-toy"]
    assert len(load_records("smoke")) == 5 and load_records("laptop") == []


@pytest.mark.parametrize("scale", ["laptop", "paper"])
def test_the_records_of_this_project_are_complete_and_from_committed_code(scale):
    for record in load_records(scale):
        assert record.scale == scale and record.status in records.STATUSES and not record.dirty
        assert re.fullmatch(r"[0-9a-f]{40}", record.commit), record.label
        assert record.folder.parent.name == record.label
