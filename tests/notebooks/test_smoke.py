"""Every notebook runs at its smoke parameters into a folder of its own, ends with a record, and writes nowhere else."""

import pytest

from textrec.paths import NOTEBOOKS, PARAMETERS, ROOT
from textrec.study import records, runner
from textrec.study.records import Record

NUMBERS = [path.name[:2] for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
PROMISED = {"00": {"users", "items", "interactions", "mean_length"}, "01": {"ndcg@10", "recall@10", "mrr"},
            "02": {"ndcg@10", "recall@10", "mrr"}, "03": {"ndcg@10", "recall@10", "mrr"},
            "04": {"ndcg@10", "recall@10", "mrr"}, "05": {"ndcg@10", "recall@10", "mrr"},
            "06": {"ndcg@10", "recall@10", "mrr"}, "07": {"ndcg@10", "recall@10", "mrr"},
            "08": {"ndcg@10", "recall@10", "mrr"}}  # fmt: skip


def tracked_places() -> dict[str, float]:
    """Return what a run must leave alone, with its time of change."""
    inside = [path for folder in (NOTEBOOKS, PARAMETERS) for path in folder.rglob("*.[iy]*")]
    return {str(path): path.stat().st_mtime for path in [*inside, *ROOT.glob("*.*")] if path.is_file()}


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS)
def test_a_notebook_runs_at_smoke_scale(number, tmp_path, monkeypatch):
    for module in (records, runner):
        monkeypatch.setattr(module, "RUNS", tmp_path)
    before = tracked_places()
    outcome = runner.run_notebook(number)
    assert (outcome.status, outcome.reason) == ("ok", None)
    folder = tmp_path / "smoke" / number / "seed0"
    assert (folder / "executed.ipynb").is_file() and not list(folder.rglob("*partial*"))
    if number != runner.REPORT:
        record = Record.read(folder / "record.json")  # refuses unknown keys and what is not finite
        assert record.rows and record.environment["inputs"]["data"]
        for row in record.rows:
            assert PROMISED.get(number, set()) <= set(row["metrics"]), row["row"]
        assert {claim["verdict"] for claim in record.claims} <= {"plumbing only"}
        assert runner.run_notebook(number).status == "skipped"
    assert tracked_places() == before, "nothing is written outside the run folder, figures/smoke and data/processed"
