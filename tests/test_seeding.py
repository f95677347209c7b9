"""Seeds are a function of their parts alone, and one call seeds every generator that is read."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from textrec.seeding import derive_seed, generator, seed_everything


def test_a_seed_is_the_same_in_every_process():
    code = "from textrec.seeding import derive_seed; print(derive_seed(7, 'shuffle', 3))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(outcome.stdout) == derive_seed(7, "shuffle", 3)


def test_every_part_and_its_place_matters():
    seeds = {derive_seed(*parts) for parts in [(1, 2), (2, 1), (12,), ("1", "2", "3"), (1, "23"), ()]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_generators_of_one_place_agree_and_of_two_places_do_not():
    draw = generator(0, "negatives", 1).integers(2**40, size=4)
    assert draw.tolist() == generator(0, "negatives", 1).integers(2**40, size=4).tolist()
    assert draw.tolist() != generator(0, "negatives", 2).integers(2**40, size=4).tolist()


def global_draws() -> tuple:
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002 - what third parties read


@pytest.mark.parametrize("seed", [0, 2**62])
def test_all_global_generators_are_seeded(seed):
    seed_everything(seed)
    first = global_draws()
    unseeded = global_draws()
    seed_everything(seed)
    assert global_draws() == first
    assert all(a != b for a, b in zip(first, unseeded, strict=True))
