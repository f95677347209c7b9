"""One seeding function, and generators that are a pure function of where in a run they are used."""

import hashlib
import random

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all of `parts` and is the same on every machine and process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> np.random.Generator:
    """Return a NumPy generator seeded by `derive_seed(*parts)`, e.g. `generator(seed, "shuffle", epoch)`."""
    return np.random.default_rng(derive_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators (dropout and initialisation read torch's)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - third-party code reads the global generator
    torch.manual_seed(seed)
