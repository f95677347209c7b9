"""Attention over a sliding window plus one global token (Longformer, Beltagy et al. 2020, section 3), padding-free.

A token sees, in one softmax, the tokens of its sequence at most `window / 2` away and the sequence's first token; the
first token sees its whole sequence, through query, key and value projections of its own. The input is packed: the T
real tokens of B sequences, one sequence after the other. Projections run on those; only the scores are blocked.

Three exact paths. *dense*: one block per sequence. *blocked*: every sequence is cut into blocks, and a block's keys are
its own, half a window on either side, and a copy of the first token's. *flex*: FlexAttention over the packed
tokens, CUDA. It has no dropout on attention weights, which training has by default, and on a CPU no backward pass:
`auto` never takes it, it is chosen by hand. Deviates from transformers' Longformer in cost alone: the global key and
value projections are folded into the one query and the one mixture that need them, which saves two (T, D) x (D, D)
products.

M blocks · S tokens of a block · R rows a block keeps of keys and values · K keys a block sees
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from textrec.schema import InputError

PATHS = ("auto", "dense", "blocked", "flex")
SMALLEST_BLOCK = 32  # tokens; smaller matrices cost more in calls than they save
DENSE_MARGIN = 1.5  # how many more scores the dense path may take before the blocked one is faster
FLEX_TILE = 128  # tokens, FlexAttention's own block


@dataclass(frozen=True)
class BandLayout:
    """Which rows the packed tokens of one batch take in blocks of heads, and who sees whom; one serves all layers."""

    window: int
    num_heads: int
    path: str  # dense | blocked | flex
    longest: int  # tokens of the longest sequence
    halo: int  # tokens a block sees beyond either end; 0: a block is a sequence
    lengths_B: Tensor
    starts_B: Tensor  # packed row of each first token
    sequence_T: Tensor
    position_T: Tensor
    sequence_M: Tensor
    token_MS: Tensor  # packed row of each slot; the unused slots at a sequence's end hold its first token
    slot_T: Tensor  # row of each token in token_MS.flatten()

    @classmethod
    def of(cls, lengths_B: Tensor, window: int, num_heads: int, path: str = "auto") -> "BandLayout":
        """Lay out sequences of `lengths_B` tokens; `path="auto"` takes dense or blocked, whichever is cheaper.

        Raises InputError for an empty sequence, an odd window or an unknown path.
        """
        if window < 2 or window % 2 or path not in PATHS:
            raise InputError(f"window={window}, path={path!r}: expected an even window from 2 on and one of {PATHS}")
        if not len(lengths_B) or int(lengths_B.min()) < 1:
            raise InputError("lengths_B holds an empty sequence: expected its first token at least")
        longest, total = int(lengths_B.max()), int(lengths_B.sum())
        block, halo = max(window // 2, SMALLEST_BLOCK), window // 2
        if path == "auto":
            blocked = int(((lengths_B + block - 1) // block).sum()) * block * (block + 2 * halo)
            path = "dense" if len(lengths_B) * longest**2 <= DENSE_MARGIN * blocked else "blocked"
        if path == "dense":
            block, halo = longest, 0
        device = lengths_B.device
        blocks_B = (lengths_B + block - 1) // block
        starts_B, first_block_B = lengths_B.cumsum(0) - lengths_B, blocks_B.cumsum(0) - blocks_B
        rows_B = torch.arange(len(lengths_B), device=device)
        sequence_T = rows_B.repeat_interleave(lengths_B, output_size=total)
        sequence_M = rows_B.repeat_interleave(blocks_B)
        position_T = torch.arange(total, device=device) - starts_B[sequence_T]
        block_M = torch.arange(len(sequence_M), device=device) - first_block_B[sequence_M]
        position_MS = block_M[:, None] * block + torch.arange(block, device=device)
        inside_MS = position_MS < lengths_B[sequence_M][:, None]
        token_MS = starts_B[sequence_M][:, None] + position_MS * inside_MS
        slot_T = first_block_B[sequence_T] * block + position_T
        return cls(
            window, num_heads, path, longest, halo, lengths_B, starts_B, sequence_T, position_T, sequence_M,
            token_MS, slot_T,
        )  # fmt: skip

    @cached_property
    def kept_MR(self) -> Tensor:
        """Packed row of every key and value a block keeps: its tokens behind, if blocked, a copy of the first one."""
        return torch.cat([self.starts_B[self.sequence_M][:, None], self.token_MS], 1) if self.halo else self.token_MS

    # Queries, keys, values (T, 3 * H * d) read as (T * 3 * H, d) have part p of token t, head h in row (3 t + p) H + h;
    # blocks come head by head.

    @cached_property
    def gathered_rows(self) -> Tensor:
        """Row of the (T * 3 * H, d) inputs that each of the H * M * S queries, (H * M + 2) * R keys and values takes.

        One block before and one behind all others, seen by nobody, give every block two neighbours.
        """
        stored = [F.pad(self._head_rows(self.kept_MR, part), (self.kept_MR.shape[1],) * 2) for part in (1, 2)]
        return torch.cat([self._head_rows(self.token_MS, 0), *stored])

    @cached_property
    def mixed_rows(self) -> Tensor:
        """Slot of each of the T * H packed rows."""
        return (self.slot_T[:, None] + self.token_MS.numel() * self._heads_H).flatten()

    @cached_property
    def returned_rows(self) -> Tensor:
        """Gathered row of each of the T * 3 * H packed rows: the inverse of `gathered_rows`, copies aside."""
        block, rows = self.token_MS.shape[1], self.kept_MR.shape[1]
        key_T = self.num_heads * self.token_MS.numel() + (self.slot_T // block + 2) * rows - block + self.slot_T % block
        key_TH = key_T[:, None] + self.kept_MR.numel() * self._heads_H
        value_TH = key_TH + self.num_heads * self.kept_MR.numel() + 2 * rows
        return torch.cat([self.mixed_rows.view_as(key_TH), key_TH, value_TH], 1).flatten()

    @property
    def _heads_H(self) -> Tensor:
        return torch.arange(self.num_heads, device=self.slot_T.device)

    def _head_rows(self, token_MR: Tensor, part: int) -> Tensor:
        return ((token_MR * 3 + part) * self.num_heads + self._heads_H[:, None, None]).flatten()

    @cached_property
    def bias_MSK(self) -> Tensor:
        """Return 0 where a query may look and -inf elsewhere; the first token is seen once, as the block's own copy."""
        block, halo, device = self.token_MS.shape[1], self.halo, self.token_MS.device
        start_M = self.position_T[self.token_MS[:, 0]]
        query_MS = start_M[:, None] + torch.arange(block, device=device)
        key_MK = start_M[:, None] + torch.arange(-halo, block + halo, device=device)
        if halo:  # the band's own first token gives way to the copy, -1 is nobody
            key_MK = torch.where(key_MK > 0, key_MK, -1)
            copy_M1, none_M1 = torch.zeros_like(start_M)[:, None], torch.full_like(start_M, -1)[:, None]
            parts = key_MK.split([halo, block, halo], 1)
            key_MK = torch.cat([parts[0], copy_M1, parts[1], none_M1, parts[2]], 1)
        real_MK = (key_MK >= 0) & (key_MK < self.lengths_B[self.sequence_M][:, None])
        near_MSK = (query_MS[:, :, None] - key_MK[:, None]).abs() <= self.window // 2
        seen_MSK = real_MK[:, None] & (near_MSK | (key_MK == 0)[:, None])
        return torch.zeros(seen_MSK.shape, device=device).masked_fill_(~seen_MSK, -torch.inf)

    @cached_property
    def flex_mask(self):
        """FlexAttention's block mask: which tiles of packed tokens a tile sees, and within them who sees whom."""
        from torch.nn.attention.flex_attention import BlockMask

        tokens, half = len(self.sequence_T), self.window // 2
        sequence_T = F.pad(self.sequence_T, (0, -tokens % FLEX_TILE), value=len(self.lengths_B))
        position_T = F.pad(self.position_T, (0, -tokens % FLEX_TILE))

        def sees(batch, head, query, key):
            near = (position_T[query] - position_T[key]).abs() <= half
            return (sequence_T[query] == sequence_T[key]) & (near | (position_T[key] == 0))

        tile_T = torch.arange(tokens, device=sequence_T.device) // FLEX_TILE
        tiles = torch.arange(len(sequence_T) // FLEX_TILE, device=sequence_T.device)
        seen = (tiles[:, None] - tiles).abs() <= -(-half // FLEX_TILE)
        seen[tile_T, tile_T[self.starts_B][self.sequence_T]] = True
        order = torch.argsort(seen.int(), dim=1, descending=True, stable=True).int()
        return BlockMask.from_kv_blocks(
            seen.sum(1, dtype=torch.int32)[None, None], order[None, None], BLOCK_SIZE=FLEX_TILE, mask_mod=sees
        )


class BandedAttention(nn.Module):
    """Multi-head attention of packed tokens over the band and the global first token, without output projection."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float = 0.1):
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
        for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
            setattr(self, name, nn.Linear(hidden_size, hidden_size))
        self.num_heads, self.dropout = num_heads, dropout

    def forward(self, hidden_TD: Tensor, layout: BandLayout, first_only: bool = False) -> Tensor:
        """Return the mixed values (T, D) or, with `first_only`, those of the first tokens alone (B, D)."""
        dropout = self.dropout if self.training else 0.0
        if torch.is_autocast_enabled(hidden_TD.device.type):  # once, where every product below would do it for itself
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(hidden_TD.device.type))
        first_BD = self._global_rows(hidden_TD, layout, dropout)
        if first_only:
            return first_BD
        projected_TE = self._projected(hidden_TD)
        if layout.path != "flex":
            mixed_TD = _Band.apply(projected_TE, layout, dropout).view_as(hidden_TD)
        elif dropout:
            raise InputError(f"path='flex' has no dropout on attention weights: expected dropout 0, got {dropout}")
        else:
            mixed_TD = _flex_band(*projected_TE.chunk(3, 1), layout)
        return mixed_TD.index_copy_(0, layout.starts_B, first_BD.to(mixed_TD.dtype))

    def _projected(self, hidden_TD: Tensor) -> Tensor:
        """Return queries, keys and values side by side (T, 3 * D), by one product where the weights are at hand."""
        layers = self.query, self.key, self.value
        if not all(map(_at_hand, layers)):
            return torch.cat([layer(hidden_TD) for layer in layers], 1)
        weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
        return F.linear(hidden_TD, weight, bias)

    def _global_rows(self, hidden_TD: Tensor, layout: BandLayout, dropout: float) -> Tensor:
        """Return the mixture (B, D) each first token takes of its sequence.

        With keys W h + b, q . (W h + b) = (W' q) . h + q . b, and a mixture of values is the value of the mixture.
        """
        rows, width = len(layout.starts_B), hidden_TD.shape[1]
        per_head = self.num_heads, width // self.num_heads
        query_BHd = self.query_global(hidden_TD[layout.starts_B]).view(rows, *per_head) * per_head[1] ** -0.5
        weight, bias = _weight_and_bias(self.key_global)
        folded_BDH = torch.einsum("bhd,hde->beh", query_BHd, weight.view(*per_head, width))
        hidden_MSD = hidden_TD.index_select(0, layout.token_MS.flatten()).view(*layout.token_MS.shape, width)
        scores_TH = torch.bmm(hidden_MSD, folded_BDH[layout.sequence_M]).flatten(0, 1)[layout.slot_T]
        padded_T = layout.sequence_T * layout.longest + layout.position_T
        scores_BLH = scores_TH.new_full((rows * layout.longest, self.num_heads), -torch.inf)
        scores_BLH = scores_BLH.index_copy(0, padded_T, scores_TH).view(rows, layout.longest, -1)
        # the key bias moves all scores of a row alike; it is added to stay a used parameter
        scores_BLH = scores_BLH + (query_BHd * bias.view(*per_head)).sum(-1)[:, None]
        weights_BLH = F.dropout(scores_BLH.softmax(1), dropout)
        weights_TH = weights_BLH.flatten(0, 1).index_select(0, padded_T)
        weights_MSH = weights_TH.new_zeros(layout.token_MS.numel(), self.num_heads)
        weights_MSH = weights_MSH.index_copy(0, layout.slot_T, weights_TH).view(*layout.token_MS.shape, -1)
        mixed_MHD = torch.bmm(weights_MSH.transpose(1, 2).to(hidden_MSD.dtype), hidden_MSD)
        mixed_BHD = mixed_MHD.new_zeros(rows, *mixed_MHD.shape[1:]).index_add(0, layout.sequence_M, mixed_MHD)
        weight, bias = _weight_and_bias(self.value_global)
        mixed_BHd = torch.einsum("bhe,hde->bhd", mixed_BHD, weight.view(*per_head, width))
        return (mixed_BHd + weights_BLH.sum(1)[:, :, None] * bias.view(*per_head)).flatten(1)


class _Band(torch.autograd.Function):
    """Softmax attention of each block over the keys it sees, for dense and blocked layouts alike.

    Written out because the windows overlap: autograd would copy them, and scatter their gradients element by element.
    From queries, keys and values side by side (T, 3 * H * d) to the mixed values (T * H, d).
    """

    @staticmethod
    def forward(ctx, projected_TE: Tensor, layout: BandLayout, dropout: float) -> Tensor:
        dim = projected_TE.shape[1] // (3 * layout.num_heads)
        gathered = projected_TE.reshape(-1, dim).index_select(0, layout.gathered_rows)
        query, key, value = _split(gathered, layout)
        scores, bias = _product(query, _seen(key, layout), dim**-0.5), layout.bias_MSK
        scores.view(-1, *bias.shape).add_(bias.to(scores.dtype))  # in one type: 0 and -inf are exact
        weights = scores.softmax(-1).to(scores.dtype)  # summed up in fp32
        keep = [_keep(weights, dropout)] if dropout else []
        mixed = _product(_masked(weights, *keep), _seen(value, layout).transpose(1, 2), 1 / (1 - dropout))
        ctx.save_for_backward(gathered, weights, *keep)
        ctx.layout, ctx.dropout = layout, dropout
        return mixed.view(-1, dim).index_select(0, layout.mixed_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, packed: Tensor):
        gathered, weights, *keep = ctx.saved_tensors
        layout, dim, factor = ctx.layout, gathered.shape[1], 1 / (1 - ctx.dropout)
        query, key, value = _split(gathered, layout)
        gradient = torch.zeros_like(query).view(-1, dim).index_copy_(0, layout.mixed_rows, packed).view_as(query)
        scores = _product(gradient, _seen(value, layout), factor)
        for mask in keep:
            scores.view(mask.dtype).mul_(mask)
        scores = torch._softmax_backward_data(scores, weights, -1, scores.dtype)
        returned = torch.empty_like(gathered)
        query_grad, key_grad, value_grad = _split(returned, layout)
        query_grad.copy_(_product(scores, _seen(key, layout).transpose(1, 2), dim**-0.5))
        first_key_BD = _give_back(key_grad, scores, query, dim**-0.5, layout)
        first_value_BD = _give_back(value_grad, _masked(weights, *keep), gradient, factor, layout)
        packed = returned.index_select(0, layout.returned_rows).view(3 * len(layout.slot_T), -1)
        if layout.halo:
            packed.index_add_(0, 3 * layout.starts_B + 1, first_key_BD)
            packed.index_add_(0, 3 * layout.starts_B + 2, first_value_BD)
        return packed.view(len(layout.slot_T), -1), None, None


def _split(gathered: Tensor, layout: BandLayout) -> tuple[Tensor, Tensor, Tensor]:
    """View gathered rows as queries (H * M, S, d), stored keys and stored values ((H * M + 2) * R, d)."""
    slots = layout.num_heads * layout.token_MS.numel()
    query, key, value = gathered.tensor_split((slots, (slots + len(gathered)) // 2))
    return query.view(-1, layout.token_MS.shape[1], gathered.shape[1]), key, value


def _seen(stored: Tensor, layout: BandLayout) -> Tensor:
    """View the stored rows (all blocks one behind the other) as what each block sees: (H * M, d, K), overlapping."""
    size = layout.kept_MR.shape[1] + 2 * layout.halo + bool(layout.halo)
    skipped = layout.kept_MR.shape[1] - layout.halo
    return stored[skipped : len(stored) - skipped + bool(layout.halo)].unfold(0, size, layout.kept_MR.shape[1])


def _give_back(stored: Tensor, left: Tensor, right: Tensor, factor: float, layout: BandLayout) -> Tensor | None:
    """Sum factor * left' right, gradients of what each block sees, into the stored rows they belong to.

    Return what belongs to the first tokens (B, D), whose copies lie in every block, if blocked.
    """
    halo, rows, dim = layout.halo, layout.kept_MR.shape[1], right.shape[-1]
    seen, stored = _product(left.transpose(1, 2), right, factor), stored.view(-1, rows, dim)
    stored[1:-1] = seen[:, halo : halo + rows]
    if not halo:
        return None
    stored[:-2, rows - halo :] += seen[:, :halo]
    stored[2:, 1 : 1 + halo] += seen[:, halo + rows + 1 :]
    copies_MHd = stored[1:-1, 0].view(layout.num_heads, -1, dim).transpose(0, 1)
    first_BHd = copies_MHd.new_zeros(len(layout.starts_B), *copies_MHd.shape[1:])
    return first_BHd.index_add_(0, layout.sequence_M, copies_MHd).flatten(1)


def _product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    return torch.baddbmm(left.new_zeros(()), left, right, beta=0, alpha=factor)


def _keep(like: Tensor, dropout: float) -> Tensor:
    """Draw 0 for a share of the numbers and 1 elsewhere; sixteen random bits decide on each, to 1/65536 of the share.

    The mask has the numbers' type or, if that is a half precision, the integers of its size: see `_masked`.
    """
    words = -(-like.numel() // 4)
    bits = torch.empty(words, dtype=torch.int64, device=like.device).random_(-(2**63), None).view(torch.int16)
    bits = bits[: like.numel()].view(like.shape)
    threshold = min(round(dropout * 2**16), 2**16 - 1) - 2**15
    return torch.ge(bits, threshold, out=bits if like.itemsize == 2 else like.new_empty(like.shape))


def _masked(x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Multiply by a mask; a product of integers, or of floats, is many times as fast as torch.where."""
    return x if keep is None else (x.view(keep.dtype) * keep).view(x.dtype)


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, dropout: float) -> Tensor:
        ctx.factor, keep = 1 / (1 - dropout), _keep(x, dropout)
        ctx.save_for_backward(keep)
        return _masked(x, keep).mul_(ctx.factor)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        return _masked(gradient.contiguous(), *ctx.saved_tensors).mul_(ctx.factor), None


class Dropout(nn.Dropout):
    """Dropout that draws sixteen bits a number, from the default generator: a third of the library's time on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = self.training and 0 < self.p < 1 and not x.is_cuda
        return _Dropped.apply(x, self.p) if drawn else super().forward(x)


def _at_hand(layer: nn.Module) -> bool:
    """Whether a layer's weights say what it computes: not under an adapter, nor where ZeRO 3 gathers them at a call."""
    return type(layer) is nn.Linear and not hasattr(layer.weight, "ds_id")


def _weight_and_bias(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """Return what a linear layer computes as matrix and bias; one whose weights are not at hand is asked for both."""
    if _at_hand(linear):
        return linear.weight, linear.bias
    like = next(linear.parameters())
    asked = torch.eye(linear.in_features + 1, linear.in_features, dtype=like.dtype, device=like.device)
    with torch.autocast(like.device.type, enabled=False):  # in half precision a large bias would round the matrix away
        asked = linear(asked)
    return (asked[:-1] - asked[-1]).T, asked[-1]


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_band(query_TD: Tensor, key_TD: Tensor, value_TD: Tensor, layout: BandLayout) -> Tensor:
    """Attend by FlexAttention over the packed tokens, filled up to whole tiles."""
    from torch.nn.attention.flex_attention import flex_attention

    tokens = len(query_TD)
    filled = [F.pad(x, (0, 0, 0, -tokens % FLEX_TILE)) for x in (query_TD, key_TD, value_TD)]
    heads = [x.view(1, len(x), layout.num_heads, -1).transpose(1, 2) for x in filled]
    attend = _compiled_flex() if query_TD.is_cuda else flex_attention
    mixed = attend(*heads, block_mask=layout.flex_mask)
    return mixed.transpose(1, 2).reshape(len(filled[0]), -1)[:tokens]
