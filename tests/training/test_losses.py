"""Our losses against torch's, hand arithmetic and the published formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from textrec.models.mixture_of_logits import MixtureOfLogits, MixtureOfLogitsConfig
from textrec.training import losses

T, I, D = 150, 23, 6  # noqa: E741 - positions, rows of the output table, width


@pytest.fixture
def tensors():
    """Random states, an output table and targets, in float64 and asking for gradients."""
    source = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(T, D, generator=source, dtype=torch.float64, requires_grad=True)
    items_ID = torch.randn(I, D, generator=source, dtype=torch.float64, requires_grad=True)
    targets_T = torch.randint(1, I, (T,), generator=source)
    return hidden_TD, items_ID, targets_T


@pytest.fixture(params=[None, 64 * I], ids=["one block", "many blocks"])
def block_numbers(request, monkeypatch):
    """Let the blocked functions run in one block and in several."""
    if request.param:
        monkeypatch.setattr(losses, "BLOCK_NUMBERS", request.param)


def values_and_gradients(function, *inputs):
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value.sum(), [i for i in inputs if i.requires_grad])]


def cross_entropy(hidden_TD, items_ID, targets_T):
    return F.cross_entropy(hidden_TD @ items_ID[1:].T, targets_T - 1, reduction="sum")


def others(targets_T):
    """All items but the target of each row: [T, I - 2]."""
    return torch.stack([torch.tensor([i for i in range(1, I) if i != t]) for t in targets_T.tolist()])


def test_full_softmax_is_torchs_cross_entropy(tensors, block_numbers):
    hidden_TD, items_ID, targets_T = tensors
    ours = values_and_gradients(lambda h, e: losses.full_softmax(h, e, targets_T), hidden_TD, items_ID)
    theirs = values_and_gradients(lambda h, e: cross_entropy(h, e, targets_T), hidden_TD, items_ID)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert (ours[2][0] == 0).all()  # the padding row is no class


def test_full_softmax_has_the_gradient_of_its_value(tensors):
    hidden_TD, items_ID, targets_T = tensors
    few_TD = hidden_TD[:5].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, e: 3 * losses.full_softmax(h, e, targets_T[:5]), (few_TD, items_ID))


@pytest.mark.parametrize("frozen", [False, True])
def test_full_softmax_under_autocast_rounds_its_products_and_nothing_else(tensors, block_numbers, frozen):
    hidden_TD, items_ID, targets_T = (each.detach().float() if each.is_floating_point() else each for each in tensors)
    hidden_TD.requires_grad_()
    items_ID.requires_grad_(not frozen)
    inputs = (hidden_TD,) if frozen else (hidden_TD, items_ID)
    results = []
    for kind in (None, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
            value = losses.full_softmax(hidden_TD, items_ID, targets_T)
        results.append([value.detach(), *torch.autograd.grad(value, inputs)])
    exact, half, rounded = results
    assert all(torch.equal(*pair) for pair in zip(exact, half, strict=True))  # fp16 would overflow: it is not used
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32 and 0 < (other - one).norm() < 1e-2 * one.norm()
    factors = [each.detach().bfloat16().float() for each in (hidden_TD, items_ID)]
    scores_TI = (factors[0] @ factors[1][1:].T).bfloat16().float()
    wanted = F.cross_entropy(scores_TI, targets_T - 1, reduction="sum")
    torch.testing.assert_close(rounded[0], wanted, rtol=1e-5, atol=1e-5)


def test_full_softmax_over_drawn_items_is_torchs_over_them_and_the_target(tensors, block_numbers):
    hidden_TD, items_ID, targets_T = tensors
    rows_T, drawn_BI = torch.arange(T) % 4, torch.rand(4, I, generator=torch.Generator().manual_seed(1)) < 0.3
    allowed_TI = drawn_BI[rows_T].scatter(1, targets_T[:, None], True)

    def reference(h, e):
        scores_TI = (h @ e[1:].T).masked_fill(~allowed_TI[:, 1:], -torch.inf)
        return F.cross_entropy(scores_TI, targets_T - 1, reduction="sum")

    ours = values_and_gradients(
        lambda h, e: losses.full_softmax(h, e, targets_T, drawn_BI, rows_T), hidden_TD, items_ID
    )
    torch.testing.assert_close(ours, values_and_gradients(reference, hidden_TD, items_ID), rtol=1e-12, atol=1e-12)
    assert ours[0] < losses.full_softmax(hidden_TD, items_ID, targets_T) - 1  # fewer to beat


def test_full_softmax_over_a_frozen_table_has_the_same_gradient_of_states(tensors):
    hidden_TD, items_ID, targets_T = tensors[:3]
    states_TD = hidden_TD.detach().requires_grad_()
    both, alone = (
        torch.autograd.grad(losses.full_softmax(states_TD, table_ID, targets_T), states_TD)[0]
        for table_ID in (items_ID.detach().requires_grad_(), items_ID.detach())
    )
    assert torch.equal(both, alone) and both.any()
    table_ID = items_ID.detach().requires_grad_()
    losses.full_softmax(states_TD.detach(), table_ID, targets_T).backward()
    assert table_ID.grad.any()


def test_full_softmax_survives_large_scores(tensors):
    hidden_TD, items_ID, targets_T = (tensors[0].float() * 300).detach(), tensors[1].float().detach(), tensors[2]
    expected = cross_entropy(hidden_TD.double(), items_ID.double(), targets_T)
    assert losses.full_softmax(hidden_TD, items_ID, targets_T).item() == pytest.approx(expected.item(), rel=1e-5)


def test_full_softmax_of_no_positions_is_zero(tensors):
    hidden_TD, items_ID, targets_T = tensors
    total = losses.full_softmax(hidden_TD[:0], items_ID, targets_T[:0])
    total.backward()
    assert total.item() == 0 and (items_ID.grad == 0).all()


def test_full_softmax_is_moved_by_the_target(tensors):
    hidden_TD, items_ID, targets_T = tensors
    shuffled_T = targets_T.roll(1)
    assert losses.full_softmax(hidden_TD, items_ID, targets_T) != losses.full_softmax(hidden_TD, items_ID, shuffled_T)


def test_sampled_softmax_with_all_others_is_full_softmax(tensors):
    hidden_TD, items_ID, targets_T = tensors
    expected = values_and_gradients(lambda h, e: cross_entropy(h, e, targets_T), hidden_TD, items_ID)
    for negatives in (others(targets_T), torch.arange(1, I)):  # per position; shared, where the target collides
        ours = values_and_gradients(
            lambda h, e, n=negatives: losses.sampled_softmax(h, e, targets_T, n), hidden_TD, items_ID
        )
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_a_negative_equal_to_the_target_changes_nothing(tensors):
    hidden_TD, items_ID, targets_T = tensors
    negatives_TN = others(targets_T)[:, :3]
    colliding_TN = torch.cat([negatives_TN, targets_T[:, None]], 1)
    arguments = hidden_TD, items_ID, targets_T
    without = losses.sampled_softmax(*arguments, negatives_TN)
    torch.testing.assert_close(losses.sampled_softmax(*arguments, colliding_TN), without)
    assert losses.sampled_softmax(*arguments, others(targets_T)[:, :4]) > without  # any other negative does
    alone = values_and_gradients(
        lambda h, e: losses.sampled_softmax(h, e, targets_T, targets_T[:, None]), hidden_TD, items_ID
    )
    assert all((each == 0).all() for each in alone)  # nothing but collisions: no loss, no gradient, no NaN


def test_logq_correction_by_hand():
    hidden_TD = torch.tensor([[1.0, 0.0]])
    items_ID = torch.tensor([[0.0, 0.0], [2.0, 0.0], [1.0, 5.0], [-1.0, 0.0]])  # scores 2, 1, -1
    log_counts = torch.tensor([0.0, 0.5, 1.5, 0.25])
    loss = losses.sampled_softmax(hidden_TD, items_ID, torch.tensor([1]), torch.tensor([2, 3]), log_counts)
    terms = [2, 1 - 1.5, -1 - 0.25]  # the target is no draw: its score is not corrected
    assert loss.item() == pytest.approx(math.log(sum(map(math.exp, terms))) - 2, rel=1e-5)


def test_logq_correction_makes_many_negatives_the_full_softmax():
    source = torch.Generator().manual_seed(1)
    scores_I = torch.randn(I - 1, generator=source, dtype=torch.float64)
    probability_I = torch.softmax(scores_I, 0)  # frequent items score high: uncorrected negatives are too hard
    num_negatives, hidden_TD = 200_000, torch.ones(1, 1, dtype=torch.float64)
    items_ID = torch.cat([torch.zeros(1, dtype=torch.float64), scores_I])[:, None]
    negatives_N = torch.multinomial(probability_I, num_negatives, replacement=True, generator=source) + 1
    log_counts_I = torch.cat([torch.zeros(1, dtype=torch.float64), (probability_I * num_negatives).log()])
    target_T = torch.tensor([4])
    full = cross_entropy(hidden_TD, items_ID, target_T).item()
    corrected = losses.sampled_softmax(hidden_TD, items_ID, target_T, negatives_N, log_counts_I).item()
    assert corrected == pytest.approx(full, abs=0.01)
    uniform = torch.full_like(log_counts_I, math.log(num_negatives / (I - 1)))  # as if the draws were not skewed
    wrong = losses.sampled_softmax(hidden_TD, items_ID, target_T, negatives_N, uniform).item()
    assert wrong > full + 0.1


def test_uniform_log_probability_is_the_expected_count():
    log_counts = losses.uniform_log_probability(50, 200)
    assert len(log_counts) == 51 and log_counts.exp() == pytest.approx([4.0] * 51)


def published_gbce(raw_TN, calibration: float, num_negatives: int, num_items: int):
    """The positive score mapped by log(1 / (sigmoid^-beta - 1)) with the published clamps, then plain cross-entropy."""
    alpha = num_negatives / (num_items - 1)
    beta = alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
    eps = 1e-10
    powered_T = torch.sigmoid(raw_TN[:, 0].double()).clamp(eps, 1 - eps) ** -beta
    mapped_T = -torch.log(powered_T.clamp(1 + eps) - 1)
    truth_TN = torch.zeros_like(raw_TN)
    truth_TN[:, 0] = 1
    mapped_TN = torch.cat([mapped_T[:, None], raw_TN[:, 1:]], 1)
    return F.binary_cross_entropy_with_logits(mapped_TN, truth_TN, reduction="none").mean(1).sum()


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("num_negatives", [1, 7])
def test_gbce_is_the_published_transform(tensors, calibration, num_negatives):
    hidden_TD, items_ID, targets_T = tensors
    negatives_TN = others(targets_T)[:, :num_negatives]
    picked_TN = torch.cat([targets_T[:, None], negatives_TN], 1)

    def published(h, e):
        raw_TN = torch.einsum("td,tnd->tn", h, e[picked_TN])
        return published_gbce(raw_TN, calibration, num_negatives, I - 1)

    near = hidden_TD.detach().mul(0.5).requires_grad_()  # scores within the range where the published map is exact
    assert (near @ items_ID.T).abs().max() < 10
    ours = values_and_gradients(lambda h, e: losses.gbce(h, e, targets_T, negatives_TN, calibration), near, items_ID)
    torch.testing.assert_close(ours, values_and_gradients(published, near, items_ID), rtol=1e-6, atol=1e-6)


def test_gbce_without_calibration_is_binary_cross_entropy(tensors):
    hidden_TD, items_ID, targets_T = tensors
    negatives_TN = others(targets_T)[:, :4]
    scores_TN = torch.einsum("td,tnd->tn", hidden_TD, items_ID[torch.cat([targets_T[:, None], negatives_TN], 1)])
    truth_TN = torch.zeros_like(scores_TN)
    truth_TN[:, 0] = 1
    expected = F.binary_cross_entropy_with_logits(scores_TN, truth_TN, reduction="none").mean(1).sum()
    torch.testing.assert_close(losses.gbce(hidden_TD, items_ID, targets_T, negatives_TN), expected)
    assert losses.gbce(hidden_TD, items_ID, targets_T, negatives_TN, 0.75) < expected  # beta below 1


def test_gbce_by_hand():
    hidden_TD, items_ID = torch.tensor([[1.0]]), torch.tensor([[0.0], [2.0], [-1.0], [0.5], [3.0], [1.0]])
    loss = losses.gbce(hidden_TD, items_ID, torch.tensor([1]), torch.tensor([[2, 3]]), 0.75)
    beta = 1 - 0.75 * (1 - 2 / 4)  # two negatives out of four other items
    terms = [beta * math.log1p(math.exp(-2)), math.log1p(math.exp(-1)), math.log1p(math.exp(0.5))]
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-6)


def test_gbce_still_learns_where_the_published_transform_is_frozen():
    items_ID = torch.tensor([[0.0], [1.0], [0.0], [0.0], [0.0]], dtype=torch.float64)
    for score, function in (
        (30.0, lambda h: losses.gbce(h, items_ID, torch.tensor([1]), torch.tensor([[2]]), 0.75)),
        (30.0, lambda h: published_gbce(h @ items_ID[[1, 2]].T, 0.75, 1, 4)),
    ):
        hidden_TD = torch.tensor([[score]], dtype=torch.float64, requires_grad=True)
        function(hidden_TD).backward()
        frozen = function(hidden_TD) != losses.gbce(hidden_TD, items_ID, torch.tensor([1]), torch.tensor([[2]]), 0.75)
        assert (hidden_TD.grad.item() == 0) == bool(frozen)


WAYS = {"whichever": losses.picked_scores, "sparse": losses._SparseScores.apply, "blocks": losses._PickedScores.apply}


@pytest.mark.parametrize(
    ("name", "num_picks"), [(n, k) for n in WAYS for k in (1, 5, I + 5) if (n, k) != ("sparse", I + 5)]
)
def test_picked_scores_equal_the_gathered_product(tensors, block_numbers, name, num_picks):
    (hidden_TD, items_ID, _), way = tensors, WAYS[name]
    source = torch.Generator().manual_seed(2)
    picks_TN = torch.randint(1, I, (T, num_picks), generator=source)
    picks_TN[:, -1] = picks_TN[:, 0]  # the same item twice in a row: its gradients add up
    weights_TN = torch.randn(T, num_picks, generator=source, dtype=torch.float64)

    def ours(h, e):
        return way(h, e, picks_TN) * weights_TN

    def gathered(h, e):
        return (h @ e.T).gather(1, picks_TN) * weights_TN

    expected = values_and_gradients(gathered, hidden_TD, items_ID)
    torch.testing.assert_close(values_and_gradients(ours, hidden_TD, items_ID), expected, rtol=1e-12, atol=1e-12)
    few_TD = hidden_TD[:4].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda h, e: way(h, e, picks_TN[:4]), (few_TD, items_ID))


@pytest.mark.parametrize("num_targets", [0, 3])
def test_positions_without_a_negative_that_counts_cost_nothing(num_targets):
    hidden_TD, items_ID = torch.randn(num_targets, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    targets_T = torch.arange(1, num_targets + 1)
    loss = losses.sampled_softmax(hidden_TD, items_ID, targets_T, targets_T[:, None].repeat(1, 2))
    loss.backward()
    assert loss.item() == 0 and not hidden_TD.grad.any() and not items_ID.grad.any()


@pytest.mark.parametrize("block", [None, 64 * 16 * 4], ids=["one block", "many blocks"])
def test_the_mixtures_softmax_is_cross_entropy_of_its_scores(tensors, block, monkeypatch):
    if block:
        monkeypatch.setattr(losses, "BLOCK_NUMBERS", block)
    hidden_TD, items_ID, targets_T = (each.detach() for each in tensors)
    hidden_TD, items_ID = (each.float().requires_grad_() for each in (hidden_TD, items_ID))
    torch.manual_seed(1)
    mixture = MixtureOfLogits(MixtureOfLogitsConfig(embedding_dim=D, group_dim=D, dropout=0.0))
    negatives_N = torch.tensor([2, 7, 7, 20])

    def plainly(hidden_TD, items_ID):
        scores_TI = mixture(hidden_TD, mixture.items(items_ID))
        chosen_TN = torch.cat([targets_T[:, None], negatives_N.expand(T, -1)], 1)
        same_TN = F.pad(negatives_N == targets_T[:, None], (1, 0))
        scores_TN = scores_TI.gather(1, chosen_TN).masked_fill(same_TN, -torch.inf)
        return F.cross_entropy(scores_TN, torch.zeros_like(targets_T), reduction="sum")

    def ours(hidden_TD, items_ID):
        return losses.mixture_softmax(mixture, hidden_TD, items_ID, targets_T, negatives_N)

    expected, found = (values_and_gradients(each, hidden_TD, items_ID) for each in (plainly, ours))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    moved = values_and_gradients(lambda h, e: ours(h, e.roll(1, 0)), hidden_TD, items_ID)
    assert not torch.allclose(moved[0], expected[0], rtol=1e-3)
