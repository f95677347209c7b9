"""What the analysis says of a small encoder, against the encoder itself and plain arithmetic."""

import copy

import pytest
import torch
import torch.nn.functional as F
from study.invented import ranks
from training.text_sets import SMALL, brand_set

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.models.attention import BandLayout
from textrec.models.recformer import RecFormer
from textrec.study import redundancy
from textrec.study.records import intervals
from textrec.training.text_ranking import TextSet, item_table, text_ranks


@pytest.fixture(scope="module")
def encoder() -> RecFormer:
    torch.manual_seed(0)
    encoder = RecFormer(SMALL).eval()
    for parameter in encoder.parameters():  # large enough that attention is not flat
        torch.nn.init.normal_(parameter, std=0.3)
    return encoder


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> TextSet:
    prepared = brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0, num_users=24)
    return TextSet.of(prepared, train_tokenizer(item_attributes(prepared.catalogue), 400))


@pytest.fixture(scope="module")
def packed(encoder, texts) -> tuple[torch.Tensor, ...]:
    return redundancy.sampled_histories(encoder, texts, 5, seed=0)[0]


def test_sampled_histories_come_with_their_targets(encoder, texts, packed):
    again, other = (redundancy.sampled_histories(encoder, texts, 5, seed=seed)[0] for seed in (0, 1))
    assert torch.equal(packed[0], again[0]) and not torch.equal(packed[0], other[0]) and len(packed[3]) == 5
    users, ends = texts.prepared.split.targets("validation")
    _, targets = redundancy.sampled_histories(encoder, texts, 99, seed=0, which="validation")
    assert targets.tolist() == texts.prepared.histories.at(users, ends).tolist()


def test_weights_are_those_of_the_encoders_attention(encoder, packed):
    """Applied to the values they give its output; the tokens a query may see, and no others, have weight."""
    attention = encoder.blocks[0].attention
    hidden_TD, layout = encoder._embed(*packed)
    weights = redundancy.attention_weights(attention, hidden_TD, layout)
    assert weights.shape[:2] == (5, SMALL.num_heads)
    given = attention(hidden_TD, BandLayout.of(packed[3], SMALL.attention_window, SMALL.num_heads, "dense"))
    for row, (start, length) in enumerate(zip(layout.starts_B.tolist(), packed[3].tolist(), strict=True)):
        part, inside = slice(start, start + length), weights[row, :, :length, :length]
        torch.testing.assert_close(inside.sum(2), torch.ones(SMALL.num_heads, length))
        assert not weights[row, :, length:].any() and not weights[row, :, :, length:].any()
        assert (inside[:, 6, 1] == 0).all() and (inside[:, 6, 2] > 0).all() and (inside[:, 0] > 0).all()
        values, of_first = (p(hidden_TD[part]).unflatten(1, (SMALL.num_heads, -1)).transpose(0, 1)
                            for p in (attention.value, attention.value_global))  # fmt: skip
        mixed = torch.cat([inside[:, :1] @ of_first, inside[:, 1:] @ values], 1)
        torch.testing.assert_close(mixed.transpose(0, 1).flatten(1), given[part], rtol=1e-4, atol=1e-5)
    mutant = copy.deepcopy(attention)
    mutant.query_global = mutant.query
    assert (redundancy.attention_weights(mutant, hidden_TD, layout)[:, :, 0] - weights[:, :, 0]).abs().max() > 1e-3


