"""An epoch of HSTU on MovieLens-1M in processor seconds, what its biases cost, and the same attention done plainly.

    python tests/benchmarks/bench_hstu.py

The published configuration (L = 200, D = 50, 2 blocks, 128 histories a step, 128 negatives a position, cosine) on
`ml-1m` under $TEXTREC_DATA or, where that is absent, on random histories of about those lengths. Contenders take
turns in one process on one thread; a number is the median of their processor seconds. "Plainly" pads all rows to the
longest one, gathers the bias of every pair of positions and lets autograd do the rest, as the published code does.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from _ratio import machine

from textrec.data.histories import Histories
from textrec.models import hstu
from textrec.models.hstu import HSTU, HSTUConfig
from textrec.training.batches import HistoryBatches, next_item_targets
from textrec.training.losses import sampled_softmax

HISTORIES, NEGATIVES, USERS = 128, 128, 6040


def histories() -> tuple[str, Histories]:
    source = Path(os.environ.get("TEXTREC_DATA", "")) / "ml-1m" / "interactions.tsv.gz"
    if source.is_file():
        dated = pd.read_csv(source, sep="\t", usecols=["user_id", "item_id", "timestamp"]).dropna()  # 279 have no time
        users, items, times = dated.to_numpy(np.int64).T
        order = np.lexsort((np.arange(len(users)), times, users))
        _, lengths = np.unique(users, return_counts=True)
        name, items, times = "MovieLens-1M", np.unique(items[order], return_inverse=True)[1] + 1, times[order]
    else:
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(4.6, 1.0, USERS).astype(np.int64), 20, 2300)
        gaps = np.exp(rng.uniform(0, 9, lengths.sum())).astype(np.int64)
        items, times = rng.integers(1, 3707, lengths.sum()), 956_000_000 + gaps.cumsum()
        name = "random histories of MovieLens-1M's shape"
    return name, Histories(items.astype(np.int32), times, np.concatenate([[0], np.cumsum(lengths)]))


def plain_attention(q_TC, k_TC, v_TC, bias_LL, table, tiles, num_heads):
    """What `_PointwiseAttention` computes, on (B, H, L, L) blocks."""
    q, k, v = (tiles.pad(x, num_heads) for x in (q_TC, k_TC, v_TC))
    scores = q @ k.transpose(2, 3) + bias_LL
    if table is not None:
        ((_, _, _, buckets),) = tiles.tiles
        scores = scores + table[buckets.long()].view(tiles.rows, 1, tiles.length, tiles.length)
    return tiles.pack(F.silu(scores) @ v)


class Plain:
    """Stands in for the autograd function."""

    apply = staticmethod(plain_attention)


def steps(data: Histories, count: int, loss: bool, plain: bool, **settings) -> float:
    """Train a few steps; return processor seconds per epoch of as many histories."""
    torch.manual_seed(0)
    num_items = int(data.items_E.max())
    model = HSTU(HSTUConfig(num_items=num_items, **settings))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    dataset = HistoryBatches(data, data.lengths_U - 2, 200, next_item_targets, model.reads_times)
    rows = np.random.default_rng(0).permutation(len(dataset))
    kept = hstu._PointwiseAttention, hstu.TILE_QUERIES, hstu.TILE_NUMBERS
    if plain:
        hstu._PointwiseAttention, hstu.TILE_QUERIES, hstu.TILE_NUMBERS = Plain, 1 << 20, 1 << 40
    started = time.process_time()
    for step in range(count):
        batch = dataset[0, step, rows[step * HISTORIES : (step + 1) * HISTORIES]]
        hidden_TD = model(batch["items"], *(batch[name] for name in ("times", "requests") if name in batch))
        targets_T = batch["targets"][batch["items"] != 0]
        total = hidden_TD.sum()
        if loss:
            negatives_TN = torch.randint(1, num_items + 1, (len(targets_T), NEGATIVES))
            total = sampled_softmax(hidden_TD, model.item_vectors(), targets_T, negatives_TN)
        optimizer.zero_grad()
        (total / len(targets_T)).backward()
        optimizer.step()
    spent = time.process_time() - started
    hstu._PointwiseAttention, hstu.TILE_QUERIES, hstu.TILE_NUMBERS = kept
    return spent / (count * HISTORIES) * len(dataset)


CONTENDERS = {
    "training step with the loss": {"loss": True},
    "net alone": {},
    "net alone, position bias only": {"time_bias": False},
    "net alone, time bias only": {"position_bias": False},
    "net alone, no bias": {"time_bias": False, "position_bias": False},
    "net alone, plainly": {"plain": True},
    "net alone, plainly, no bias": {"plain": True, "time_bias": False, "position_bias": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name, data = histories()
    print(f"{machine()}, torch {torch.__version__}, {name}\n")
    found: dict[str, list[float]] = {contender: [] for contender in CONTENDERS}
    for round_ in range(arguments.rounds + 1):
        for contender, settings in CONTENDERS.items():
            seconds = steps(data, arguments.steps, **({"loss": False, "plain": False} | settings))
            if round_:
                found[contender].append(seconds)
    print("| contender | CPU s per epoch |\n|---|--:|")
    for contender, seconds in found.items():
        print(f"| {contender} | {statistics.median(seconds):.1f} |")


if __name__ == "__main__":
    main()
