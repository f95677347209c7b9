"""HSTU (Zhai et al. 2024, section 3, and its published research code): pointwise attention that may read the clock.

Attention weights are `silu(query . key + position bias + time bias) / N`, no softmax; there is no feed-forward network.
With `block="fuxi"` blocks are FuXi-alpha's (Ye et al. 2025): both biases are channels of their own, see `FuXiLayer`.
By default the time bias looks at the time that has passed between each earlier item and THE ITEM TO BE PREDICTED: the
model knows when the request comes, in training and in evaluation (`time_query="target"`, as published). With "self" it
looks at the time of the newest item it has read, and with `time_bias=False` at none.

Linear layers see real positions only. Attention sorts the rows of a batch by length and works through tiles of queries
and the keys before them: short rows do not pay for the longest one, and most pairs with a later key are left out.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from textrec.models.mixture_of_logits import MixtureOfLogits, MixtureOfLogitsConfig
from textrec.models.reading import PointwiseReading
from textrec.models.sequence_model import Layout, SequenceModel, newest, rotary_turns, rotate
from textrec.schema import PADDING_ID

TIME_BUCKETS, BUCKET_WIDTH = 129, 0.301  # a bucket spans a factor of e ** 0.301 seconds
OUTPUT_LENGTH = 11  # the published block is so much longer than the longest history: 211 positions for 200 items
NORM_EPS = 1e-6
FUTURE = -1e4  # a bias whose silu is exactly zero, and whose slope is, too
TILE_QUERIES, TILE_NUMBERS = 64, 1 << 18  # on a CPU: scores of a tile stay in the second-level cache


@dataclass(frozen=True, kw_only=True)
class HSTUConfig:
    """The published settings of HSTU on MovieLens-1M are the defaults; `block` chooses FuXi-alpha's or Toy-RecLM's."""

    num_items: int  # catalogue size, padding not counted
    max_sequence_length: int = 200  # items read, newest kept
    embedding_dim: int = 50  # width of items and states
    num_blocks: int = 2
    num_heads: int = 1
    linear_dim: int = 50  # per head, of values and gates
    attention_dim: int = 50  # per head, of queries and keys
    dropout: float = 0.2  # on embeddings and on what enters the output layer; attention weights have none
    position_bias: bool = True  # one number per distance, per block; FuXi-alpha: a channel of its own
    time_bias: bool = True  # one number per bucket of elapsed time, per block; FuXi-alpha: as above
    time_query: str = "target"  # target: time until the item to be predicted | self: until the newest item read
    denominator: str = "constant"  # of attention: constant, max_sequence_length + 11 | row, the row's own length
    concat_ua: bool = False  # the output layer reads gate, attention and their product
    temperature: float | None = 0.05  # None: inner product; else cosine / temperature
    mixture_groups: tuple[int, int] | None = None  # of users and items: a mixture of logits scores (RAILS: 8, 4)
    block: str = "hstu"  # hstu | fuxi | toy

    def __post_init__(self):
        allowed = {"time_query": ("target", "self"), "denominator": ("constant", "row"), "block": tuple(LAYERS)}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {values}")
        for name in ("num_items", "max_sequence_length", "num_blocks", "num_heads", "linear_dim", "attention_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        if self.mixture_groups is not None and self.temperature is None:
            raise ValueError("mixture_groups need a temperature")
        if self.block == "toy" and (self.time_bias or self.position_bias or self.attention_dim % 2):
            raise ValueError("block='toy' needs time_bias=False, position_bias=False and an even attention_dim")

    @property
    def block_length(self) -> int:
        """Positions of the published block: the constant denominator, the size of the position tables."""
        return self.max_sequence_length + OUTPUT_LENGTH

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Widths of gates, values, queries and keys, all heads together; FuXi-alpha has gates for every channel."""
        linear, attention = self.num_heads * self.linear_dim, self.num_heads * self.attention_dim
        channels = 1 + self.position_bias + self.time_bias if self.block == "fuxi" else 1
        return channels * linear, linear, attention, attention


def time_buckets(seconds: Tensor) -> Tensor:
    """Return the bucket 0..128 (int32) of elapsed seconds (integers): floor(ln(max(1, |seconds|)) / 0.301)."""
    return (seconds.abs().clamp_min(1).float().log() / BUCKET_WIDTH).clamp(max=TIME_BUCKETS - 1).int()