def test_the_profile_adds_up_and_finds_a_head_that_stays_at_home(encoder, packed):
    told = redundancy.attention_profile(encoder, packed)
    assert len(told["heads"]) == 4 and len(told["map"]) == SMALL.num_layers
    for line in told["heads"]:
        assert line["start"] > 0 and line["own"] > 0 and line["others"] > 0 and 0 < line["entropy"] < 4
    rows = torch.tensor(told["map"][0])
    torch.testing.assert_close(rows[0].sum(), torch.tensor(1.0), rtol=0.3, atol=0)  # means of rows that add up to one
    assert rows.min() >= 0 and rows.max() < 0.9  # shares of a token, not sums over the tokens of an item
    near = [line["value"] for line in told["distance"] if line["layer"] == 1]
    assert near[0] == max(near) and near[-1] == pytest.approx(0, abs=0.05)  # the window reaches no further
    flat = copy.deepcopy(encoder)
    with torch.no_grad():
        for block in flat.blocks:
            block.attention.query.weight.zero_()
            block.attention.query.bias.zero_()
    entropies = [line["entropy"] for line in redundancy.attention_profile(flat, packed)["heads"]]
    assert min(entropies) > max(line["entropy"] for line in told["heads"] if line["layer"] == 1)
    assert max(entropies) - min(entropies) < 1e-5  # a flat head's is the log of how many tokens it sees
    panels = redundancy.attention_panels({"here": told}, furthest=2)
    lines = panels[0][2]
    assert [line["x"] for line in lines] == ["1", "2"]
    assert lines[0]["value"] == pytest.approx((told["heads"][0]["own"] + told["heads"][1]["own"]) / 2)
    for panel, layer in ((3, 1), (4, 2)):
        reach = [line["value"] for line in told["distance"] if line["layer"] == layer]
        assert [line["value"] for line in panels[panel][2]] == reach[:3]


def test_layers_go_and_the_rest_computes_on(encoder, packed):
    top = redundancy.without_layers(encoder, [1])
    assert len(top.blocks) == top.config.num_layers == 1 and len(encoder.blocks) == 2
    x_TD, layout = encoder._embed(*packed)
    torch.testing.assert_close(top.encode(*packed), encoder.blocks[1](x_TD, layout, first_only=True))
    assert (top.encode(*packed) - redundancy.without_layers(encoder, [2]).encode(*packed)).abs().max() > 1e-3
    torch.testing.assert_close(redundancy.without_layers(encoder, []).encode(*packed), encoder.encode(*packed))


def test_only_the_top_layers_are_trained(encoder):
    tuned = redundancy.with_top_layers(encoder, 1)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained and all(name.startswith("blocks.1.") for name in trained)
    assert trained == {name for name, _ in encoder.named_parameters() if name.startswith("blocks.1.")}
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_pruned_head_adds_nothing(encoder, packed):
    size = SMALL.hidden_size // SMALL.num_heads
    pruned, by_hand = redundancy.without_heads(encoder, [(2, 1)]), copy.deepcopy(encoder)
    for name in ("value", "value_global"):  # the same from the other side: the head has nothing to say
        projection = getattr(by_hand.blocks[1].attention, name)
        with torch.no_grad():
            projection.weight[:size] = 0.0
            projection.bias[:size] = 0.0
    torch.testing.assert_close(pruned.encode(*packed), by_hand.encode(*packed))
    assert (pruned.encode(*packed) - encoder.encode(*packed)).abs().max() > 1e-3


def test_importance_is_the_slope_of_the_loss_by_the_heads_gate(encoder, packed):
    direction = torch.randn(5, SMALL.hidden_size, generator=torch.Generator().manual_seed(1))

    def loss(model):
        return (model.encode(*packed) * direction).sum()

    found = redundancy.head_importance(encoder, (loss(encoder) for _ in range(2)))
    assert set(found) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    size, step = SMALL.hidden_size // SMALL.num_heads, 1e-3
    for (layer, head), value in found.items():
        sides = []
        for gate in (1 + step, 1 - step):
            moved = copy.deepcopy(encoder)
            with torch.no_grad():
                moved.blocks[layer - 1].attention_output.weight[:, (head - 1) * size : head * size] *= gate
                sides.append(loss(moved).item())
        assert value == pytest.approx(abs(sides[0] - sides[1]) / (2 * step), rel=0.05, abs=0.02)
    silent = redundancy.without_heads(encoder, [(1, 2)])
    assert redundancy.head_importance(silent, [loss(silent)])[1, 2] == 0.0


