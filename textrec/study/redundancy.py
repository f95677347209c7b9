"""How much of a text model's layers is used (Qu et al. 2024, "The Elephant in the Room"): what its heads attend to,
which layers and heads can go, which layers training changes.

All functions take a `RecFormer`, and packed tokens as its `encode` does; those that change a model return a copy.
Shape suffixes: see `textrec.schema`; L tokens of the longest sequence, N items of a history or rows.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.evaluation.ranking import Ranks
from textrec.models.attention import BandedAttention, BandLayout
from textrec.models.recformer import RecFormer
from textrec.seeding import generator
from textrec.study.records import intervals
from textrec.study.tables import paired_difference
from textrec.training.text_ranking import PACKED, TextSet, evaluating, text_ranks

TABLES = ("word_table", "position_table", "type_table", "item_position_table", "embedding_norm")


def sampled_histories(
    encoder: RecFormer, texts: TextSet, num_users: int, seed: int, which: str = "test"
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what `encoder` reads before the targets (test or validation) of sampled users, and the targets (B,)."""
    histories, (users, ends) = texts.prepared.histories, texts.prepared.split.targets(which)
    rows = np.sort(generator(seed, "analysed users").permutation(len(users))[:num_users])
    items_BL, _, _ = histories.windows(users[rows], ends[rows], encoder.config.max_items)
    packed, device = texts.packed(items_BL, encoder.config), encoder.word_table.weight.device
    targets_B = torch.from_numpy(histories.at(users[rows], ends[rows])).to(device)
    return tuple(torch.from_numpy(packed[name]).to(device) for name in PACKED), targets_B


@torch.no_grad()
def layer_states(encoder: RecFormer, packed: Sequence[Tensor]) -> list[Tensor]:
    """Return the states (T, D) that every block reads, and those of the last block."""
    with evaluating(encoder):
        x_TD, layout = encoder._embed(*packed)
        states = [x_TD]
        for block in encoder.blocks:
            states.append(block(states[-1], layout))
    return states


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_weights(attention: BandedAttention, hidden_TD: Tensor, layout: BandLayout) -> Tensor:
    """Return the weights (B, H, L, L) with which a token (axis 2) takes from another (axis 3); zero behind the end."""
    shape = len(layout.lengths_B), layout.longest, attention.num_heads, -1

    def spread(projection: nn.Module) -> Tensor:
        block = hidden_TD.new_zeros(shape[0] * shape[1], hidden_TD.shape[1])
        slots_T = layout.sequence_T * layout.longest + layout.position_T
        return block.index_copy(0, slots_T, projection(hidden_TD)).view(shape).transpose(1, 2)

    places_L = torch.arange(layout.longest, device=hidden_TD.device)
    real_BL = places_L < layout.lengths_B[:, None]
    near_LL = (places_L[:, None] - places_L).abs() <= layout.window // 2
    seen_LL = near_LL | (places_L == 0) | (places_L == 0)[:, None]
    query, key = spread(attention.query), spread(attention.key)
    scores = query @ key.transpose(2, 3)
    scores[:, :, :1] = spread(attention.query_global)[:, :, :1] @ spread(attention.key_global).transpose(2, 3)
    scores = scores * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~(seen_LL & real_BL[:, None, None]), -torch.inf)
    return scores.softmax(3) * real_BL[:, None, :, None]


