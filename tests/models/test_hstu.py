"""HSTU and FuXi-alpha against plain loops over pairs, ablations against each other, and what the clock may tell."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.behaviours import (
    assert_causal,
    assert_long_histories_keep_the_newest,
    assert_overfits_one_batch,
    assert_padding_is_invisible,
    assert_padding_rows_stay_zero,
    assert_recommends,
    assert_refit_is_fresh,
    assert_save_load_identical,
    random_histories,
)
from models.test_learnability import LENGTH, NUM_ITEMS, recall_at_1, train

from textrec.models import hstu
from textrec.models.hstu import HSTU, HSTUConfig, Tiles
from textrec.models.llama import Llama, LlamaConfig
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.models.sequence_model import Layout
from textrec.schema import InputError
from textrec.training import losses

SIZE = {"num_items": 30, "max_sequence_length": 12, "embedding_dim": 16, "dropout": 0.0}
HEADS = SIZE | {"num_heads": 2, "linear_dim": 6, "attention_dim": 4}
TOY = HEADS | {"block": "toy", "time_bias": False, "position_bias": False, "temperature": None}
FUXI = HEADS | {"block": "fuxi"}
VARIANTS = {
    "published": HEADS | {"num_heads": 1},
    "heads": HEADS,
    "self": HEADS | {"time_query": "self"},
    "position": HEADS | {"time_bias": False},
    "time": HEADS | {"position_bias": False},
    "no bias": HEADS | {"time_bias": False, "position_bias": False},
    "row, ua": HEADS | {"denominator": "row", "concat_ua": True, "temperature": None},
    "toy": TOY,
    "fuxi": FUXI,
    "fuxi, one head, self": FUXI | {"num_heads": 1, "time_query": "self"},
    "fuxi, position, row, ua": FUXI | {"time_bias": False, "denominator": "row", "concat_ua": True},
    "fuxi, time": FUXI | {"position_bias": False},
    "fuxi, content": FUXI | {"time_bias": False, "position_bias": False},
}
every_block = pytest.mark.parametrize("block", ["hstu", "fuxi"])  # that reads times
every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def build(settings) -> HSTU:
    """A model whose biases are large enough to matter."""
    model = HSTU(HSTUConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "project" in name or "distances" in name or "buckets" in name:
                parameter.mul_(20)
    return model


def histories(lengths=(9, 3, 12, 1), columns=12):
    """Right-padded items, their times, and the times of request."""
    items_BL = random_histories(30, (len(lengths), columns))
    gaps = torch.randint(0, 5, items_BL.shape).double().mul(2.5).exp().long()
    times_BL = 1_000_000_000 + gaps.cumsum(1)
    real_BL = torch.arange(columns) < torch.tensor(lengths)[:, None]
    requests_B = times_BL.gather(1, torch.tensor(lengths)[:, None] - 1)[:, 0] + 100_000
    return items_BL * real_BL, times_BL * real_BL, requests_B


def number_of(layer, config, kind, i, j, times, request):
    """The number that a layer has for the distance, or the elapsed time, of query i and key j."""
    if kind == "position":
        return layer.distances[config.block_length - 1 + j - i]
    after = [*times[1:], request] if config.time_query == "target" else times
    elapsed = max(1, abs(int(after[i]) - int(times[j])))
    return layer.buckets[min(int(math.log(elapsed) / 0.301), 128)]


def fuxi_by_hand(layer, config, x, times, request, dropped=()):
    """One history, one pair after the other; a channel that is `dropped` stays zero."""
    heads, linear, attention = config.num_heads, config.linear_dim, config.attention_dim
    on = {"position": config.position_bias, "time": config.time_bias}
    kinds = [kind for kind in ("content", "position", "time") if on.get(kind, True)]
    joined = F.silu(rms(x) @ layer.project.weight.T)
    u, v, q, k = joined.split([len(kinds) * heads * linear, heads * linear, heads * attention, heads * attention], 1)
    q, k, parts = q.view(-1, heads, attention), k.view(-1, heads, attention), v.view(-1, heads, linear)
    rows = []
    for i in range(len(x)):
        sums = {kind: x.new_zeros(heads, linear) for kind in kinds}
        for j in range(i + 1):
            for kind in kinds:
                if kind in dropped:
                    continue
                if kind == "content":
                    divisor = config.block_length if config.denominator == "constant" else len(x)
                    weight = F.silu((q[i] * k[j]).sum(1, keepdim=True)) / divisor
                else:
                    weight = number_of(layer, config, kind, i, j, times, request)
                sums[kind] = sums[kind] + weight * parts[j]
        rows.append(torch.cat([sums[kind].flatten() for kind in kinds]))
    a = rms(torch.stack(rows))
    x = x + layer.output(torch.cat([u, a, u * a], 1) if config.concat_ua else u * a)
    return x + (F.silu(rms(x) @ layer.gate.weight.T) * (rms(x) @ layer.up.weight.T)) @ layer.down.weight.T


def rms(x):
    return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()


def layer_by_hand(layer, config, x, times, request):
    """One history, one head after the other, one pair after the other."""
    linear, attention = config.num_heads * config.linear_dim, config.num_heads * config.attention_dim
    toy = config.block == "toy"
    normed = F.silu(layer.norm(x)) if toy else F.layer_norm(x, x.shape[1:], eps=1e-6)
    joined = normed @ layer.project.weight.T
    u, v, q, k = (joined if toy else F.silu(joined)).split([linear, linear, attention, attention], 1)
    rows = []
    for i in range(len(x)):
        heads = []
        for h in range(config.num_heads):
            a, b = slice(h * config.attention_dim, (h + 1) * config.attention_dim), config.linear_dim
            mixed = x.new_zeros(b)
            for j in range(i + 1):
                if toy:  # complex multiplication by exp(1j * position / 10000 ** (pair / pairs))
                    turns = torch.polar(
                        torch.ones(2, dtype=x.dtype), torch.tensor([1.0, 0.01], dtype=x.dtype) * (i - j)
                    )
                    pair_q, pair_k = (torch.view_as_complex(y[a].view(-1, 2)) for y in (q[i], k[j]))
                    score = (pair_q * turns * pair_k.conj()).real.sum() / math.sqrt(config.attention_dim)
                else:
                    score = q[i, a] @ k[j, a]
                for kind, on in (("position", config.position_bias), ("time", config.time_bias)):
                    if on:
                        score = score + number_of(layer, config, kind, i, j, times, request)
                mixed = mixed + F.silu(score) * v[j, h * b : (h + 1) * b]
            heads.append(mixed)
        rows.append(torch.cat(heads))
    mixed = torch.stack(rows)
    if toy:
        return x + (layer.mixed_norm(mixed) * u) @ layer.output.weight.T
    mixed = mixed / (config.block_length if config.denominator == "constant" else len(x))
    a = F.layer_norm(mixed, mixed.shape[1:], eps=1e-6)
    return x + layer.output(torch.cat([u, a, u * a], 1) if config.concat_ua else u * a)


def states_by_hand(model, items_BL, times_BL, requests_B, by_hand=None):
    by_hand = by_hand or (fuxi_by_hand if model.config.block == "fuxi" else layer_by_hand)
    found = []
    for row, items in enumerate(items_BL):
        items, times = items[items_BL[row] != 0], times_BL[row][items_BL[row] != 0]
        x = model.item_table(items) * math.sqrt(model.config.embedding_dim)
        x = x if model.position_table is None else x + model.position_table.weight[: len(x)]
        for layer in model.blocks:
            x = by_hand(layer, model.config, x, times, requests_B[row])
        x = model.final_norm(x)
        found.append(x if model.config.temperature is None else x / x.norm(dim=1, keepdim=True) / 0.05)
    return torch.cat(found)


@every_variant
@pytest.mark.parametrize("tiles", [(64, 1 << 18), (5, 100)], ids=["one tile", "many tiles"])
def test_states_and_all_gradients_by_hand(settings, tiles, monkeypatch):
    monkeypatch.setattr(hstu, "TILE_QUERIES", tiles[0])
    monkeypatch.setattr(hstu, "TILE_NUMBERS", tiles[1])
    model, given = build(settings).double(), histories()
    weights_TD = torch.randn(25, 16, dtype=torch.float64)
    outcomes = []
    for states_TD in (model(*given) if model.reads_times else model(given[0]), states_by_hand(model, *given)):
        gradients = torch.autograd.grad((states_TD * weights_TD).sum(), list(model.parameters()))
        outcomes.append([states_TD, *gradients])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(gradient.any() for gradient in outcomes[0][1:])


def test_fuxis_states_in_single_precision_and_without_one_channel():
    """The twins lack a channel each: what the test above compares is sensitive to all three."""
    model, given = build(FUXI).eval(), histories()
    with torch.no_grad():
        found = model(*given) * 0.05
        torch.testing.assert_close(found, states_by_hand(model, *given) * 0.05, rtol=0, atol=1e-6)
        for kind in ("content", "position", "time"):
            twin = partial(fuxi_by_hand, dropped=(kind,))
            assert (states_by_hand(model, *given, twin) * 0.05 - found).abs().max() > 1e-4, kind


@pytest.mark.parametrize("by_time", [False, True])
def test_gradients_of_table_attention(by_time, monkeypatch):
    monkeypatch.setattr(hstu, "TILE_QUERIES", 3)
    monkeypatch.setattr(hstu, "TILE_NUMBERS", 30)
    layout = Layout.of(torch.arange(5) < torch.tensor([5, 2, 4])[:, None])
    times_T = torch.randint(0, 100, layout.rows_T.shape)
    tiles = Tiles(layout, 2, times_T, times_T + 3)
    v_TC, table = (torch.randn(*size, dtype=torch.float64) for size in ((11, 4), (129,) if by_time else (5, 5)))
    for each in (v_TC, table):
        each.requires_grad_()
    assert len(tiles.tiles) > 2

    def attend(v_TC, table):
        return hstu._TableAttention.apply(v_TC, table if by_time else table.tril(), tiles)

    assert torch.autograd.gradcheck(attend, (v_TC, table))


def test_fuxi_in_half_precision_stays_near():
    model, given = build(FUXI).eval(), histories()
    outcomes = []
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            states_TD = model(*given).float()
        gradients = torch.autograd.grad((states_TD * torch.linspace(-1, 1, 16)).sum(), list(model.parameters()))
        outcomes.append([states_TD.detach(), *gradients])
    for one, other in zip(*outcomes, strict=True):
        assert one.dtype == other.dtype == torch.float32 and (one - other).norm() < 0.1 * one.norm()


@pytest.mark.parametrize("name", ["published", "toy", "fuxi"])
def test_promises_of_every_sequence_model(name, tmp_path):
    def fresh():
        model = build(VARIANTS[name])
        model.output_table = None  # its only table is the input's
        return model

    assert_causal(fresh)
    assert_padding_is_invisible(fresh)
    assert_long_histories_keep_the_newest(fresh)
    assert_overfits_one_batch(lambda: HSTU(HSTUConfig(**VARIANTS[name])))
    assert_save_load_identical(fresh, tmp_path)
    assert_refit_is_fresh(fresh)
    assert_padding_rows_stay_zero(fresh)
    assert_recommends(fresh)


def states(model, items_BL, times_BL, requests_B) -> torch.Tensor:
    with torch.no_grad():
        packed_TD = model(items_BL, times_BL, requests_B)
    block_BLD = packed_TD.new_zeros(*items_BL.shape, packed_TD.shape[1])
    block_BLD[items_BL != 0] = packed_TD
    return block_BLD


@every_block
@pytest.mark.parametrize(("query", "seen_from"), [("target", 5), ("self", 6)])
def test_a_later_time_is_read_by_the_state_before_it_at_most(query, seen_from, block):
    """Position t's time is when the target of t - 1 is consumed: state t - 1 alone may know it beforehand."""
    settings = HEADS | {"time_query": query, "block": block}
    model, (items_BL, times_BL, requests_B) = build(settings), histories((12, 12))
    before, later_BL = states(model, items_BL, times_BL, requests_B), times_BL.clone()
    later_BL[:, 6:] += 10**6
    after = states(model, items_BL, later_BL, requests_B + 10**6)
    assert torch.equal(after[:, :seen_from], before[:, :seen_from])
    assert (after[:, seen_from] != before[:, seen_from]).any()