def test_smaller_models_are_ranked_beside_the_whole(encoder, texts):
    items_ID = item_table(encoder, texts)
    found = redundancy.ranking_importance(encoder, texts, items_ID, 24, seed=0)
    packed, targets_B = redundancy.sampled_histories(encoder, texts, 24, seed=0, which="validation")
    scores_BI = encoder.scores(encoder.encode(*packed), items_ID[1:])
    losses = F.cross_entropy(scores_BI, targets_B - 1, reduction="none")
    gates = [torch.autograd.grad(each, encoder.blocks[0].attention_output.weight, retain_graph=True) for each in losses]
    half = encoder.config.hidden_size // encoder.config.num_heads
    weight = encoder.blocks[0].attention_output.weight.detach()
    wanted = sum(abs((weight * gate)[:, :half].sum().item()) for (gate,) in gates) / len(losses)
    assert found[1, 1] == pytest.approx(wanted, rel=1e-4) and min(found.values()) > 0
    averaged = redundancy.head_importance(encoder, [losses.mean()])  # users cancel each other in a mean
    assert averaged[1, 1] < 0.99 * found[1, 1]
    importance = {(1, 1): 0.4, (1, 2): 0.1, (2, 1): 0.3, (2, 2): 0.2}
    lines = redundancy.reduction_lines(encoder, texts, importance, [1], [1], seed=0)
    whole = intervals(text_ranks(encoder, texts, "test").filtered, (10,))["ndcg@10"]["value"]
    for kind, rows in (("layers taken", ("the first go", "the last go")),
                       ("heads taken", ("the least used go", "the most used go"))):  # fmt: skip
        assert [(line["row"], line["x"]) for line in lines[kind]] == [(row, x) for x in "01" for row in rows]
        assert lines[kind][0]["value"] == lines[kind][1]["value"] == whole
    for place, smaller in ((2, redundancy.without_layers(encoder, [1])), (3, redundancy.without_layers(encoder, [2]))):
        ranks = text_ranks(smaller, texts, "test").filtered
        line = lines["layers taken"][place]
        assert line["value"] == pytest.approx(intervals(ranks, (10,))["ndcg@10"]["value"])
        assert line["low"] <= line["value"] <= line["high"]
    few = redundancy.reduction_lines(encoder, texts, importance, [], [], seed=0, num_users=6)
    assert [line["x"] for line in few["heads taken"]] == ["0", "0"] and few["heads taken"][0]["value"] != whole
    ranks = text_ranks(redundancy.without_heads(encoder, [(1, 2)]), texts, "test").filtered
    line = lines["heads taken"][2]
    assert line["value"] == pytest.approx(intervals(ranks, (10,))["ndcg@10"]["value"])
    nothing = redundancy.reduction_lines(encoder, texts, importance, [0], [], seed=0)["layers taken"][2]
    assert nothing["low"] == nothing["value"] == nothing["high"] == whole  # paired with itself


def test_tunings_are_lines_in_order_and_one_that_broke_has_none():
    lines = redundancy.tuning_lines({"none": ranks([0, 50]), "last 1": None, "all": ranks([0, 0])})
    assert [(line["x"], line["value"]) for line in lines] == [("none", 0.5), ("all", 1.0)]
    assert lines[0]["low"] <= 0.5 <= lines[0]["high"]


def test_alignment_sees_through_rotations_and_scales_and_nothing_else(encoder, packed):
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    assert redundancy.linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1.0, abs=1e-6)
    assert redundancy.linear_cka(x, torch.randn(200, 6)) < 0.2
    assert redundancy.linear_cka(x, x @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1]))) < 0.9
    changed = copy.deepcopy(encoder)
    torch.nn.init.normal_(changed.blocks[1].enter.weight)
    matrix = redundancy.alignment(encoder, changed, packed)
    assert len(matrix) == len(matrix[0]) == 3
    assert matrix[0][0] == pytest.approx(1.0) and matrix[1][1] == pytest.approx(1.0) and matrix[2][2] < 0.999
