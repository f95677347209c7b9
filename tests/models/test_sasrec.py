"""SASRec's variants against plain arithmetic, and the published parameter counts."""

import math

import pytest
import torch
import torch.nn.functional as F

from textrec.models.sasrec import SASRec, SASRecConfig


def parameters(**settings) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in SASRec(SASRecConfig(num_items=3416, **settings)).parameters())


def test_parameters_of_pmixers_port():
    assert parameters(embedding_dim=50, norm="post", attend_padding=True) == 212_000


def test_parameters_of_dross_into_gold():
    """The published net has 200 positions; ours keeps a row 0 that is never used."""
    assert parameters(embedding_dim=64, norm="original", scale_item_table=False) - 64 == 282_048


def test_parameters_of_gsasrec():
    """The published net has a padding row and an unused row in both tables, and 200 positions."""
    ours = parameters(embedding_dim=128, norm="original", tie_item_table=False, output_projection=False)
    assert ours + 2 * 128 - 128 == 1_067_008


def test_parameters_of_the_elephant_paper():
    """Pantry, 8,249 items: 13,469,184; its positions have no unused row."""
    config = SASRecConfig(num_items=8249, max_sequence_length=50, embedding_dim=768, norm="original")
    with torch.device("meta"):
        model = SASRec(config)
    assert sum(parameter.numel() for parameter in model.parameters()) - 768 == 13_469_184


def test_tables_may_be_drawn_on_another_scale_than_layers():
    """gSASRec's port keeps torch's N(0, 1) tables."""
    settings = {"num_items": 500, "max_sequence_length": 20, "tie_item_table": False}
    wide, usual = (SASRec(SASRecConfig(**settings, initial_table_std=std)) for std in (1.0, None))
    for table in ("item_table", "output_table", "position_table"):
        assert getattr(wide, table).weight[1:].std().item() == pytest.approx(1.0, rel=0.05)
        assert getattr(usual, table).weight[1:].std() < 0.2
        assert not getattr(wide, table).weight[0].any()
    assert wide.blocks[0].attention.query.weight.std() < 0.2


def attention_by_hand(module, query_LD, source_LD):
    """Softmax over the past, one head at a time."""
    length, width = query_LD.shape
    size, mixed = width // module.num_heads, []
    for head in range(module.num_heads):
        part = slice(head * size, (head + 1) * size)
        q, k, v = (
            f(x)[:, part] for f, x in ((module.query, query_LD), (module.key, source_LD), (module.value, source_LD))
        )
        scores = (q @ k.T / math.sqrt(size)).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(1) @ v)
    return module.output(torch.cat(mixed, 1))


def feed_forward_by_hand(module, x):
    return module.leave(torch.relu(module.enter(x)))


def block_by_hand(block, x, arrangement):
    if arrangement == "post":
        x = block.attention_norm(x + attention_by_hand(block.attention, x, x))
        return block.forward_norm(x + feed_forward_by_hand(block.feed_forward, x))
    if arrangement == "pre":
        normed = block.attention_norm(x)
        x = x + attention_by_hand(block.attention, normed, normed)
        return x + feed_forward_by_hand(block.feed_forward, block.forward_norm(x))
    if arrangement == "original":  # keys and values are not normed; both residuals start from normed rows
        query = block.attention_norm(x)
        x = block.forward_norm(query + attention_by_hand(block.attention, query, x))
        return x + feed_forward_by_hand(block.feed_forward, x)
    normed = block.attention_norm(x)  # LiGR: gates read the rows before their norm
    x = x + torch.sigmoid(block.attention_gate(x)) * attention_by_hand(block.attention, normed, normed)
    gate, up = block.gate_up(block.forward_norm(x)).chunk(2, 1)
    return x + torch.sigmoid(block.forward_gate(x)) * block.down(F.silu(gate) * up)


@pytest.mark.parametrize("arrangement", ["original", "pre", "post", "ligr"])
def test_states_by_hand(arrangement):
    torch.manual_seed(0)
    block = {"block": "ligr"} if arrangement == "ligr" else {"norm": arrangement}
    model = SASRec(SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=12, num_heads=3, **block)).eval()
    history = torch.randint(1, 31, (5,))
    x = model.item_table(history) * math.sqrt(12) + model.position_table(torch.tensor([4, 5, 6, 7, 8]))
    for each in model.blocks:
        x = block_by_hand(each, x, arrangement)
    torch.testing.assert_close(model(history[None]), model.final_norm(x), rtol=1e-5, atol=1e-5)


def test_temperature_scores_by_the_cosine():
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(num_items=30, embedding_dim=12, temperature=0.05)).eval()
    history = torch.tensor([[3, 1, 4]])
    scores_I = model.scores(model.encode(history), model.item_vectors())[0]
    plain = SASRec(SASRecConfig(num_items=30, embedding_dim=12)).eval()
    plain.load_state_dict(model.state_dict())
    by_hand = F.cosine_similarity(plain.encode(history), plain.item_vectors()[1:]) / 0.05
    torch.testing.assert_close(scores_I[1:], by_hand, rtol=1e-4, atol=1e-4)
    assert scores_I.abs().max() <= 20.001
