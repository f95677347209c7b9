"""What only a CUDA device can show: the same ranks and losses as on the CPU, training in fp32 and bf16, and its speed.

Skipped, with the reason, where there is no CUDA device. `pytest tests/gpu -s` prints the throughput table.
"""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from textrec.data.prepared import PreparedSet
from textrec.evaluation.metrics import mean_metrics
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.seeding import seed_everything
from textrec.training import losses
from textrec.training.module import TrainingConfig
from textrec.training.trainer import evaluate, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> PreparedSet:
    """2,000 users walk rings of 500 items: the next item is the last one plus one."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, 2000)
    starts = rng.integers(0, 500, 2000)
    items = np.concatenate([(s + np.arange(n)) % 500 + 1 for s, n in zip(starts, lengths, strict=True)])
    folder = tmp_path_factory.mktemp("walk")
    arrays = {
        "items": items.astype(np.int32), "times": np.zeros(len(items), np.int64),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]), "train_end": lengths - 2,
        "validation_target": lengths - 2, "test_target": lengths - 1,
    }  # fmt: skip
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    counts = {"users": 2000, "items": 500, "interactions": len(items)}
    (folder / "fingerprint.json").write_text(json.dumps({"name": "walk", "fingerprint": "walk", "counts": counts}))
    return PreparedSet.load(folder)


CONFIG = SASRecConfig(num_items=500, max_sequence_length=50, embedding_dim=32, dropout=0.1)
TRAINING = TrainingConfig(batch_size=64, learning_rate=3e-3, max_epochs=4)


def test_ranks_agree_with_the_cpu(walk):
    seed_everything(0)
    model = SASRec(CONFIG).eval()
    on_cpu = evaluate(model, walk, "test")
    on_gpu = evaluate(model.cuda(), walk, "test")
    assert (on_cpu.kept.higher_U == on_gpu.kept.higher_U).mean() > 0.99  # the last bit of a score may differ
    first, second = (mean_metrics(ranks.filtered, ks=(10,))["ndcg@10"] for ranks in (on_cpu, on_gpu))
    assert first == pytest.approx(second, abs=1e-3)


@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax", "gbce"])
def test_losses_and_gradients_agree_with_the_cpu(loss):
    torch.manual_seed(0)
    hidden, items, targets = torch.randn(300, 32), torch.randn(501, 32), torch.randint(1, 501, (300,))
    negatives = () if loss == "full_softmax" else (torch.randint(1, 501, (300, 40)),)
    results = []
    for device in ("cpu", "cuda"):
        h, e = hidden.to(device).requires_grad_(), items.to(device).requires_grad_()
        total = getattr(losses, loss)(h, e, targets.to(device), *(n.to(device) for n in negatives))
        total.backward()
        results.append([x.detach().cpu() for x in (total, h.grad, e.grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_learns_in_either_precision(walk, tmp_path, precision):
    seed_everything(0)
    started = time.perf_counter()
    training = replace(TRAINING, precision=precision)
    fitted = fit(SASRec(CONFIG), walk, training, seed=0, folder=tmp_path, device="cuda")
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() / 2**20
    print(f"{precision}: {fitted.tokens / seconds:,.0f} positions/s, peak {peak:,.0f} MiB")
    untrained = evaluate(SASRec(CONFIG).cuda().eval(), walk, "test")
    trained = mean_metrics(evaluate(fitted.model.cuda(), walk, "test").kept, ks=(10,))["ndcg@10"]
    assert trained > 0.5 > mean_metrics(untrained.kept, ks=(10,))["ndcg@10"]