class Tiles:
    """How a batch is attended: rows by falling length, and for each tile its rows, queries, keys and time buckets.

    A tile is `(rows, first, last, buckets)`: queries first..last - 1 of some rows see their keys 0..last - 1.
    `buckets` (int32, flat over row, query, key) are made once and shared by all blocks; None without times.
    """

    def __init__(self, layout: Layout, num_heads: int, times_T: Tensor | None = None, queries_T: Tensor | None = None):
        order_B = layout.lengths_B.argsort(descending=True, stable=True)
        ranks_B = order_B.argsort()
        self.layout, self.rows, self.length, self.places_T = layout, len(order_B), layout.max_length, layout.columns_T
        self.slots_T = ranks_B[layout.rows_T] * self.length + layout.columns_T
        # what stands behind a row's end is any position at all: it is later than the row's queries, so never seen
        self.sources = self.slots_T.new_zeros(self.rows * self.length)
        self.sources[self.slots_T] = torch.arange(len(self.slots_T), device=order_B.device)
        numbers, queries = (1 << 26, self.length) if order_B.is_cuda else (TILE_NUMBERS, TILE_QUERIES)
        lengths, self.tiles = layout.lengths_B.tolist(), []
        if times_T is not None and len(times_T):
            times_BL, queries_BL = (x[self.sources].view(self.rows, -1) for x in (times_T, queries_T))
        for first in range(0, self.length if len(layout.rows_T) else 0, queries):
            last, reaching = min(first + queries, self.length), sum(length > first for length in lengths)
            step = max(numbers // (num_heads * (last - first) * last), 1)
            for start in range(0, reaching, step):
                rows, buckets = slice(start, min(start + step, reaching)), None
                if times_T is not None:
                    elapsed = queries_BL[rows, first:last, None] - times_BL[rows, None, :last]
                    buckets = time_buckets(elapsed).flatten()
                self.tiles.append((rows, first, last, buckets))

    def attend(self, layer: nn.Module, q_TC, k_TC, v_TC, bias_LL: Tensor, table: Tensor | None) -> Tensor:
        return _PointwiseAttention.apply(q_TC, k_TC, v_TC, bias_LL, table, self, layer.config.num_heads)

    def mix_by_table(self, layer: nn.Module, v_TC: Tensor, table: Tensor) -> Tensor:
        return _TableAttention.apply(v_TC, table, self)

    def pad(self, packed_TC: Tensor, num_heads: int) -> Tensor:
        """Spread packed rows into (B, H, L, C / H), rows by falling length."""
        return self.heads(packed_TC.index_select(0, self.sources), num_heads)

    def spread(self, packed_TC: Tensor, num_heads: int) -> Tensor:
        """Do as `pad`, but with zeros behind a row's end."""
        block = packed_TC.new_zeros(self.rows * self.length, packed_TC.shape[1])
        return self.heads(block.index_copy_(0, self.slots_T, packed_TC), num_heads)

    def heads(self, block: Tensor, num_heads: int) -> Tensor:
        """Turn (B * L, C) into a contiguous (B, H, L, C / H)."""
        return block.view(self.rows, self.length, num_heads, -1).transpose(1, 2).contiguous()

    def pack(self, block_BHLD: Tensor) -> Tensor:
        """Take the real positions back out: (B, H, L, D) -> (T, H * D)."""
        return block_BHLD.transpose(1, 2).reshape(self.rows * self.length, -1).index_select(0, self.slots_T)


class _PointwiseAttention(torch.autograd.Function):
    """`silu(q k + bias_LL + table[bucket]) v` over the tiles; scores are kept for the gradient, their silu is not."""

    @staticmethod
    def forward(ctx, q_TC, k_TC, v_TC, bias_LL: Tensor, table: Tensor | None, tiles: Tiles, num_heads: int) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        q, k, v = (tiles.pad(x, num_heads) for x in (q_TC, k_TC, v_TC))
        mixed, kept = torch.empty_like(v), []
        for rows, first, last, buckets in tiles.tiles:
            shape = (rows.stop - rows.start, num_heads, last - first, last)
            scores = bias_LL[first:last, :last].to(q.dtype).expand(shape).clone(memory_format=torch.contiguous_format)
            if table is not None:
                scores += table.to(q.dtype).index_select(0, buckets).view(-1, 1, last - first, last)
            scores = scores.flatten(0, 1).baddbmm_(_tile(q, rows, first, last), _tile(k, rows, 0, last).transpose(1, 2))
            mixed[rows, :, first:last] = torch.bmm(F.silu(scores), _tile(v, rows, 0, last)).view(*shape[:3], -1)
            if wanted:
                kept.append(scores)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.tiles, ctx.num_heads, ctx.table_size = tiles, num_heads, None if table is None else len(table)
        return tiles.pack(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TC: Tensor):
        q, k, v, *kept = ctx.saved_tensors
        tiles, num_heads = ctx.tiles, ctx.num_heads
        grad = tiles.spread(grad_TC, num_heads)
        grad_q, grad_k, grad_v = (x.new_zeros(x.shape) for x in (q, k, v))
        exact = torch.promote_types(grad.dtype, torch.float32)
        grad_bias_LL = grad.new_zeros(tiles.length, tiles.length, dtype=exact)
        grad_table = None if ctx.table_size is None else grad_bias_LL.new_zeros(ctx.table_size)
        for (rows, first, last, buckets), scores in zip(tiles.tiles, kept, strict=True):
            above = _tile(grad, rows, first, last)
            _tile(grad_v, rows, 0, last).add_(torch.bmm(F.silu(scores).transpose(1, 2), above))
            slope = torch.bmm(above, _tile(v, rows, 0, last).transpose(1, 2))
            torch.ops.aten.silu_backward.grad_input(slope, scores, grad_input=slope)
            _tile(grad_k, rows, 0, last).add_(torch.bmm(slope.transpose(1, 2), _tile(q, rows, first, last)))
            _tile(grad_q, rows, first, last).copy_(torch.bmm(slope, _tile(k, rows, 0, last)))
            grad_bias_LL[first:last, :last] += slope.sum(0, dtype=exact)
            if grad_table is not None:
                of_heads = slope.view(-1, num_heads, (last - first) * last)
                weights = of_heads[:, 0] if num_heads == 1 else of_heads.sum(1)
                grad_table += torch.bincount(buckets, weights.flatten().to(exact), len(grad_table))
        return *(tiles.pack(x) for x in (grad_q, grad_k, grad_v)), grad_bias_LL, grad_table, None, None


class _TableAttention(torch.autograd.Function):
    """`weights v` over the tiles: `table` has one per bucket or, zeros for later keys, per query and key (L, L)."""

    @staticmethod
    def forward(ctx, v_TC: Tensor, table: Tensor, tiles: Tiles) -> Tensor:
        v, numbers, kept = tiles.pad(v_TC, 1), table.to(v_TC.dtype), []
        mixed = torch.empty_like(v)
        for rows, first, last, buckets in tiles.tiles:
            if table.dim() == 2:
                weights = numbers[first:last, :last]
            else:
                weights = numbers.index_select(0, buckets).view(-1, last - first, last).tril_(first)
            mixed[rows, 0, first:last] = weights @ _tile(v, rows, 0, last)
            kept.append(weights)
        ctx.save_for_backward(v, table, *kept)
        ctx.tiles = tiles
        return tiles.pack(mixed)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TC: Tensor):
        v, table, *kept = ctx.saved_tensors
        grad, grad_v = ctx.tiles.spread(grad_TC, 1), v.new_zeros(v.shape)
        exact = torch.promote_types(grad.dtype, torch.float32)
        grad_table = table.new_zeros(table.shape, dtype=exact)
        for (rows, first, last, buckets), weights in zip(ctx.tiles.tiles, kept, strict=True):
            above = _tile(grad, rows, first, last)
            _tile(grad_v, rows, 0, last).add_(weights.mT @ above)
            slope = torch.bmm(above, _tile(v, rows, 0, last).mT)
            if table.dim() == 2:
                grad_table[first:last, :last] += slope.sum(0, dtype=exact)
            else:
                grad_table += torch.bincount(buckets, slope.tril_(first).flatten().to(exact), len(table))
        return ctx.tiles.pack(grad_v), grad_table, None


