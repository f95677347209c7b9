"""The planted distribution, its enumerated optimum, and count-based readers that reach it or cannot."""

from dataclasses import replace

import numpy as np
import pytest

from textrec.data.preparing import prepare
from textrec.data.sources.synthetic import (
    State,
    SyntheticConfig,
    SyntheticSet,
    Truth,
    expected_metrics,
    generate,
    next_probabilities,
    read,
    test_probabilities,
)
from textrec.schema import InputError

NO_SIGNAL = SyntheticConfig(
    num_cold_items=0, num_clusters=1, order_strength=0, text_strength=0, time_strength=0, cold_share=0, repeats=True
)
TOY_TRUTH = Truth(  # items 1..6 as columns 0..5; item 6 is cold
    cluster_I=np.array([0, 0, 0, 1, 1, 0]),
    cold_I=np.array([False, False, False, False, False, True]),
    time_group_I=np.array([0, 1, 0, 1, 1, 0]),
    successor_KI=np.array([[1, 2, 3, 4, 0, 0], [4, 4, 4, 0, 0, 0]]),
)
TOY = SyntheticConfig(
    num_users=1, num_items=6, num_cold_items=1, num_clusters=1, min_length=3, max_length=4, num_time_buckets=2,
    order_strength=0.4, text_strength=0.3, time_strength=0.2, cold_share=0.25,
)  # fmt: skip


def toy_state(last: int, before: int, seen: list[int], bucket: int = 1) -> State:
    seen_UI = np.zeros((1, 6), dtype=bool)
    seen_UI[0, seen] = True
    return State(np.array([last]), np.array([before]), np.array([bucket]), seen_UI)


def test_next_item_follows_the_mixture_written_by_hand():
    # successor of item 1 is item 2 (.4), cluster 0 is items 1-3 (.1 each), bucket 1 is items 2, 4, 5 (.2 / 3), rest .02
    with_repeats = next_probabilities(replace(TOY, repeats=True), TOY_TRUTH, toy_state(0, 0, [0]))
    third = 0.2 / 3
    expected = np.array([0.1 + 0.02, 0.4 + 0.1 + third + 0.02, 0.1 + 0.02, third + 0.02, third + 0.02, 0])
    assert with_repeats[0] == pytest.approx(expected)
    expected[0] = 0
    without = next_probabilities(TOY, TOY_TRUTH, toy_state(0, 0, [0]))
    assert without[0] == pytest.approx(expected / expected.sum())


def test_the_item_before_last_matters_in_order_2_only():
    state = toy_state(0, 1, [0, 1])
    assert next_probabilities(replace(TOY, order=2), TOY_TRUTH, state)[0].argmax() == 4  # row 1 sends item 1 to item 5
    assert next_probabilities(replace(TOY, repeats=True), TOY_TRUTH, state)[0].argmax() == 1


def test_cold_targets_take_their_share_and_only_at_the_test_step():
    probabilities = test_probabilities(TOY, TOY_TRUTH, toy_state(0, 0, [0]))[0]
    assert probabilities[5] == pytest.approx(0.25)
    assert probabilities.sum() == pytest.approx(1)
    assert next_probabilities(TOY, TOY_TRUTH, toy_state(0, 0, [0]))[0, 5] == 0


def test_full_strength_leaves_something_to_draw_when_all_planted_items_were_seen():
    config = replace(TOY, order_strength=1.0, text_strength=0, time_strength=0)
    assert next_probabilities(config, TOY_TRUTH, toy_state(0, 0, [0, 1]))[0] == pytest.approx(
        [0, 0, 1 / 3, 1 / 3, 1 / 3, 0]
    )


def test_expected_metrics_equal_a_plain_enumeration_over_targets_and_tie_orders():
    random = np.random.default_rng(0)
    chances = random.dirichlet(np.ones(5), size=3)
    scores = random.integers(0, 3, size=(3, 5)).astype(float)
    removed = random.random((3, 5)) < 0.4
    levels = expected_metrics(chances, scores, removed, np.ones(5, bool))
    recall = mrr = 0.0
    for user in range(3):
        for target in range(5):
            rivals = [scores[user, j] for j in range(5) if j != target and not removed[user, j]]
            above = sum(score > scores[user, target] for score in rivals)
            ranks = range(above + 1, above + 2 + rivals.count(scores[user, target]))
            recall += chances[user, target] * np.mean([rank <= 1 for rank in ranks]) / 3
            mrr += chances[user, target] * np.mean([1 / rank for rank in ranks]) / 3
    assert levels["recall@1"].value == pytest.approx(recall)
    assert levels["mrr"].value == pytest.approx(mrr)


