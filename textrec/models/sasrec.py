"""SASRec (Kang & McAuley 2018, section III) and its descendants: causal self-attention over item vectors.

One module covers the published variants through its configuration: the original block (residual on the normalised
query), pre- and post-norm, LiGR's gated block (eSASRec), tied or separate output table, inner product or cosine.
Deviates from the original by default: padding is never attended and costs nothing, positions are counted from the
newest item. `attend_padding` brings the original's left padding back (pmixer's port attends it through the key bias).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.sequence_model import Layout, SequenceModel, newest
from textrec.schema import PADDING_ID


@dataclass(frozen=True, kw_only=True)
class SASRecConfig:
    """Every choice that distinguishes the published SASRec variants."""

    num_items: int  # catalogue size, padding not counted
    max_sequence_length: int = 200  # items read, newest kept
    embedding_dim: int = 64  # width of items, states and (times hidden_multiplier) feed-forward
    num_blocks: int = 2
    num_heads: int = 1
    dropout: float = 0.2  # on embeddings, attention output and feed-forward
    attention_dropout: float = 0.2  # on attention weights
    norm: str = "pre"  # original | pre | post
    block: str = "sasrec"  # sasrec | ligr
    hidden_multiplier: int = 1  # feed-forward width over embedding_dim
    activation: str = "relu"  # relu | gelu
    tie_item_table: bool = True  # score with the input table
    scale_item_table: bool = True  # times sqrt(embedding_dim) at the input
    output_projection: bool = True  # after the heads are joined
    norm_eps: float = 1e-8
    attend_padding: bool = False  # left-pad to max_sequence_length and attend the padding, as published ports do
    mask_padding_keys: bool = False  # with attend_padding: padded rows are kept but not attended (gSASRec)
    temperature: float | None = None  # None: inner product; else cosine / temperature
    initial_std: float | None = None  # None: Xavier normal; else N(0, std)
    initial_table_std: float | None = None  # of item and position tables; None: as the other matrices

    def __post_init__(self):
        for name, allowed in (("norm", ("original", "pre", "post")), ("block", ("sasrec", "ligr"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {allowed}")
        if self.activation not in ("relu", "gelu"):
            raise ValueError(f"activation={self.activation!r}: expected relu or gelu")
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"embedding_dim={self.embedding_dim} is not a multiple of num_heads={self.num_heads}")
        if self.num_items < 1 or self.max_sequence_length < 1:
            raise ValueError(f"{self.num_items=}, {self.max_sequence_length=}: expected at least 1")


class CausalAttention(nn.Module):
    """Multi-head causal attention whose projections run on real positions only; queries and keys may differ."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        width = config.embedding_dim
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.output = nn.Linear(width, width) if config.output_projection else nn.Identity()
        self.num_heads, self.dropout = config.num_heads, config.attention_dropout

    def forward(self, query_TD: Tensor, source_TD: Tensor, layout: Layout, keys_BL: Tensor | None) -> Tensor:
        if query_TD is source_TD:
            weight = torch.cat([self.query.weight, self.key.weight, self.value.weight])
            bias = torch.cat([self.query.bias, self.key.bias, self.value.bias])
            joined_TC = F.linear(query_TD, weight, bias)
        else:
            joined_TC = torch.cat([self.query(query_TD), self.key(source_TD), self.value(source_TD)], 1)
        mask = None if keys_BL is None else keys_BL[:, None, None, :] & _triangle(keys_BL)  # rows of one length alone

        def attend(joined_BLC: Tensor, tile: Layout) -> Tensor:
            heads = joined_BLC.view(*joined_BLC.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(
                *heads, attn_mask=mask, is_causal=mask is None, dropout_p=self.dropout if self.training else 0.0
            )
            return mixed.transpose(1, 2).flatten(2)

        return self.output(layout.in_blocks(joined_TC, attend))


def _triangle(keys_BL: Tensor) -> Tensor:
    """Causal mask that lets every query see itself, so that a fully padded row stays finite."""
    length = keys_BL.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=keys_BL.device).tril()


class FeedForward(nn.Module):
    """Position-wise two-layer network (section III-C); dropout before the activation as published."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        hidden = config.embedding_dim * config.hidden_multiplier
        self.enter, self.leave = nn.Linear(config.embedding_dim, hidden), nn.Linear(hidden, config.embedding_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.activation = F.relu if config.activation == "relu" else F.gelu

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.dropout(self.leave(self.activation(self.dropout(self.enter(x_TD)))))


class SASRecBlock(nn.Module):
    """Attention and feed-forward in the original, pre-norm or post-norm arrangement."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        self.norm = config.norm
        self.attention_norm = nn.LayerNorm(config.embedding_dim, eps=config.norm_eps)
        self.forward_norm = nn.LayerNorm(config.embedding_dim, eps=config.norm_eps)
        self.attention, self.feed_forward = CausalAttention(config), FeedForward(config)

    def forward(self, x_TD: Tensor, layout: Layout, keys_BL: Tensor | None) -> Tensor:
        if self.norm == "post":
            x_TD = self.attention_norm(x_TD + self.attention(x_TD, x_TD, layout, keys_BL))
            return self.forward_norm(x_TD + self.feed_forward(x_TD))
        query_TD = self.attention_norm(x_TD)
        if self.norm == "pre":
            x_TD = x_TD + self.attention(query_TD, query_TD, layout, keys_BL)
            return x_TD + self.feed_forward(self.forward_norm(x_TD))
        x_TD = self.forward_norm(query_TD + self.attention(query_TD, x_TD, layout, keys_BL))
        return x_TD + self.feed_forward(x_TD)