def _tile(block_BHLD: Tensor, rows: slice, first: int, last: int) -> Tensor:
    """Return a view (rows * H, last - first, D): rows and heads of a contiguous block, or of one head, are one axis."""
    part = block_BHLD[rows, :, first:last]
    return part.view(-1, *part.shape[2:])


class HSTULayer(nn.Module):
    """One block: gates, values, queries and keys from one silu layer, attention, a norm, the gate, a residual."""

    norm = staticmethod(F.layer_norm)

    def __init__(self, config: HSTUConfig):
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.embedding_dim, sum(config.widths), bias=False)
        self.output = nn.Linear(config.widths[0] * (3 if config.concat_ua else 1), config.embedding_dim)
        # distance d behind the newest key is entry N - 1 - d; the later half is never read, but published and counted
        self.distances = nn.Parameter(torch.empty(2 * config.block_length - 1)) if config.position_bias else None
        self.buckets = nn.Parameter(torch.empty(TIME_BUCKETS)) if config.time_bias else None
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw as published: N(0, 0.02), the output layer Xavier-uniform with torch's bias."""
        self.output.reset_parameters()
        nn.init.xavier_uniform_(self.output.weight)
        for parameter in (self.project.weight, self.distances, self.buckets):
            if parameter is not None:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x_TD: Tensor, tiles: Tiles) -> Tensor:
        normed_TD = self.norm(x_TD, x_TD.shape[1:], eps=NORM_EPS)
        u, v, q, k = F.silu(self.project(normed_TD)).split(self.config.widths, 1)
        mixed = self._mix(q, k, v, self._bias(tiles), self.buckets, tiles)
        a = self.norm(mixed, mixed.shape[1:], eps=NORM_EPS)
        gated = torch.cat([u, a, u * a], 1) if self.config.concat_ua else u * a
        return x_TD + self.output(self.dropout(gated))

    def _mix(self, q_TC, k_TC, v_TC, bias_LL: Tensor, table: Tensor | None, tiles: Tiles) -> Tensor:
        mixed = tiles.attend(self, q_TC, k_TC, v_TC, bias_LL, table)
        by_row = self.config.denominator == "row"
        return mixed / (tiles.layout.lengths_B[tiles.layout.rows_T, None] if by_row else self.config.block_length)

    def _bias(self, tiles: Tiles) -> Tensor:
        """Return the position bias (L, L), a strided view of one table; what is later is `FUTURE`."""
        length, last = tiles.length, self.config.block_length
        if self.distances is None:
            return _causal(self.project.weight.new_zeros(length, length))
        return _causal(self.distances.unfold(0, length, 1)[last - length : last].flip(0))


