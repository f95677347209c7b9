"""Ranks by counting against brute force, and models that must not look good."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from textrec.evaluation.metrics import mean_metrics, per_user_metrics
from textrec.evaluation.ranking import Ranks, VectorScorer, rank_sampled, rank_targets, top_k
from textrec.seeding import generator


def seen_lists(lists):
    """Return a `seen` callable over one list of items per user."""
    lengths = np.array([len(items) for items in lists])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.array(list(itertools.chain(*lists)), dtype=np.int64)
    return lambda rows: (flat[ends[rows.start] : ends[rows.stop]], ends[rows.start : rows.stop + 1] - ends[rows.start])


def nothing_seen(rows):
    return np.zeros(0, dtype=np.int64), np.zeros(rows.stop - rows.start + 1, dtype=np.int64)


def rank_table(scores, targets, seen=nothing_seen, **options):
    scores = torch.as_tensor(scores)
    users = np.arange(len(scores))
    return rank_targets(
        lambda rows: scores[rows], users, np.asarray(targets), seen, num_items=scores.shape[1], **options
    )


@st.composite
def evaluations(draw):
    num_users, num_items = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    item = st.integers(1, num_items)
    scores = draw(
        st.lists(
            st.lists(st.integers(0, 2), min_size=num_items, max_size=num_items), min_size=num_users, max_size=num_users
        )
    )
    targets = draw(st.lists(item, min_size=num_users, max_size=num_users))
    seen = draw(st.lists(st.lists(item, max_size=6), min_size=num_users, max_size=num_users))
    return np.array(scores, dtype=np.float32), targets, seen, draw(st.integers(1, 4))


@settings(max_examples=60, deadline=None)
@given(evaluations())
def test_metrics_equal_the_mean_over_every_order_of_the_ties(evaluation):
    scores, targets, seen, block_users = evaluation
    ranks = rank_table(scores, targets, seen_lists(seen), block_users=block_users)
    for filtered, counts in ((True, ranks.filtered), (False, ranks.kept)):
        measured = {
            ties: per_user_metrics(counts, (1, 2, 3), ties) for ties in ("expected", "optimistic", "pessimistic")
        }
        for user, target in enumerate(targets):
            removed = set(seen[user]) - {target} if filtered else set()
            candidates = [item for item in range(1, scores.shape[1] + 1) if item not in removed]
            positions = [  # of the target in every order of the candidates that the scores allow
                order.index(target) + 1
                for order in itertools.permutations(candidates)
                if all(scores[user, a - 1] >= scores[user, b - 1] for a, b in itertools.pairwise(order))
            ]
            assert counts.candidates_U[user] == len(candidates)
            for ties, positions_of in (
                ("expected", positions),
                ("optimistic", [min(positions)]),
                ("pessimistic", [max(positions)]),
            ):
                positions_of = np.array(positions_of)
                for k in (1, 2, 3):
                    gains = (positions_of <= k) / np.log2(positions_of + 1)
                    assert measured[ties][f"recall@{k}"][user] == pytest.approx(np.mean(positions_of <= k))
                    assert measured[ties][f"ndcg@{k}"][user] == pytest.approx(gains.mean())
                assert measured[ties]["mrr"][user] == pytest.approx((1 / positions_of).mean())


def test_a_repeated_seen_item_is_removed_once_and_a_seen_target_stays():
    ranks = rank_table([[5.0, 4.0, 3.0, 3.0]], [3], seen_lists([[1, 1, 1, 3, 4, 4]]))
    assert (ranks.kept.higher_U[0], ranks.kept.ties_U[0], ranks.kept.candidates_U[0]) == (2, 1, 4)
    assert (ranks.filtered.higher_U[0], ranks.filtered.ties_U[0], ranks.filtered.candidates_U[0]) == (1, 0, 2)


def equal_vectors(num_users, num_items, width=50):
    rng = generator("equal vectors")
    vectors = torch.from_numpy(rng.normal(size=(1, width)).astype(np.float32)).repeat(num_items, 1)
    users = torch.from_numpy(rng.normal(size=(num_users, width)).astype(np.float32))
    return VectorScorer(lambda rows: users[rows], vectors)


@pytest.mark.parametrize("scorer", [lambda rows: torch.zeros(rows.stop - rows.start, 61), equal_vectors(300, 61)])
@pytest.mark.parametrize("block_users", [1, 7, None])
def test_a_model_without_opinions_gets_exactly_chance(scorer, block_users):
    targets = generator("targets").integers(1, 62, 300)
    counts = rank_targets(scorer, np.arange(300), targets, nothing_seen, num_items=61, block_users=block_users).filtered
    assert mean_metrics(counts)["recall@10"] == pytest.approx(10 / 61, abs=1e-12)
    assert mean_metrics(counts, ties="pessimistic")["recall@10"] == 0
    assert mean_metrics(counts, ties="optimistic")["recall@10"] == 1  # what an evaluation without tie rule may report


def test_equal_vectors_tie_beside_different_ones():
    rng = generator("pairs")
    half = torch.from_numpy(rng.normal(size=(40, 50)).astype(np.float32))
    users = torch.from_numpy(rng.normal(size=(30, 50)).astype(np.float32))
    scorer = VectorScorer(lambda rows: users[rows], torch.cat([half, half, torch.zeros(1, 50), -torch.zeros(1, 50)]))
    ranks = rank_targets(scorer, np.arange(30), rng.integers(1, 83, 30), nothing_seen, num_items=82)
    assert (ranks.kept.ties_U == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_score_names_the_user(bad):
    scores = torch.zeros(5, 4)
    scores[3, 1] = bad
    with pytest.raises(ValueError, match="user 13 .* item 2"):
        rank_targets(lambda rows: scores[rows], np.arange(10, 15), np.ones(5), nothing_seen, num_items=4, block_users=2)
    vectors = VectorScorer(lambda rows: scores[rows], torch.eye(4))
    with pytest.raises(ValueError, match="user 13"):
        rank_targets(vectors, np.arange(10, 15), np.ones(5), nothing_seen, num_items=4)


def test_huge_finite_scores_are_not_mistaken_for_infinite_ones():
    assert rank_table([[3e38, 3e38, 1e38]], [3]).kept.higher_U[0] == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"targets": [4]}, "user 0 has target 4, expected 1..3"),
        ({"targets": [0]}, "user 0 has target 0, expected 1..3"),
        ({"targets": [1, 2]}, "1 users but 2 targets"),
        ({"seen": seen_lists([[7]])}, "seen item"),
    ],
)
def test_impossible_input_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        rank_table(**({"scores": [[1.0, 2.0, 3.0]], "targets": [1]} | changes))


@pytest.mark.parametrize(
    "scorer",
    [
        lambda rows: torch.zeros(1, 4),
        VectorScorer(lambda rows: torch.zeros(1, 2), torch.zeros(4, 2)),
        VectorScorer(lambda rows: torch.zeros(2, 2), torch.zeros(3, 2)),
    ],
)
def test_a_padding_row_or_a_missing_user_is_refused(scorer):
    with pytest.raises(ValueError, match="expected .* the padding row is no item"):
        rank_targets(scorer, np.arange(1), np.ones(1), nothing_seen, num_items=3)


def test_a_catalogue_too_large_for_exact_sums_is_refused():
    with pytest.raises(ValueError, match="num_items=16777216, expected less"):
        rank_targets(lambda rows: None, np.arange(1), np.ones(1), nothing_seen, num_items=2**24)


@pytest.mark.gpu
def test_a_gpu_counts_like_a_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rng = generator("gpu")
    users = torch.from_numpy(rng.integers(-3, 4, (3000, 8)).astype(np.float32))  # whole numbers: exact on both
    items = torch.from_numpy(rng.integers(-3, 4, (700, 8)).astype(np.float32))
    targets, seen = rng.integers(1, 701, 3000), seen_lists([list(rng.integers(1, 701, 20)) for _ in range(3000)])
    on_cpu, on_gpu = (
        rank_targets(
            VectorScorer(lambda rows: users[rows], items.to(device)), np.arange(3000), targets, seen, num_items=700
        )
        for device in ("cpu", "cuda")
    )
    for rule in ("filtered", "kept"):
        for name, values in vars(getattr(on_cpu, rule)).items():
            assert np.array_equal(getattr(getattr(on_gpu, rule), name), values)


def test_the_place_of_the_target_in_the_list_does_not_matter():
    rng = generator("places")
    scores = rng.integers(0, 9, (200, 30)).astype(np.float32)
    targets = rng.integers(1, 31, 200)
    order = rng.permutation(30)
    moved = np.argsort(order)[targets - 1] + 1
    first, second = rank_table(scores, targets), rank_table(scores[:, order], moved)
    assert np.array_equal(first.kept.higher_U, second.kept.higher_U)
    assert np.array_equal(first.kept.ties_U, second.kept.ties_U)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_every_block_size_gives_the_same_counts(dtype):
    rng = generator("dtypes")
    scores = torch.from_numpy(rng.integers(-50, 50, (37, 23))).to(dtype)
    targets, seen = (
        rng.integers(1, 24, 37),
        seen_lists([list(rng.integers(1, 24, rng.integers(0, 9))) for _ in range(37)]),
    )
    expected = rank_table(scores.double(), targets, seen, block_users=37)
    for block_users in (1, 5, 37, 100):
        ranks = rank_table(scores, targets, seen, block_users=block_users)
        for rule in ("filtered", "kept"):
            for name, values in vars(getattr(expected, rule)).items():
                assert np.array_equal(getattr(getattr(ranks, rule), name), values)


def test_half_precision_vectors_are_multiplied_in_single():
    vectors = torch.tensor([[1.0, 2.0**-9], [1.0, 0.0]], dtype=torch.float16)
    scorer = VectorScorer(lambda rows: torch.tensor([[1.0, 2.0**-3]], dtype=torch.float16), vectors)
    assert rank_targets(scorer, np.arange(1), np.array([2]), nothing_seen, num_items=2).kept.higher_U[0] == 1
    assert (
        vectors @ torch.tensor([1.0, 2.0**-3], dtype=torch.float16)
    ).unique().numel() == 1  # a tie in half precision


def test_vectors_and_their_products_rank_alike():
    rng = generator("products")
    users, items = torch.from_numpy(rng.normal(size=(50, 8))), torch.from_numpy(rng.normal(size=(40, 8)))
    targets = rng.integers(1, 41, 50)
    by_vectors = rank_targets(
        VectorScorer(lambda rows: users[rows], items), np.arange(50), targets, nothing_seen, num_items=40
    )
    assert np.array_equal(by_vectors.kept.higher_U, rank_table(users @ items.T, targets).kept.higher_U)
    shuffled = rank_table((users @ items.T)[torch.from_numpy(rng.permutation(50))], targets)
    assert not np.array_equal(by_vectors.kept.higher_U, shuffled.kept.higher_U)  # the comparison above can fail


def test_the_scorer_is_asked_once_per_user():
    asked = []

    def scorer(rows):
        asked.extend(range(rows.start, rows.stop))
        return torch.zeros(rows.stop - rows.start, 3)

    rank_targets(scorer, np.arange(11), np.ones(11), nothing_seen, num_items=3, block_users=4)
    assert asked == list(range(11))


def test_memory_does_not_grow_with_the_number_of_users():
    items = torch.from_numpy(generator("memory").normal(size=(2000, 16)).astype(np.float32))

    def peak(num_users):
        biggest = 0

        def users(rows):
            nonlocal biggest
            biggest = max(biggest, rows.stop - rows.start)
            return torch.ones(rows.stop - rows.start, 16)

        targets = np.ones(num_users, dtype=np.int64)
        tracemalloc.start()
        rank_targets(VectorScorer(users, items), np.arange(num_users), targets, nothing_seen, num_items=2000)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return biggest, traced / num_users

    small, large = peak(2_000), peak(20_000)
    assert large[0] == small[0] <= 256  # torch's blocks
    assert large[1] < 160  # bytes per user that stay: five counts, the result and its arguments


def test_sampled_ranking_counts_draws_and_skips_the_filling():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    candidates = np.array([[1, 1, 4, 2, 0, 0]])  # item 1 drawn twice, the target (2) drawn as well
    counts = rank_sampled(lambda rows: scores[rows], np.arange(1), np.array([2]), candidates, num_items=4)
    assert (counts.higher_U[0], counts.ties_U[0], counts.candidates_U[0]) == (2, 1, 5)


def test_sampled_ranking_of_the_whole_catalogue_is_full_ranking():
    rng = generator("whole catalogue")
    scores, targets = rng.integers(0, 5, (20, 9)).astype(np.float32), rng.integers(1, 10, 20)
    others = np.array([[item for item in range(1, 10) if item != target] for target in targets])
    sampled = rank_sampled(lambda rows: torch.from_numpy(scores[rows]), np.arange(20), targets, others, num_items=9)
    full = rank_table(scores, targets).kept
    for name, values in vars(full).items():
        assert np.array_equal(getattr(sampled, name), values)


def test_a_random_scorer_reaches_the_chance_of_100_negatives():
    rng = generator("chance")
    scores = torch.from_numpy(rng.random((20_000, 101), dtype=np.float32))
    negatives = np.tile(np.arange(2, 102), (20_000, 1))
    counts = rank_sampled(lambda rows: scores[rows], np.arange(20_000), np.ones(20_000), negatives, num_items=101)
    metrics = mean_metrics(counts)
    assert metrics["recall@10"] == pytest.approx(0.099, abs=0.006)  # 10 / 101
    assert metrics["ndcg@10"] == pytest.approx(0.045, abs=0.004)


def test_top_k_leaves_out_what_was_seen():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    lists = top_k(lambda rows: scores[rows], np.arange(2), seen_lists([[4], [1, 2, 3]]), 2, num_items=4, block_users=1)
    assert lists.tolist() == [[3, 2], [4, 0]]
    assert scores[0, 3] == 4  # the scorer's own table is not written to


def test_ranks_survive_the_disk_and_slices_are_reread(tmp_path):
    ranks = rank_table([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], [1, 1], seen_lists([[3], []]))
    ranks.save(tmp_path / "ranks.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["ranks.parquet"]
    loaded = Ranks.load(tmp_path / "ranks.parquet")
    for rule in ("filtered", "kept"):
        for name, values in vars(getattr(ranks, rule)).items():
            assert np.array_equal(getattr(getattr(loaded, rule), name), values)
    second = loaded.subset(np.array([False, True]))
    assert (second.users_U.tolist(), second.filtered.higher_U.tolist()) == ([1], [0])