@every_block
def test_the_time_of_request_moves_the_newest_state_alone(block):
    model, (items_BL, times_BL, requests_B) = build(HEADS | {"block": block}), histories((9, 12))
    before, after = (states(model, items_BL, times_BL, requests_B + late) for late in (0, 10**6))
    changed_BL = (before != after).any(2)
    assert changed_BL.nonzero().tolist() == [[0, 8], [1, 11]]
    assert torch.equal(model.encode(items_BL, times_BL), model.encode(items_BL, times_BL, times_BL.amax(1)))
    blind = build(HEADS | {"time_query": "self", "block": block})
    assert torch.equal(blind.encode(items_BL, times_BL), blind.encode(items_BL, times_BL, requests_B))


@every_block
def test_padding_on_either_side_with_times(block):
    model, (items_BL, times_BL, requests_B) = build(HEADS | {"block": block}), histories()
    moved = torch.zeros(2, 4, 15, dtype=torch.long)
    for row, length in enumerate((9, 3, 12, 1)):
        for kind, source in enumerate((items_BL, times_BL)):
            moved[kind, row, 15 - length :] = source[row, :length]
    expected, found = model(items_BL, times_BL, requests_B), model(*moved, requests_B)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    turned = model(items_BL.flip(0), times_BL.flip(0), requests_B.flip(0)).split([1, 12, 3, 9])
    torch.testing.assert_close(torch.cat(turned[::-1]), expected, rtol=0, atol=1e-5)