def test_histories_obey_the_configuration():
    made = generate(SyntheticConfig())
    cold = set((np.flatnonzero(made.truth.cold_I) + 1).tolist())
    assert len(cold) == 6
    assert set(range(1, 61)) - set(np.unique(made.items_E)) <= cold
    for start, end in zip(made.offsets_U1, made.offsets_U1[1:], strict=False):
        items, times = made.items_E[start:end].tolist(), made.times_E[start:end]
        assert 8 <= len(items) <= 20
        assert len(set(items)) == len(items)
        assert (np.diff(times) > 0).all()
        assert not cold & set(items[:-1])


def test_same_seed_same_arrays_and_other_seed_other_arrays():
    first, second, other = (generate(SyntheticConfig(seed=seed)) for seed in (3, 3, 4))
    assert first.interactions().equals(second.interactions())
    assert first.items().equals(second.items())
    assert not np.array_equal(first.items_E[:50], other.items_E[:50])


def test_text_tells_the_cluster_and_titles_are_unique():
    made = generate(SyntheticConfig(num_clusters=6))
    items = made.items()
    assert items["title"].is_unique
    assert len(set(zip(items["brand"], made.truth.cluster_I, strict=True))) == 6
    assert all(row.brand in row.title for row in items.itertuples())


def test_drawn_targets_score_what_the_enumeration_promises():
    made = generate(SyntheticConfig(num_users=4_000, seed=1))
    for reader, scores in {"full": made.probabilities_UI, "constant": np.zeros_like(made.probabilities_UI)}.items():
        level = made.optimum["chance" if reader == "constant" else reader]["filtered"]["recall@10"]
        assert hit_rate(made, scores, 10) == pytest.approx(level.value, abs=4 * level.standard_error)


def test_optimum_orders_the_readers():
    optimum = generate(SyntheticConfig(num_users=500)).optimum
    at_10 = {reader: rankings["filtered"]["ndcg@10"].value for reader, rankings in optimum.items()}
    assert at_10["full"] > at_10["time_blind"] > at_10["id"] > 3 * at_10["chance"]
    assert at_10["full"] > at_10["text_blind"] > at_10["id"]
    assert optimum["full"]["cold"]["recall@10"].value > 0.7
    assert optimum["id"]["cold"]["recall@10"].value == 0
    assert optimum["full"]["kept"] == optimum["full"]["filtered"]  # nothing repeats and the reader knows it


def test_counting_reaches_the_optimum_of_an_id_model_and_shuffled_histories_do_not():
    made = generate(SyntheticConfig(num_users=3_000))
    level = made.optimum["id"]["filtered"]["recall@1"]
    scores = transition_scores(made)
    in_order = hit_rate(made, scores, 1)
    assert made.levels(scores)["filtered"]["ndcg@10"].value == pytest.approx(
        made.optimum["id"]["filtered"]["ndcg@10"].value, rel=0.01
    )
    shuffled = hit_rate(made, transition_scores(made, shuffled=True), 1)
    assert in_order == pytest.approx(level.value, abs=4 * level.standard_error)
    assert shuffled < 0.5 * level.value


def test_nobody_learns_the_unlearnable_twin():
    made = generate(SyntheticConfig(num_users=3_000, unlearnable=True))
    candidates = 60 - (np.diff(made.offsets_U1) - 1)
    for reader in ("full", "chance"):
        assert made.optimum[reader]["filtered"]["recall@10"].value == pytest.approx(np.mean(10 / candidates))
    level = made.optimum["chance"]["filtered"]["recall@10"]
    assert hit_rate(made, transition_scores(made), 10) <= level.value + 3 * level.standard_error


def order2_markov(
    num_users: int, *, num_items: int = 50, strength: float = 0.9, length: int = 50, seed: int = 0
) -> SyntheticSet:
    """Generate histories whose next item the last two determine with probability `strength`; no other signal."""
    size = {"num_users": num_users, "num_items": num_items, "min_length": length, "max_length": length}
    return generate(replace(NO_SIGNAL, **size, order=2, order_strength=strength, seed=seed))


def elapsed_time_corpus(
    num_users: int, *, num_buckets: int = 8, strength: float = 0.9, length: int = 50, gap: str = "target", seed: int = 0
) -> SyntheticSet:
    """Generate histories over one item per bucket of elapsed time; the bucket names the next item with `strength`."""
    size = {"num_users": num_users, "num_items": num_buckets, "min_length": length, "max_length": length}
    planted = {"time_strength": strength, "time_gap": gap, "num_time_buckets": num_buckets}
    return generate(replace(NO_SIGNAL, **size, **planted, seed=seed))


