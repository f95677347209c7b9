"""Prepared sets whose texts tell the next item: it shares a rare brand word with the last one, nothing else does."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from textrec.data.histories import Histories, Split
from textrec.data.prepared import PreparedSet
from textrec.models.recformer import RecFormerConfig

NUM_BRANDS, ITEMS_OF_BRAND, SAME_BRAND = 30, 8, 0.9
COMMON = [a + b for a in ("sal", "ten", "mor", "vin", "gal", "pud") for b in ("ta", "or", "ix", "um", "el", "ad")]
BRANDS = [a + b for a in ("Kz", "Qw", "Xy", "Jv", "Zb", "Fp") for b in ("ogg", "umm", "iff", "ass", "enn")]

SMALL = RecFormerConfig(
    vocabulary_size=400, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, num_positions=130,
    max_tokens=64, max_items=6, attention_window=8, attention_path="dense",
)  # fmt: skip


def brand_set(folder: Path, seed: int, num_users: int = 60) -> PreparedSet:
    """Users of 5 to 8 items over the same brands; items, and their other words, differ from seed to seed."""
    rng = np.random.default_rng(seed)
    num_items = NUM_BRANDS * ITEMS_OF_BRAND
    titles = [" ".join(rng.choice(COMMON, 3, replace=False)) for _ in range(num_items)]
    brand_I = np.repeat(np.arange(NUM_BRANDS), ITEMS_OF_BRAND)
    lengths = rng.integers(5, 9, num_users)
    rows = []
    for length in lengths:
        brand, row = rng.integers(NUM_BRANDS), []
        while len(row) < length:
            brand = brand if rng.random() < SAME_BRAND else rng.integers(NUM_BRANDS)
            item = int(rng.choice(np.flatnonzero(brand_I == brand))) + 1
            if not row or item != row[-1]:
                row.append(item)
        rows += row
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    folder.mkdir(parents=True)
    frame = pd.DataFrame({"item": [f"i{n}" for n in range(num_items)], "title": titles})
    frame.assign(brand=[BRANDS[b] for b in brand_I]).to_parquet(folder / "catalogue.parquet")
    arrays = {
        "items": np.array(rows, np.int32), "times": np.zeros(len(rows), np.int64), "offsets": offsets,
        "train_end": lengths - 2, "validation_target": lengths - 2, "test_target": lengths - 1,
    }  # fmt: skip
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    details = {"name": folder.name, "fingerprint": f"brands {seed}", "counts": {"items": num_items}}
    (folder / "fingerprint.json").write_text(json.dumps(details))
    histories = Histories(arrays["items"], arrays["times"], offsets)
    split = Split(lengths - 2, lengths - 2, lengths - 1)
    return PreparedSet(folder.name, folder, histories, split, num_items, details)
