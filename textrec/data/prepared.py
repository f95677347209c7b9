"""A prepared set on disk: histories, split, catalogue and the fingerprint that says how it was made.

Folder `data/processed/<name>/`: `items.npy`, `times.npy`, `offsets.npy`, `train_end.npy`, `validation_target.npy`,
`test_target.npy`, `users.parquet` (external ids), `catalogue.parquet` (row k is item id k + 1), `fingerprint.json`.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from textrec.data.histories import Histories, Split
from textrec.schema import InputError


@dataclass(frozen=True)
class PreparedSet:
    """What every model, loop and notebook reads; equal fingerprints mean equal users, items, order and targets."""

    name: str
    folder: Path
    histories: Histories
    split: Split
    num_items: int
    details: dict  # fingerprint.json: choices, counts after every filter, sha256 of the arrays

    @property
    def fingerprint(self) -> str:
        return self.details["fingerprint"]

    @cached_property
    def catalogue(self):
        """The item table as a pandas frame: external id, title and text fields; row k is item id k + 1."""
        import pandas

        return pandas.read_parquet(self.folder / "catalogue.parquet", use_threads=False)

    @cached_property
    def users(self):
        """External user ids as a pandas series; row u is user u."""
        import pandas

        return pandas.read_parquet(self.folder / "users.parquet", use_threads=False)["user"]

    @classmethod
    def load(cls, folder: Path) -> "PreparedSet":
        """Open a prepared folder; raise `InputError` naming what is missing."""
        folder = Path(folder)
        path = folder / "fingerprint.json"
        if not path.is_file():
            told = f"{folder} holds no prepared data set (fingerprint.json is missing)"
            raise InputError(f"{told}: run `textrec data prepare`")
        details = json.loads(path.read_text(encoding="utf-8"))
        split = Split(*(np.load(folder / f"{name}.npy") for name in ("train_end", "validation_target", "test_target")))
        return cls(details["name"], folder, Histories.load(folder), split, details["counts"]["items"], details)
