"""Invented records for the tests of tables, figures and the report; no number in them was measured."""

import numpy as np

from textrec.evaluation.ranking import Counts, Ranks
from textrec.study.records import Record

PROTOCOL = {"split": "leave_one_out", "validation": "all", "ranking": "full", "seen": "filtered", "ties": "expected",
            "time_tie_rule": "given"}  # fmt: skip
COST = {"wall_s": 10.0, "cpu_s": 19.0, "peak_rss_gib": 1.5, "peak_gpu_gib": None, "tokens": 1000, "energy_wh": None}


def estimate(value, half=0.01):
    return {"value": value, "low": value - half, "high": value + half}


def row(name, ndcg=None, *, changed="loss: other", half=0.01, **extra):
    metrics = {"recall@10": estimate(1.75 * ndcg, half), "ndcg@10": estimate(ndcg, half)} if ndcg is not None else {}
    slices = {"seen_kept": {"ndcg@10": estimate(ndcg / 2, half)}} if ndcg is not None else {}
    told = {"row": name, "changed": changed, "parameters": {}, "metrics": metrics, "slices": slices, "cost": COST}
    return told | extra


def failed(name, reason="RuntimeError: the loss is nan at step 900"):
    return row(name, status="failed", reason=reason)


def record(rows, *, seed=0, scale="laptop", variant="ml-1m-w1", notebook="01", claims=(), **changes):
    bad = [r for r in rows if r.get("status", "ok") != "ok"]
    values = {"notebook": notebook, "variant": variant, "scale": scale, "seed": seed,
              "status": "failed" if bad else "ok",
              "reason": "; ".join(f"{r['row']}: {r['reason']}" for r in bad) or None,
              "dataset": {"name": variant, "fingerprint": "f" * 16}, "protocol": PROTOCOL, "rows": list(rows),
              "claims": list(claims), "environment": {"versions": {}, "device": "cpu", "cores": 2}, "commit": "c" * 40,
              "dirty": False, "deviations": []}  # fmt: skip
    return Record(**(values | changes))


def ranks(higher, users=None):
    """Ranks of users whose target stands below `higher` others, among 100 candidates, without ties."""
    higher_U = np.asarray(higher, dtype=np.int64)
    counts = Counts(higher_U, np.zeros_like(higher_U), np.full_like(higher_U, 100))
    users_U = np.arange(len(higher_U)) if users is None else np.asarray(users)
    return Ranks(users_U, users_U + 1, counts, counts)