def test_order_2_needs_the_last_two_items_in_order():
    made = order2_markov(1_500, length=40)
    counted = np.zeros((50, 50, 50))
    histories = made.items_E.reshape(1_500, 40) - 1
    np.add.at(counted, (histories[:, :-3], histories[:, 1:-2], histories[:, 2:-1]), 1)
    targets = histories[:, -1]
    assert (counted[histories[:, -3], histories[:, -2]].argmax(1) == targets).mean() >= 0.85
    assert (counted.sum(0)[histories[:, -2]].argmax(1) == targets).mean() <= 0.35
    assert (counted.sum((0, 1)).argmax() == targets).mean() <= 0.1
    assert made.optimum["full"]["kept"]["recall@1"].value == pytest.approx(0.902)  # .9 and a fiftieth of the rest


@pytest.mark.parametrize("gap", ["target", "history"])
def test_elapsed_time_alone_names_the_next_item(gap):
    made = elapsed_time_corpus(500, length=20, gap=gap)
    items, times = made.items_E.reshape(500, 20) - 1, made.times_E.reshape(500, 20)
    buckets = np.log(np.diff(times) / 60) // np.log(4)  # bucket b lasts 60 * 4 ** b seconds to twice that
    read_at = buckets[:, -1] if gap == "target" else buckets[:, -2]
    assert (made.truth.time_group_I[items[:, -1]] == read_at).mean() >= 0.85
    assert made.optimum["full"]["kept"]["recall@1"].value == pytest.approx(0.9 + 0.1 / 8)
    assert made.optimum["time_blind"]["kept"]["recall@1"].value == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    "wrong", [{"order": 3}, {"order_strength": 0.9}, {"max_length": 60}, {"min_length": 2}, {"time_gap": "now"}]
)
def test_impossible_configurations_are_refused(wrong):
    with pytest.raises(InputError, match=str(next(iter(wrong.values())))):
        SyntheticConfig(**wrong)


def test_source_yields_the_generated_tables():
    duckdb = pytest.importorskip("duckdb")
    connection = duckdb.connect()
    tables = read(connection, {}, num_users=20)
    made = generate(SyntheticConfig(num_users=20))
    rows = connection.execute(tables.interactions).fetchall()
    assert [row[:3] for row in rows] == list(
        made.interactions()[["user", "item", "time"]].itertuples(index=False, name=None)
    )
    assert connection.execute(f"SELECT count(*) FROM ({tables.items})").fetchone() == (60,)


def test_prepared_ids_are_those_of_the_generated_set(tmp_path):
    prepared = prepare("synthetic", processed=tmp_path)
    made = generate(SyntheticConfig(**prepared.details["options"]))
    assert prepared.num_items == made.config.num_items
    assert np.array_equal(prepared.histories.items_E, made.items_E)
    assert np.array_equal(prepared.histories.times_E, made.times_E)
    assert np.array_equal(prepared.histories.offsets_U1, made.offsets_U1)
    assert np.array_equal(prepared.split.test_target_U, np.diff(made.offsets_U1) - 1)
    assert prepared.catalogue["title"].tolist() == made.items()["title"].tolist()


def hit_rate(made: SyntheticSet, scores_UI: np.ndarray, k: int) -> float:
    """Rank the drawn targets among the items the user has not had, ties broken at random."""
    noise = np.random.default_rng(1).random(scores_UI.shape) * 1e-9
    scores = np.where(made.state.seen_UI, -np.inf, scores_UI + noise)
    targets = made.items_E[made.offsets_U1[1:] - 1] - 1
    return ((scores > scores[np.arange(len(targets)), targets][:, None]).sum(1) < k).mean()


def transition_scores(made: SyntheticSet, shuffled: bool = False) -> np.ndarray:
    """Estimate p(next | last) by counting all but the test targets: pairs seen, over chances they had."""
    random = np.random.default_rng(0)
    num_items = made.config.num_items
    taken, open_to, last_U = np.zeros((num_items, num_items)), np.ones((num_items, num_items)), []
    for start, end in zip(made.offsets_U1, made.offsets_U1[1:], strict=False):
        history = made.items_E[start : end - 1] - 1
        history = random.permutation(history) if shuffled else history
        unseen = np.ones(num_items)
        for last, following in zip(history, history[1:], strict=False):
            unseen[last] = 0
            taken[last, following] += 1
            open_to[last] += unseen
        last_U.append(history[-1])
    return (taken / open_to)[last_U]
