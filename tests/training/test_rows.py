"""Rows: cached by what made them, resumed, failed rows stay rows, misspelt settings are one sentence."""

import json

import pytest
import torch

from textrec.schema import InputError
from textrec.training import rows
from textrec.training.cost import CPU_WATTS
from textrec.training.presets import CONTROLS, PRESETS
from textrec.training.rows import run_rows

SMALL = {"all": {"max_epochs": 2, "embedding_dim": 8, "max_sequence_length": 8, "batch_size": 16, "num_negatives": 4}}


def test_every_trained_preset_runs(ring, tmp_path):
    trained = [name for name, preset in PRESETS.items() if preset.model not in CONTROLS]
    overrides = SMALL | {"llama_toy": {"num_heads": 2, "num_blocks": 2}}
    results = run_rows(trained, ring, seed=0, run_dir=tmp_path, overrides=overrides)
    assert [(r.row, r.status, r.reason) for r in results] == [(name, "ok", None) for name in trained]
    for result in results:
        assert len(result.ranks.users_U) == 40
        assert set(result.cost) == {"wall_s", "cpu_s", "peak_rss_gib", "peak_gpu_gib", "tokens", "energy_wh"}
        assert result.cost["tokens"] > 0
        assert result.parameters["num_items"] == 30 and result.parameters["embedding_dim"] == 8


def test_the_controls_need_no_training(ring, tmp_path):
    results = run_rows(list(CONTROLS), ring, seed=0, run_dir=tmp_path)
    assert [r.status for r in results] == ["ok"] * len(CONTROLS)
    by_row = {r.row: (r.ranks.kept.higher_U == 0).mean() for r in results}
    assert by_row["markov"] > 0.9 > by_row["random"]  # the ring is a Markov chain


def test_a_finished_row_is_read_back_and_a_changed_one_runs_again(ring, tmp_path, monkeypatch):
    first = run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)[0]
    calls = []
    real = rows._train_and_evaluate
    monkeypatch.setattr(rows, "_train_and_evaluate", lambda *a: calls.append(a) or real(*a))
    again = run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)[0]
    assert not calls and (again.ranks.kept.higher_U == first.ranks.kept.higher_U).all()
    assert again.curve == first.curve and again.cost == first.cost
    run_rows(["sasrec_ce"], ring, seed=1, run_dir=tmp_path, overrides=SMALL)
    changed = {"all": SMALL["all"] | {"learning_rate": 0.01}}
    run_rows(["sasrec_ce"], ring, seed=1, run_dir=tmp_path, overrides=changed)
    assert len(calls) == 2


def test_a_resumed_row_costs_what_all_its_processes_spent(ring, tmp_path, monkeypatch):
    from textrec.training import trainer

    def interrupted(self, trainer, module):
        real_save(self, trainer, module)
        raise KeyboardInterrupt

    real_save = trainer.SaveLast.on_train_epoch_end
    monkeypatch.setattr(trainer.SaveLast, "on_train_epoch_end", interrupted)
    with pytest.raises(BaseException):  # noqa: B017
        run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)
    monkeypatch.undo()
    path = tmp_path / "rows" / "sasrec_ce" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (state,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("RankingMonitor")]
    assert 0 < state["cpu_s"] < 60 and state["tokens"] > 0
    state["cpu_s"] = 1000.0  # what the interrupted process would have reported of a longer epoch
    torch.save(checkpoint, path)
    cost = run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)[0].cost
    assert 1000 < cost["cpu_s"] < 1060
    assert cost["energy_wh"] == pytest.approx(cost["cpu_s"] * CPU_WATTS / 3600, abs=1e-2)


def test_a_row_that_breaks_is_a_row_and_is_tried_again(ring, tmp_path, monkeypatch):
    def out_of_memory(*args):
        raise MemoryError("12 GiB wanted")

    monkeypatch.setattr(rows, "_train_and_evaluate", out_of_memory)
    broken = run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)[0]
    assert (broken.status, broken.reason, broken.ranks) == ("out_of_memory", "MemoryError: 12 GiB wanted", None)
    monkeypatch.undo()
    assert run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)[0].status == "ok"


@pytest.mark.parametrize(
    ("names", "overrides", "sentence"),
    [
        (["sasrec_cee"], {}, "row 'sasrec_cee' is unknown .did you mean 'sasrec_ce'"),
        (["sasrec_ce"], {"all": {"droput": 0.1}}, "sets 'droput', which row 'sasrec_ce' does not have"),
        (["sasrec_ce"], {"gru4rec": {"dropout": 0.1}}, "overrides names the row 'gru4rec', which is not among"),
        (["sasrec_ce"], {"all": {"loss": "hinge"}}, "row 'sasrec_ce': loss='hinge': expected one of"),
        (["sasrec_ce"], {"all": {"num_heads": 7}}, "'sasrec_ce': embedding_dim=64 is not a multiple of num_heads=7"),
    ],
)
def test_mistakes_are_one_sentence(ring, tmp_path, names, overrides, sentence):
    with pytest.raises(InputError, match=sentence):
        run_rows(names, ring, seed=0, run_dir=tmp_path, overrides=overrides)


def test_a_skipped_row_says_why_and_is_not_run(ring, tmp_path):
    skipped = {"bert4rec": "three hours on two cores"}
    results = run_rows(["markov", "bert4rec"], ring, seed=0, run_dir=tmp_path, skipped=skipped)
    assert [(r.status, r.reason) for r in results] == [("ok", None), ("not_attempted", "three hours on two cores")]
    assert results[1].ranks is None and results[1].parameters["num_items"] == 30
    with pytest.raises(InputError, match="skipped names the row 'gru4rec'"):
        run_rows(["markov"], ring, seed=0, run_dir=tmp_path, skipped={"gru4rec": "too dear"})


def test_what_is_stored_is_json_a_stranger_can_read(ring, tmp_path):
    run_rows(["sasrec_ce"], ring, seed=0, run_dir=tmp_path, overrides=SMALL)
    stored = json.loads((tmp_path / "rows" / "sasrec_ce" / "row.json").read_text())
    assert stored["key"]["fingerprint"] == "ring"
    assert not list((tmp_path / "rows" / "sasrec_ce").glob("*.partial-*"))