class LiGRBlock(nn.Module):
    """LiGR block of eSASRec: each branch is gated by a sigmoid of the un-normalised input; SwiGLU feed-forward."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        width, hidden = config.embedding_dim, config.embedding_dim * config.hidden_multiplier
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.forward_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.attention = CausalAttention(config)
        self.attention_gate, self.forward_gate = nn.Linear(width, width), nn.Linear(width, width)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, layout: Layout, keys_BL: Tensor | None) -> Tensor:
        normed_TD = self.attention_norm(x_TD)
        attended_TD = self.dropout(self.attention(normed_TD, normed_TD, layout, keys_BL))
        x_TD = x_TD + torch.sigmoid(self.attention_gate(x_TD)) * attended_TD
        gate, up = self.gate_up(self.forward_norm(x_TD)).chunk(2, dim=-1)
        return x_TD + torch.sigmoid(self.forward_gate(x_TD)) * self.dropout(self.down(self.dropout(F.silu(gate) * up)))


class SASRec(SequenceModel):
    """Predict the next item from the attention state of the newest one."""

    config_class = SASRecConfig

    def __init__(self, config: SASRecConfig):
        super().__init__(config)
        rows, width = config.num_items + 1, config.embedding_dim
        self.item_table = nn.Embedding(rows, width, padding_idx=PADDING_ID)
        self.output_table = None if config.tie_item_table else nn.Embedding(rows, width, padding_idx=PADDING_ID)
        # row n is the n-th position counted back from the newest item; row 0 stays unused
        self.position_table = nn.Embedding(config.max_sequence_length + 1, width, padding_idx=0)
        self.dropout = nn.Dropout(config.dropout)
        block = SASRecBlock if config.block == "sasrec" else LiGRBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.num_blocks))
        self.final_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all matrices afresh (biases zero, norms one), then zero the padding rows."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif self.config.initial_std is None:
                nn.init.xavier_normal_(parameter)
            else:
                nn.init.normal_(parameter, std=self.config.initial_std)
        with torch.no_grad():
            for table in (self.item_table, self.position_table, self.output_table):
                if table is not None:
                    if self.config.initial_table_std is not None:
                        table.weight.normal_(std=self.config.initial_table_std)
                    table.weight[0].zero_()

    def item_vectors(self) -> Tensor:
        table = self.item_table if self.output_table is None else self.output_table
        return table.weight if self.config.temperature is None else F.normalize(table.weight, dim=-1, eps=1e-6)

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        items_BL = newest(items_BL, self.config.max_sequence_length)
        real_BL = items_BL != PADDING_ID
        if self.config.attend_padding:
            items_BL = _left_padded(items_BL, real_BL, self.config.max_sequence_length)
            real_BL = items_BL != PADDING_ID
            layout = Layout.of(torch.ones_like(real_BL))
            keys_BL = real_BL if self.config.mask_padding_keys else None
        else:
            layout, keys_BL = Layout.of(real_BL), None
        x_TD = self._embed(items_BL, layout)
        kept_T1 = (items_BL.flatten() != PADDING_ID)[:, None] if self.config.attend_padding else None
        zeroed = keys_BL is not None or (kept_T1 is not None and self.config.norm == "original")  # after every block
        for block in self.blocks:
            x_TD = block(x_TD, layout, keys_BL)
            if zeroed:
                x_TD = x_TD * kept_T1
        x_TD = self.final_norm(x_TD)
        if kept_T1 is not None:
            x_TD = x_TD[kept_T1[:, 0]]
        if self.config.temperature is not None:
            x_TD = F.normalize(x_TD, dim=-1, eps=1e-6) / self.config.temperature
        return x_TD

    def _embed(self, items_BL: Tensor, layout: Layout) -> Tensor:
        """Return item plus position vectors of the layout's positions; a padded position is a zero vector."""
        items_T = items_BL.flatten() if self.config.attend_padding else items_BL[items_BL != PADDING_ID]
        scale = math.sqrt(self.config.embedding_dim) if self.config.scale_item_table else 1.0
        if self.config.attend_padding:  # the ports count from the left edge of the padded row
            positions_T = (layout.columns_T + 1) * (items_T != PADDING_ID)
        else:
            positions_T = self.config.max_sequence_length - layout.lengths_B[layout.rows_T] + layout.columns_T + 1
        x_TD = self.dropout(self.item_table(items_T) * scale + self.position_table(positions_T))
        return x_TD * (items_T != PADDING_ID)[:, None] if self.config.attend_padding else x_TD


def _left_padded(items_BL: Tensor, real_BL: Tensor, length: int) -> Tensor:
    """Move each row's real items to the right edge of a block of `length` columns."""
    layout = Layout.of(real_BL)
    padded = items_BL.new_zeros(len(items_BL), length)
    padded[layout.rows_T, length - layout.lengths_B[layout.rows_T] + layout.columns_T] = items_BL[real_BL]
    return padded