@torch.no_grad()
def attention_profile(encoder: RecFormer, packed: Sequence[Tensor]) -> dict[str, list[dict]]:
    """Return what tokens of items attend to, as lines per layer (from 1).

    `heads` {layer, head, start, own, others, entropy}: shares that go to the start token, within the token's own item
    and to other items, and the entropy in nats. `distance` {layer, x, value}: the mean share that goes to the item at a
    distance of x items, over the tokens for which there is one. `map`: per layer the mean matrix of items (newest
    first; the start token is row and column 0), from tokens of one to those of another, summed over the latter.
    """
    with evaluating(encoder):
        _, layout = encoder._embed(*packed)
        states = layer_states(encoder, packed)
    slots_T = layout.sequence_T * layout.longest + layout.position_T
    items_BL = packed[2].new_full((len(layout.lengths_B) * layout.longest,), -1).index_copy(0, slots_T, packed[2])
    items_BL = items_BL.view(-1, layout.longest).long()
    asked_BL, num = items_BL > 0, int(items_BL.max()) + 1
    of_item_BLN = (items_BL[:, :, None] == torch.arange(num, device=items_BL.device)).to(states[0])
    counts_BN = of_item_BLN.sum(1)
    told: dict[str, list] = {"heads": [], "distance": [], "map": []}
    for layer, (block, hidden_TD) in enumerate(zip(encoder.blocks, states[:-1], strict=True), 1):
        weights = attention_weights(block.attention, hidden_TD, layout)
        to_item = weights @ of_item_BLN[:, None]  # (B, H, L, N)
        own = to_item.gather(3, items_BL.clamp_min(0)[:, None, :, None].expand(*to_item.shape[:3], 1))[..., 0]
        entropy = torch.special.entr(weights).sum(3)
        for head in range(weights.shape[1]):
            start, within, spread = (x[:, head][asked_BL].mean().item() for x in (to_item[..., 0], own, entropy))
            told["heads"].append({"layer": layer, "head": head + 1, "start": start, "own": within,
                                  "others": 1.0 - start - within, "entropy": spread})  # fmt: skip
        pairs_BNN = of_item_BLN.transpose(1, 2) @ to_item.mean(1) / counts_BN.clamp_min(1)[:, :, None]
        both_BNN = (counts_BN > 0)[:, :, None] & (counts_BN > 0)[:, None]
        mean_NN = (pairs_BNN * both_BNN).sum(0) / both_BNN.sum(0).clamp_min(1)
        apart_NN = (torch.arange(1, num)[:, None] - torch.arange(1, num)).abs().to(mean_NN.device)
        weight_NN = both_BNN.sum(0)[1:, 1:].to(mean_NN)
        for distance in range(num - 1):
            there = (apart_NN == distance) * weight_NN
            value = (mean_NN[1:, 1:] * there).sum() / there.sum().clamp_min(1)
            told["distance"].append({"layer": layer, "x": distance, "value": value.item()})
        told["map"].append(mean_NN.tolist())
    return told


# ---- layers and heads ------------------------------------------------------------------------------------------------


def without_layers(encoder: RecFormer, dropped: Iterable[int]) -> RecFormer:
    """Return a copy without some blocks (from 1, counted from the input)."""
    kept = [place for place in range(1, len(encoder.blocks) + 1) if place not in set(dropped)]
    smaller = copy.deepcopy(encoder)
    smaller.blocks = nn.ModuleList(smaller.blocks[place - 1] for place in kept)
    smaller.config = replace(encoder.config, num_layers=len(kept))
    return smaller


def with_top_layers(encoder: RecFormer, num_tuned: int) -> RecFormer:
    """Return a copy of which a training changes the last `num_tuned` blocks alone, neither those below nor tables."""
    frozen = copy.deepcopy(encoder)
    below = frozen.blocks[: len(frozen.blocks) - num_tuned]
    for part in (*(getattr(frozen, name) for name in TABLES), *below):
        part.requires_grad_(False)
    return frozen


def without_heads(encoder: RecFormer, pruned: Iterable[tuple[int, int]]) -> RecFormer:
    """Return a copy in which the heads (layer, head), both from 1, add nothing."""
    smaller = copy.deepcopy(encoder)
    size = encoder.config.hidden_size // encoder.config.num_heads
    with torch.no_grad():
        for layer, head in pruned:
            smaller.blocks[layer - 1].attention_output.weight[:, (head - 1) * size : head * size] = 0.0
    return smaller


def head_importance(encoder: RecFormer, losses: Iterable[Tensor]) -> dict[tuple[int, int], float]:
    """Return the mean over `losses` of |d loss / d gate| per head (layer, head), the gate a factor 1 of its output.

    (Michel et al. 2019, equation 2.) The gate's gradient is that of the output weights times themselves. The losses are
    made one by one, of `encoder` as it is.
    """
    outputs = [block.attention_output.weight for block in encoder.blocks]
    total, count = 0.0, 0
    for loss in losses:
        gradients = torch.autograd.grad(loss, outputs)
        products = torch.stack([w.detach() * g for w, g in zip(outputs, gradients, strict=True)])
        total = total + products.unflatten(2, (encoder.config.num_heads, -1)).sum((1, 3)).abs()
        count += 1
    return {(layer, head): value / count for layer, row in enumerate(total.tolist(), 1)
            for head, value in enumerate(row, 1)}  # fmt: skip


def ranking_importance(
    encoder: RecFormer, texts: TextSet, items_ID: Tensor, num_users: int, seed: int
) -> dict[tuple[int, int], float]:
    """Return `head_importance` by the loss of finetuning against a fixed table, user by user, of sampled validation."""

    def losses() -> Iterator[Tensor]:
        packed, targets_B = sampled_histories(encoder, texts, num_users, seed, "validation")
        lengths = packed[3].tolist()
        parts = zip(*(each.split(lengths) for each in packed[:3]), packed[3].split(1), targets_B.split(1), strict=True)
        for *own, target_1 in parts:
            yield F.cross_entropy(encoder.scores(encoder.encode(*own), items_ID[1:].to(target_1.device)), target_1 - 1)

    return head_importance(encoder, losses())


