"""A prepared set small enough to train on in a second: each user walks a ring of items, so the next item is certain."""

import json
from pathlib import Path

import numpy as np
import pytest

from textrec.data.prepared import PreparedSet


@pytest.fixture
def ring(tmp_path) -> PreparedSet:
    return write_ring(tmp_path / "ring")


def write_ring(folder: Path) -> PreparedSet:
    """40 users, 30 items, histories of 12 to 15 items; after item i comes i + 1 (1 after 30), seconds to days later.

    Leave-one-out, but uneven, so that processes have unequal shares: training parts of 3 to 13 items, 39 validation
    targets.
    """
    rng = np.random.default_rng(0)
    lengths = rng.integers(12, 16, 40)
    starts = rng.integers(0, 30, 40)
    waits = np.random.default_rng(3).uniform(0, 13, lengths.sum())
    items = np.concatenate([(start + np.arange(n)) % 30 + 1 for start, n in zip(starts, lengths, strict=True)])
    folder.mkdir()
    arrays = {
        "items": items.astype(np.int32), "times": 900_000_000 + np.exp(waits).astype(np.int64).cumsum(),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "train_end": lengths - 2 - np.arange(40) % 8, "test_target": lengths - 1,
        "validation_target": np.where(np.arange(40) == 11, -1, lengths - 2),
    }  # fmt: skip
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    details = {"name": "ring", "fingerprint": "ring", "counts": {"users": 40, "items": 30, "interactions": len(items)}}
    (folder / "fingerprint.json").write_text(json.dumps(details))
    return PreparedSet.load(folder)