@every_block
def test_without_a_time_bias_times_are_ignored(block):
    model, (items_BL, times_BL, requests_B) = build(HEADS | {"time_bias": False, "block": block}), histories()
    assert not model.reads_times
    assert torch.equal(model.encode(items_BL, times_BL, requests_B), model.encode(items_BL))
    read = build(HEADS | {"block": block})
    assert read.reads_times and not torch.equal(read.encode(items_BL, times_BL, requests_B), read.encode(items_BL))


def test_recommend_takes_the_times():
    model = build(HEADS)
    now = model.recommend([3, 1, 4], 5, times=[10, 20, 1000])
    assert now == model.recommend([3, 1, 4], 5, times=[10, 20, 1000], request_time=1000)
    assert now != model.recommend([3, 1, 4], 5, times=[10, 20, 1000], request_time=10**7)
    for wrong in ({"times": [1, 2]}, {"request_time": 5}):
        with pytest.raises(InputError, match="expected one time for each of the 3 items"):
            model.recommend([3, 1, 4], 5, **wrong)


def parameters(**settings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in HSTU(HSTUConfig(**settings)).parameters())


def test_published_sizes():
    """MovieLens-1M with 3,952 ids; Toy-RecLM's has 3,416 items and 50 positions, FuXi-alpha's the items there are."""
    assert parameters(num_items=3952) == 234_400
    large = {"num_blocks": 8, "num_heads": 2, "linear_dim": 25, "attention_dim": 25}
    assert parameters(num_items=3952, **large) == 313_000
    tables, block = 3707 * 50 + 211 * 50, 50 * 300 + (150 * 50 + 50) + 421 + 129 + 3 * 50 * 50
    assert parameters(num_items=3706, block="fuxi") == tables + 2 * block == 257_100
    assert parameters(num_items=3706, block="fuxi", **large) == tables + 8 * block
    without_time = block - 129 - 2 * 50 * 50  # its gates and its share of the output layer
    assert parameters(num_items=3706, block="fuxi", time_bias=False) == tables + 2 * without_time
    toy = {"embedding_dim": 512, "num_blocks": 8, "num_heads": 8, "linear_dim": 64, "attention_dim": 64}
    settings = TOY | toy | {"num_items": 3416, "max_sequence_length": 50}
    assert parameters(**settings) == 12_243_968