def reduction_lines(
    encoder: RecFormer, texts: TextSet, importance: Mapping[tuple[int, int], float], dropped: Sequence[int],
    pruned: Sequence[int], seed: int, num_users: int = 2048,
) -> dict[str, list[dict]]:  # fmt: skip
    """Return lines {row, x, value, low, high}: ndcg@10 of sampled test users with layers or heads taken away.

    Items and histories are encoded anew by each smaller model, without training it. As many of the first or last layers
    go as `dropped` says, and as many of the least or most important heads as `pruned` does; x = "0" is the whole, from
    which the intervals of the others are those of the paired difference.
    """
    layers, heads = range(1, len(encoder.blocks) + 1), sorted(importance, key=importance.get)
    plans = {
        "layers taken": (without_layers, dropped, (("the first go", layers), ("the last go", layers[::-1]))),
        "heads taken": (without_heads, pruned, (("the least used go", heads), ("the most used go", heads[::-1]))),
    }
    users, _ = texts.prepared.split.targets("test")
    users = generator(seed, "analysed users").permutation(users)[:num_users]

    ranks = text_ranks(encoder, texts, "test", users=users)
    whole = intervals(ranks.filtered, (10,))["ndcg@10"]

    def quality(smaller: RecFormer) -> dict[str, float]:
        beyond = paired_difference([text_ranks(smaller, texts, "test", users=users)], [ranks], "ndcg@10")
        return {name: whole["value"] + part for name, part in zip(("value", "low", "high"), beyond, strict=False)}

    return {
        kind: [{"row": row, "x": "0"} | whole for row, _ in orders]
        + [{"row": row, "x": str(number)} | quality(take(encoder, gone[:number]))
           for number in numbers for row, gone in orders]
        for kind, (take, numbers, orders) in plans.items()
    }  # fmt: skip


def tuning_lines(ranks: Mapping[str, Ranks | None]) -> list[dict]:
    """Return lines {row, x, value, low, high}: ndcg@10 by which layers were tuned (`x`); what broke has none."""
    return [{"row": "tuned", "x": x} | intervals(each.filtered, (10,))["ndcg@10"] for x, each in ranks.items() if each]


def linear_cka(x_ND: Tensor, y_ND: Tensor) -> float:
    """Return the linear centred kernel alignment of two descriptions of N things (Kornblith et al. 2019), 0 to 1."""
    x_ND, y_ND = (each.double() - each.double().mean(0) for each in (x_ND, y_ND))
    return float((x_ND.T @ y_ND).square().sum() / ((x_ND.T @ x_ND).norm() * (y_ND.T @ y_ND).norm()))


def alignment(first: RecFormer, second: RecFormer, packed: Sequence[Tensor]) -> list[list[float]]:
    """Return the alignment of the layers of two models (rows, columns), 0 the embeddings, over the tokens of items."""
    told_T = packed[2] > 0
    x, y = ([state[told_T] for state in layer_states(each, packed)] for each in (first, second))
    return [[linear_cka(a, b) for b in y] for a in x]


def attention_panels(profiles: Mapping[str, Mapping], furthest: int = 6) -> list[tuple[str, str, list[dict]]]:
    """Return panels for `plot_lines` of models by their name: heads' means by layer, the outer layers' reach."""
    kinds, panels = {"own": "within the own item", "start": "on the start token", "entropy": "entropy (nats)"}, []
    for kind, label in kinds.items():
        heads = [(row, line["layer"], line[kind]) for row, told in profiles.items() for line in told["heads"]]
        places = dict.fromkeys(head[:2] for head in heads)
        means = {place: np.mean([value for *of, value in heads if tuple(of) == place]) for place in places}
        lines = [{"row": row, "x": str(layer), "value": float(mean)} for (row, layer), mean in means.items()]
        panels.append(("layer", label, lines))
    for name, place in (("first", 0), ("last", -1)):
        lines = [line | {"row": row, "x": str(line["x"])} for row, told in profiles.items() for line in told["distance"]
                 if line["layer"] == told["distance"][place]["layer"] and line["x"] <= furthest]  # fmt: skip
        panels.append((f"items apart, {name}", "share of attention", lines))
    return panels
