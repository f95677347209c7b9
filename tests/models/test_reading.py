"""Histories that grow: read on with a cache, they must give what reading them whole gives. LLaMA's: see test_llama."""

import pytest
import torch
from models.test_hstu import HEADS, VARIANTS, build

from textrec.models.hstu import HSTU
from textrec.models.reading import PointwiseReading, right_edge

CASES = VARIANTS | {"mixture": HEADS | {"mixture_groups": (2, 3)}}
WINDOW, START = 12, 1_000_000_000


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def growing(steps: int = 9):
    """Yield items, times and two times of request of each step: rows that grow, stay empty, grow once, now and then."""
    clock_B = torch.full((4,), START)
    for step in range(steps + 1):
        items_BN = torch.randint(0 if step else 1, 31, (4, 2 if step else 5))
        items_BN[1] = 0
        if step == 0:
            items_BN[0, :3], items_BN[2, 2:] = 0, 0  # padded on the left, on the right
        items_BN[2] *= step in (0, 6)
        items_BN[3] *= step % 2 == 0  # here and there
        gaps_BN = torch.randint(0, 6, items_BN.shape).double().mul(2.5).exp().long()
        times_BN = clock_B[:, None] + gaps_BN.cumsum(1)
        clock_B = times_BN[:, -1]
        yield items_BN, times_BN * (items_BN != 0), [clock_B + 10, clock_B + 10**6]


def far(model: HSTU, found_BD: torch.Tensor, *history) -> float:
    """How far user vectors are from those of whole histories, in lengths of the longest one."""
    with torch.no_grad():
        expected_BD = model.encode(*history) if model.reads_times else model.encode(history[0])
    return ((found_BD - expected_BD).norm(dim=1).max() / expected_BD.norm(dim=1).max()).item()


@pytest.mark.parametrize("name", CASES)
def test_growing_histories_are_read_as_whole_ones(name):
    """Also once rows outgrow the window, at several times of request, and asked again without a new item."""
    model, read = build(CASES[name]).eval(), []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: read.append(len(output)))
    config, inside, outside = model.config, 0, 0
    target, by_row = model.reads_times and config.time_query == "target", config.denominator == "row"
    steps = list(growing())
    history = [torch.zeros(4, 0, dtype=torch.long)] * 2
    for step, (items_BN, times_BN, requests) in enumerate(steps):
        rows_before = int((history[0] != 0).any(1).sum())
        history = [torch.cat(pair, 1) for pair in zip(history, (items_BN, times_BN), strict=True)]
        lengths_B = (history[0] != 0).sum(1)
        whole, new = int(lengths_B.clamp(max=WINDOW).sum()), int((items_BN != 0).sum())
        read.clear()
        if step == 0:
            reading = model.start(items_BN, times_BN, requests[0])
            found_BD = reading.user_vectors_BD
        else:
            found_BD = reading.extend(items_BN, times_BN, requests[0])
        computed = sum(read)
        assert far(model, found_BD, *history, requests[0]) <= 1e-5
        if lengths_B.max() <= WINDOW and not by_row:
            inside += 1
            assert computed == new + (rows_before if target else 0)  # the new positions and those not final yet
        else:
            outside += 1
            assert computed == whole
        for requests_B in (requests[1], None):
            read.clear()
            found_BD = reading.extend(items_BN[:, :0], times_BN[:, :0], requests_B)
            assert sum(read) == (whole if by_row else int((lengths_B > 0).sum()) if target else 0)
            assert far(model, found_BD, *history, requests_B) <= 1e-5
    assert outside >= 3 and (inside >= 3 or by_row)


@pytest.mark.parametrize("block", ["hstu", "fuxi"])
def test_a_newest_state_that_is_kept_is_wrong_unless_the_next_item_comes_when_it_was_expected(block):
    """The mutant takes the newest position for final: its keys and values in the second block knew another time."""
    model = build(HEADS | {"block": block}).eval()
    (items_BL, times_BL, _), *_ = growing()
    items_BL, next_B1 = torch.randint(1, 31, items_BL.shape), torch.randint(1, 31, (4, 1))
    times_BL, distances = START + torch.arange(5) * 1000 + torch.zeros_like(items_BL), {}
    for late in (10, 10**7):
        came_B1 = times_BL[:, -1:] + late
        history = torch.cat([items_BL, next_B1], 1), torch.cat([times_BL, came_B1], 1), came_B1[:, 0] + 500
        for unsettled in (0, 1):
            reading = PointwiseReading(model, items_BL, times_BL, times_BL[:, -1] + 10, unsettled)
            distances[late, unsettled] = far(model, reading.extend(next_B1, came_B1, history[2]), *history)
    assert distances.pop((10**7, 0)) > 1e-3
    assert max(distances.values()) <= 1e-5


@pytest.mark.parametrize("name", ["published", "toy", "fuxi", "fuxi, time"])
def test_a_history_that_was_not_remembered_is_noticed(name):
    model, steps = build(CASES[name]).eval(), list(growing(2))
    for forgotten in (False, True):
        reading = model.start(*steps[0][:2])
        if forgotten:
            reading.kept[model.blocks[1]][:, 1] = 0
        found_BD = reading.extend(*steps[2][:2])
        history = [torch.cat([steps[0][i], steps[2][i]], 1) for i in (0, 1)]
        assert (far(model, found_BD, *history) > 1e-3) == forgotten


@torch.no_grad()
def test_without_times_all_elapsed_times_are_zero():
    model = build(HEADS).eval()
    items_BL = torch.randint(1, 31, (3, 8))
    reading = model.start(items_BL[:, :5])
    assert far(model, reading.user_vectors_BD, items_BL[:, :5]) <= 1e-5
    assert far(model, reading.extend(items_BL[:, 5:]), items_BL) <= 1e-5
    assert not reading.model.training and not reading.user_vectors_BD.requires_grad


def test_a_reading_may_start_with_nothing():
    model, items_BL = build(HEADS), torch.randint(1, 31, (3, 8))
    reading = model.start(items_BL[:, :0])
    assert not reading.user_vectors_BD.any()
    assert far(model, reading.extend(items_BL), items_BL) <= 1e-5


def test_the_right_edge_keeps_the_newest_and_takes_times_along():
    items_BL = torch.tensor([[0, 5, 0, 6, 7], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    times_BL = torch.tensor([[9, 1, 9, 2, 3], [4, 9, 9, 9, 9], [9, 9, 9, 9, 9]])
    assert right_edge(items_BL, items_BL != 0, 2).tolist() == [[6, 7], [0, 1], [0, 0]]
    assert right_edge(times_BL, items_BL != 0, 2)[:2, 1].tolist() == [3, 4]
    assert right_edge(items_BL[:, :2], items_BL[:, :2] != 0, 3).tolist() == [[0, 0, 5], [0, 0, 1], [0, 0, 0]]
