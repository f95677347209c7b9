"""Intervals that cover, tests that keep their level, and twins that must fail."""

import math

import numpy as np
import pytest

from textrec.evaluation.significance import bootstrap_interval, equivalence, holm, paired_randomisation
from textrec.seeding import generator


def simulated(rng, num_seeds=1, num_users=200, mean=0.3, seed_sd=0.0, user_sd=0.3, noise_sd=0.2):
    users = rng.normal(0, user_sd, num_users)
    seeds = rng.normal(0, seed_sd, (num_seeds, 1))
    return mean + seeds + users + rng.normal(0, noise_sd, (num_seeds, num_users))


def coverage(repeats, **options):
    rng = generator("coverage", *options)
    intervals = [bootstrap_interval(simulated(rng, **options), draws=300, seed=i) for i in range(repeats)]
    return np.mean([low <= 0.3 <= high for low, high in intervals])


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    assert coverage(150) == pytest.approx(0.95, abs=0.05)


def test_seeds_widen_the_interval_and_it_still_covers():
    assert coverage(100, num_seeds=5, seed_sd=0.1) > 0.8
    users_only = [
        bootstrap_interval(simulated(generator("narrow", i), num_seeds=5, seed_sd=0.1).mean(0)[None], draws=300)
        for i in range(100)
    ]
    assert np.mean([low <= 0.3 <= high for low, high in users_only]) < 0.7  # what forgetting the seeds costs


def test_few_and_many_distinct_values_have_one_distribution():
    values = generator("hits").integers(0, 2, (1, 2000)).astype(float)
    many = values + generator("jitter").normal(0, 1e-9, values.shape)  # two thousand distinct values
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(many), abs=0.003)
    half_width = 1.96 * values.std() / np.sqrt(2000)
    assert np.ptp(bootstrap_interval(values)) / 2 == pytest.approx(half_width, rel=0.08)


def test_equal_seeds_are_not_more_users():
    values = generator("copies").random((1, 400))
    assert bootstrap_interval(values) == pytest.approx(bootstrap_interval(np.repeat(values, 5, axis=0)), abs=0.006)


def test_the_interval_is_a_function_of_its_seed():
    values = generator("repeat").random((3, 50))
    assert (
        bootstrap_interval(values, seed=1) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    )


def test_p_values_are_uniform_where_nothing_differs_and_small_where_something_does():
    rng = generator("null")
    null = [paired_randomisation(*rng.normal(size=(2, 1, 60)), draws=400, seed=i) for i in range(200)]
    assert np.mean(np.array(null) <= 0.1) == pytest.approx(0.1, abs=0.07)
    assert np.mean(np.array(null) <= 0.5) == pytest.approx(0.5, abs=0.12)
    better = rng.normal(size=(1, 60))
    assert paired_randomisation(better + 0.2 + rng.normal(0, 0.1, (1, 60)), better, draws=400) == 1 / 401
    assert paired_randomisation(better, better) == 1


def test_sign_flips_equal_their_enumeration():
    a, b = np.array([[3.0, 1.0, 2.0, 5.0]]), np.array([[1.0, 0.0, 4.0, 1.0]])  # differences 2, 1, -2, 4
    signs = np.array(np.meshgrid(*[[-1, 1]] * 4)).reshape(4, -1)
    exact = np.mean(np.abs(np.array([2, 1, 2, 4]) @ signs) >= 5)
    assert paired_randomisation(a, b, draws=40_000) == pytest.approx(exact, abs=0.01)


def test_sign_flips_of_many_distinct_differences_keep_their_spread():
    rng = generator("many signs")
    a, b = rng.normal(size=(2, 1, 900))  # more distinct differences than are drawn group by group
    z = abs((a - b).sum()) / np.sqrt(((a - b) ** 2).sum())
    assert paired_randomisation(a, b, draws=4001) == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.03)


def test_pairing_finds_what_unpaired_values_hide():
    rng = generator("pairing")
    base = rng.normal(0, 1, (1, 300))
    improved = base + 0.05 + rng.normal(0, 0.1, (1, 300))
    assert paired_randomisation(improved, base) < 0.001
    assert paired_randomisation(improved, rng.permuted(base, axis=1)) > 0.05


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == pytest.approx([1.0, 1.0])


def test_equivalence_has_three_answers():
    rng = generator("equivalence")
    values = rng.normal(0.3, 0.1, (1, 5000))
    assert equivalence(values, 0.3) == "equivalent"
    assert equivalence(values, 0.2) == "different"
    assert equivalence(values[:, :50], 0.3) == "undecided"


@pytest.mark.parametrize("values", [np.zeros(3), np.zeros((1, 0)), np.array([[np.nan, 1.0]])])
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match="seeds, users"):
        bootstrap_interval(values)


def test_different_users_cannot_be_paired():
    with pytest.raises(ValueError, match="same users: 3 and 4"):
        paired_randomisation(np.zeros((1, 3)), np.zeros((1, 4)))