def _causal(bias_LL: Tensor) -> Tensor:
    return bias_LL.masked_fill(torch.ones_like(bias_LL, dtype=torch.bool).triu(1), FUTURE)


class FuXiLayer(HSTULayer):
    """FuXi-alpha's block (Ye et al. 2025), as its published research code has it.

    Values are mixed in three channels: by content (silu(query . key) / N), by position and by time, whose weights are a
    number per distance and per bucket. The channels are joined, normalised and gated; a residual, then a SwiGLU network
    as wide as the items. RMS norms learn no scale. A channel that is switched off takes its gates with it.
    """

    norm = staticmethod(F.rms_norm)

    def __init__(self, config: HSTUConfig):
        super().__init__(config)
        width = config.embedding_dim
        self.gate, self.up, self.down = (nn.Linear(width, width, bias=False) for _ in range(3))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for layer in (self.gate, self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x_TD: Tensor, tiles: Tiles) -> Tensor:
        x_TD = super().forward(x_TD, tiles)
        normed_TD = self.dropout(self.norm(x_TD, x_TD.shape[1:], eps=NORM_EPS))
        return x_TD + self.down(F.silu(self.gate(normed_TD)) * self.up(normed_TD))

    def _mix(self, q_TC, k_TC, v_TC, bias_LL: Tensor, table: Tensor | None, tiles: Tiles) -> Tensor:
        """Return the channels side by side: all heads by content, then by position, then by time."""
        channels = [super()._mix(q_TC, k_TC, v_TC, _causal(torch.zeros_like(bias_LL)), None, tiles)]
        tables = (None if self.distances is None else bias_LL.tril()), table
        return torch.cat(channels + [tiles.mix_by_table(self, v_TC, x) for x in tables if x is not None], 1)