def test_sasrecs_count_is_the_published_one_by_chance():
    """Published beside HSTU: 211 positions and norms without parameters. Ours has ten positions less and five norms."""
    blocks = 2 * (4 * (50 * 50 + 50) + 2 * (50 * 50 + 50))  # of attention's four layers, of the feed-forward's two
    published = 3953 * 50 + 211 * 50 + blocks
    with torch.device("meta"):
        model = SASRec(SASRecConfig(num_items=3952, max_sequence_length=200, embedding_dim=50))
    of_norms = sum(parameter.numel() for name, parameter in model.named_parameters() if "norm" in name)
    ours = sum(parameter.numel() for parameter in model.parameters())
    assert model.position_table.weight.shape == (211 - 10, 50) and of_norms == 5 * 2 * 50
    assert ours - of_norms + 10 * 50 == published == 238_800
    assert ours == published  # as 5 * 2 * 50 happens to be 10 * 50


def update_over_residual(model: HSTU) -> float:
    """The root mean square of what the first block adds, over that of what it adds it to, for long histories.

    The output layer's bias, half as large as the residual and the same at every position, is left out.
    """
    found, bias = [], model.blocks[0].output.bias
    hook = model.blocks[0].register_forward_hook(lambda _, given, y: found.append((y - given[0] - bias, given[0])))
    times_BL = 1_000_000_000 + torch.randint(0, 100_000, (8, 200)).cumsum(1)
    with torch.no_grad():
        model(torch.randint(1, 3953, (8, 200)), times_BL)
    hook.remove()
    return (found[0][0].square().mean() / found[0][1].square().mean()).sqrt().item()