class ToyLayer(nn.Module):
    """Toy-RecLM's block of that name: silu before the projections, rotary positions, no denominator, RMS norms."""

    def __init__(self, config: HSTUConfig):
        super().__init__()
        self.config = config
        width, linear = config.embedding_dim, config.widths[0]
        self.norm, self.mixed_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(linear, eps=1e-5)
        self.project = nn.Linear(width, sum(config.widths), bias=False)
        self.output = nn.Linear(linear, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.normal_(self.output.weight, std=0.02 / math.sqrt(2 * self.config.num_blocks))

    def forward(self, x_TD: Tensor, tiles: Tiles) -> Tensor:
        u, v, q, k = self.project(F.silu(self.norm(x_TD))).split(self.config.widths, 1)
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        turns_T1P = rotary_turns(tiles.places_T, self.config.attention_dim, dtype=exact)
        q, k = (rotate(x, turns_T1P) for x in (q / math.sqrt(self.config.attention_dim), k))
        bias_LL = _causal(self.project.weight.new_zeros(tiles.length, tiles.length))
        mixed = tiles.attend(self, q, k, v, bias_LL, None)
        return x_TD + self.dropout(self.output(self.mixed_norm(mixed) * u))


LAYERS = {"hstu": HSTULayer, "fuxi": FuXiLayer, "toy": ToyLayer}


class HSTU(SequenceModel):
    """Predict the next item from the state of the newest one and, with `time_query="target"`, the time of request."""

    config_class = HSTUConfig
    exportable = False

    def __init__(self, config: HSTUConfig):
        super().__init__(config)
        width, toy = config.embedding_dim, config.block == "toy"
        self.reads_times = config.time_bias
        self.item_table = nn.Embedding(config.num_items + 1, width, padding_idx=PADDING_ID)
        self.position_table = None if toy else nn.Embedding(config.block_length, width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(LAYERS[config.block](config) for _ in range(config.num_blocks))
        self.final_norm = nn.RMSNorm(width, eps=1e-5) if toy else nn.Identity()
        if config.mixture_groups is not None:
            self.final_norm = nn.LayerNorm(width, elementwise_affine=False)
            groups = dict(zip(("user_groups", "item_groups"), config.mixture_groups, strict=True))
            gated = {"hidden_dim": 512, "gate_dim": 128, "dropout": config.dropout, "temperature": config.temperature}
            self.mixture = MixtureOfLogits(MixtureOfLogitsConfig(embedding_dim=width, **groups, **gated))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights afresh, items from a normal cut at two deviations, then zero the padding row."""
        for part in (*self.blocks, *([] if self.similarity is None else [self.mixture])):
            part.reset_parameters()
        cut = math.inf if self.position_table is None else 0.04
        nn.init.trunc_normal_(self.item_table.weight, std=0.02, a=-cut, b=cut)
        if self.position_table is not None:
            nn.init.xavier_normal_(self.position_table.weight)
        with torch.no_grad():
            self.item_table.weight[PADDING_ID].zero_()

    def item_vectors(self) -> Tensor:
        table = self.item_table.weight
        return F.normalize(table, dim=-1, eps=1e-6) if self._cosine else table

    @property
    def _cosine(self) -> bool:
        return self.config.temperature is not None and self.similarity is None

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None, requests_B: Tensor | None = None) -> Tensor:
        """Return the states (T, D), see `SequenceModel.forward`; without `times_BL` all elapsed times are zero.

        `requests_B` are the times of the items to be predicted after the newest ones; by default the newest ones' own.
        """
        items_BL = newest(items_BL, self.config.max_sequence_length)
        real_BL = items_BL != PADDING_ID
        layout = Layout.of(real_BL)
        times = ()
        if self.reads_times:
            times_T = torch.zeros_like(layout.rows_T) if times_BL is None else times_BL[real_BL]
            times = times_T, self._query_times(times_T, requests_B, layout)
        return self._states(items_BL[real_BL], Tiles(layout, self.config.num_heads, *times))

    def _states(self, items_T: Tensor, tiles: Tiles | PointwiseReading) -> Tensor:
        x_TD = self.item_table(items_T) * math.sqrt(self.config.embedding_dim)
        if self.position_table is not None:
            x_TD = x_TD + self.position_table(tiles.places_T)
        x_TD = self.dropout(x_TD)
        for block in self.blocks if len(x_TD) else ():
            x_TD = block(x_TD, tiles)
        x_TD = self.final_norm(x_TD)
        return F.normalize(x_TD, dim=-1, eps=1e-6) / self.config.temperature if self._cosine else x_TD

    def _query_times(self, times_T: Tensor, requests_B: Tensor | None, layout: Layout) -> Tensor:
        if self.config.time_query == "self" or not len(times_T):
            return times_T
        filled_B = layout.lengths_B > 0
        ends_R = layout.lengths_B.cumsum(0)[filled_B] - 1
        last_R = times_T[ends_R] if requests_B is None else requests_B[filled_B]
        return times_T.roll(-1).index_copy(0, ends_R, last_R)

    def start(self, items_BL: Tensor, times_BL: Tensor | None = None, requests_B: Tensor | None = None):
        """Read B histories in evaluation mode and return the `PointwiseReading` that takes further items.

        With `time_query="target"` a state is final once the next item is there; with `denominator="row"` none ever is.
        """
        changing = int(self.reads_times and self.config.time_query == "target")
        unsettled = self.config.max_sequence_length if self.config.denominator == "row" else changing
        return PointwiseReading(self.eval(), items_BL, times_BL, requests_B, unsettled)

    def continue_reading(self, reading: PointwiseReading, items_T, times_T, requests_B: Tensor | None) -> Tensor:
        if self.reads_times:
            queries_T = self._query_times(times_T, requests_B, reading.layout)
            keys_BK1, queries_BN1 = reading.remember("times", times_T[:, None]), reading.layout.pad(queries_T[:, None])
            reading.buckets_BNK = time_buckets(queries_BN1 - keys_BK1.mT)
        return self._states(items_T, reading)