def test_the_attention_branch_is_small_at_the_start(monkeypatch):
    """The constant denominator of 211 and the norm's 1e-6 leave about a twentieth of the residual to it, as published.

    With a floor a hundred times lower the norm brings attention back to a third.
    """
    model = HSTU(HSTUConfig(num_items=3952)).eval()
    assert model.config.block_length == 211
    assert 0.04 <= update_over_residual(model) <= 0.06
    monkeypatch.setattr(hstu, "NORM_EPS", 1e-8)
    assert update_over_residual(model) > 0.2


def test_published_scales_at_the_start():
    model = HSTU(HSTUConfig(num_items=3952)).eval()
    items = model.item_table.weight[1:]
    assert items.abs().max() <= 0.04 and items.std().item() == pytest.approx(0.0176, rel=0.02)
    assert model.position_table.weight.std().item() == pytest.approx(math.sqrt(2 / 261), rel=0.05)
    layer = model.blocks[0]
    for drawn in (layer.project.weight, layer.distances, layer.buckets):
        assert drawn.std().item() == pytest.approx(0.02, rel=0.25)
    assert layer.output.weight.abs().max() <= math.sqrt(6 / 100) and layer.output.bias.any()
    fuxi = HSTU(HSTUConfig(num_items=9, block="fuxi")).blocks[0]
    assert fuxi.project.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for layer, inputs in ((fuxi.output, 150), (fuxi.gate, 50), (fuxi.up, 50), (fuxi.down, 50)):
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / (inputs + 50)), rel=0.01)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"time_query": "now"}, "time_query='now'"), ({"denominator": "n"}, "denominator='n'"),
        ({"block": "llama"}, "block='llama'"), ({"num_heads": 0}, "num_heads=0"),
        ({"block": "toy"}, "block='toy' needs"),
    ],
)  # fmt: skip
def test_configurations_refuse_what_cannot_be(wrong, named):
    with pytest.raises(ValueError, match=named):
        HSTUConfig(**(SIZE | wrong))


def test_a_negative_that_is_the_positive_changes_nothing():
    model, given = build(HEADS), histories()
    hidden_TD, targets_T = model(*given), torch.randint(1, 31, (25,))
    negatives_TN = torch.randint(1, 31, (25, 6))
    negatives_TN[negatives_TN == targets_T[:, None]] = 0
    negatives_TN = torch.where(negatives_TN == 0, targets_T[:, None] % 30 + 1, negatives_TN)
    extra_TN = torch.cat([negatives_TN, targets_T[:, None]], 1)
    found = [losses.sampled_softmax(hidden_TD, model.item_vectors(), targets_T, n) for n in (negatives_TN, extra_TN)]
    torch.testing.assert_close(*found)
    other = losses.sampled_softmax(
        hidden_TD, model.item_vectors(), targets_T, torch.cat([negatives_TN, negatives_TN[:, :1]], 1)
    )
    assert other > found[0] + 1e-3


KINDS, STEPS = 5, 7  # corpora of the clock: kinds of waiting, each ten times as long as the one before; steps a history


def waiting(num_rows: int, seed: int, told: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Items and times: an item names the kind of the wait before it; else it is the next of a ring."""
    source = torch.Generator().manual_seed(seed)
    kinds_BL = torch.randint(KINDS, (num_rows, STEPS + 1), generator=source)
    waits_BL = 10.0 ** (kinds_BL + 1) * (1 + 0.6 * torch.rand(kinds_BL.shape, generator=source))
    if told:
        return kinds_BL + 1, 1_000_000_000 + waits_BL.long().cumsum(1)
    starts_B1 = torch.randint(KINDS, (num_rows, 1), generator=source)
    return (starts_B1 + torch.arange(STEPS + 1)) % KINDS + 1, 1_000_000_000 + waits_BL.long().cumsum(1)


def clocked(**settings) -> HSTU:
    size = {"embedding_dim": 16, "linear_dim": 16, "attention_dim": 16, "dropout": 0.0}
    return HSTU(HSTUConfig(num_items=KINDS, max_sequence_length=STEPS, **size, **settings))


def recall_after_waiting(told: bool, model: HSTU | Llama) -> float:
    """Train for a second, then return the share of newest items ranked first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(80):
        items_BL, times_BL = waiting(64, 1000 + step, told)
        times = (times_BL[:, :-1], times_BL[:, -1]) if model.reads_times else ()
        states_TD = model(items_BL[:, :-1], *times)
        optimizer.zero_grad()
        losses.full_softmax(states_TD, model.item_vectors(), items_BL[:, 1:].flatten()).div(len(states_TD)).backward()
        optimizer.step()
    items_BL, times_BL = waiting(2000, 7, told)
    with torch.no_grad():
        users_BD = model.eval().encode(items_BL[:, :-1], times_BL[:, :-1], times_BL[:, -1])
        best_B = model.scores(users_BD, model.item_vectors())[:, 1:].argmax(1) + 1
    return (best_B == items_BL[:, -1]).double().mean().item()


@every_block
def test_the_clock_is_read_where_it_tells_the_next_item(block):
    assert recall_after_waiting(True, clocked(block=block)) >= 0.8
    assert recall_after_waiting(True, clocked(block=block, time_bias=False)) <= 0.35
    assert recall_after_waiting(True, clocked(block=block, time_query="self")) <= 0.35


def test_llama_knows_no_clock():
    """It learns the ring by heart, so that it is the clock alone which it lacks where waiting tells the next item."""
    config = LlamaConfig(num_items=KINDS, max_sequence_length=STEPS, embedding_dim=16, dropout=0.0, temperature=0.05)
    assert recall_after_waiting(True, Llama(config)) <= 0.35
    assert recall_after_waiting(False, Llama(config)) >= 0.9


@every_block
def test_the_clock_does_no_harm_where_it_tells_nothing(block):
    found = [recall_after_waiting(False, clocked(block=block, time_bias=on)) for on in (True, False)]
    assert min(found) >= 0.9 and abs(found[0] - found[1]) <= 0.02


@pytest.mark.slow
@every_block
def test_it_learns_an_order_two_chain(block):
    size = {"num_items": NUM_ITEMS, "max_sequence_length": LENGTH, "embedding_dim": 32, "dropout": 0.0}
    model = HSTU(HSTUConfig(**size, block=block))
    untrained = recall_at_1(model)
    train(model, 250)
    assert recall_at_1(model) >= 0.85
    assert untrained <= 0.1 and recall_at_1(model, exchange=True) <= 0.1
