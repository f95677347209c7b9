"""BERT4Rec (Sun et al. 2019): a bidirectional encoder trained to fill the masked positions of a history.

Post-norm blocks with a GELU network of four times the width (sections 3.2-3.4), learned positions, scores from the
input table plus a bias per item (section 3.5); the next item is read off a mask token behind the history (section 3.6).
Deviates from the paper: no projection before the scores, and positions count back from the newest item. The defaults
are those of "Dross into Gold" (width 64, 2 blocks, 2 heads, mask probability .2); "The Elephant in the Room" has width
768, 4 heads, length 50, mask probability .15, `tie_item_table=False` and `norm_embedding=False`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.sequence_model import Layout, SequenceModel, newest
from textrec.schema import PADDING_ID

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen positions, as BERT; the rest keep their item


@dataclass(frozen=True, kw_only=True)
class BERT4RecConfig:
    """What a BERT4Rec is; how much of a history is masked belongs to training (`mask_histories`)."""

    num_items: int  # catalogue size, padding and mask not counted
    max_sequence_length: int = 200  # positions read, the mask token included
    embedding_dim: int = 64
    num_blocks: int = 2
    num_heads: int = 2
    dropout: float = 0.1  # on embeddings and both branches
    attention_dropout: float = 0.1  # on attention weights
    norm_embedding: bool = True  # layer norm behind item plus position vector
    tie_item_table: bool = True  # score with the input table
    norm_eps: float = 1e-12
    initial_std: float = 0.02  # of every matrix; biases start at zero

    def __post_init__(self):
        if self.embedding_dim % self.num_heads:
            raise ValueError(f"embedding_dim={self.embedding_dim} is not a multiple of num_heads={self.num_heads}")
        if self.num_items < 1 or self.max_sequence_length < 2:
            raise ValueError(
                f"num_items={self.num_items}, max_sequence_length={self.max_sequence_length}: expected >= 1 and >= 2"
            )

    @property
    def mask_id(self) -> int:
        """Id of the mask token, one behind the catalogue."""
        return self.num_items + 1


class BERT4RecBlock(nn.Module):
    """Attention over the real positions of a history, then the feed-forward network, each normed after its residual."""

    def __init__(self, config: BERT4RecConfig):
        super().__init__()
        width = config.embedding_dim
        self.num_heads, self.attention_dropout = config.num_heads, config.attention_dropout
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.enter, self.leave = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.forward_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, layout: Layout) -> Tensor:
        attended_TD = self.output(layout.in_blocks(self.query_key_value(x_TD), self._attend))
        x_TD = self.attention_norm(x_TD + self.dropout(attended_TD))
        return self.forward_norm(x_TD + self.dropout(self.leave(F.gelu(self.enter(x_TD), approximate="tanh"))))

    def _attend(self, joined_BLC: Tensor, tile: Layout) -> Tensor:
        heads = joined_BLC.view(*joined_BLC.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        keys_B11L = torch.arange(tile.max_length, device=joined_BLC.device) < tile.lengths_B[:, None, None, None]
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*heads, attn_mask=keys_B11L, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)


class BERT4Rec(SequenceModel):
    """Score an item by `state . item_vector + bias`; the bias travels as one more dimension of both vectors."""

    config_class = BERT4RecConfig

    def __init__(self, config: BERT4RecConfig):
        super().__init__(config)
        rows, width = config.num_items + 1, config.embedding_dim
        self.item_table = nn.Embedding(rows + 1, width, padding_idx=PADDING_ID)  # the last row is the mask token
        self.output_table = None if config.tie_item_table else nn.Embedding(rows, width, padding_idx=PADDING_ID)
        self.output_bias = nn.Parameter(torch.zeros(rows))
        self.position_table = nn.Embedding(config.max_sequence_length, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.norm_eps) if config.norm_embedding else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(BERT4RecBlock(config) for _ in range(config.num_blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all matrices afresh (biases zero, norms one), then zero the padding rows."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=self.config.initial_std)
            else:
                nn.init.constant_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
        with torch.no_grad():
            for table in (self.item_table, self.output_table):
                if table is not None:
                    table.weight[PADDING_ID].zero_()

    def item_vectors(self) -> Tensor:
        """Return the output rows with their bias as last column: (num_items + 1, embedding_dim + 1)."""
        rows = self.item_table.weight[:-1] if self.output_table is None else self.output_table.weight
        return torch.cat([rows, self.output_bias[:, None]], 1)

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        """Return the states (T, embedding_dim + 1) of the real positions; mask tokens (`config.mask_id`) are real."""
        items_BL = newest(items_BL, self.config.max_sequence_length)
        real_BL = items_BL != PADDING_ID
        layout = Layout.of(real_BL)
        positions_T = self.config.max_sequence_length - layout.lengths_B[layout.rows_T] + layout.columns_T
        x_TD = self.item_table(items_BL[real_BL]) + self.position_table(positions_T)
        x_TD = self.dropout(self.embedding_norm(x_TD))
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return F.pad(x_TD, (0, 1), value=1.0)

    def encode(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        """Return the states (B, embedding_dim + 1) of a mask token set behind the newest items of each history."""
        items_BL = newest(items_BL, self.config.max_sequence_length - 1)
        masks_B1 = torch.full_like(items_BL[:, :1], self.config.mask_id)
        return super().encode(torch.cat([items_BL, masks_B1], 1))


def mask_histories(
    items_BL: np.ndarray,
    num_items: int,
    rng: np.random.Generator,
    *,
    mask_probability: float = 0.2,
    last_probability: float = 0.1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return `(inputs_BL, targets_BL)` of the cloze task; a target of 0 asks for nothing.

    Each item is chosen with `mask_probability`; of the chosen, 80 % become the mask token, 10 % a random item and 10 %
    stay. A share `last_probability` of the rows hides the newest item alone, as inference does; so does a
    row in which nothing was chosen. A row of one item has nothing to learn from and gets no target.
    """
    real_BL = items_BL != PADDING_ID
    from_end_BL = real_BL[:, ::-1].cumsum(1)[:, ::-1]  # the newest item counts 1
    chosen_BL = real_BL & (rng.random(items_BL.shape) < mask_probability)
    only_last_B1 = (rng.random((len(items_BL), 1)) < last_probability) | ~chosen_BL.any(1, keepdims=True)
    chosen_BL = np.where(only_last_B1, real_BL & (from_end_BL == 1), chosen_BL) & (real_BL.sum(1, keepdims=True) > 1)
    fate_BL = np.where(only_last_B1, 0.0, rng.random(items_BL.shape))
    random_BL = rng.integers(1, num_items + 1, items_BL.shape)
    replacement_BL = np.select(
        [fate_BL < MASK_SHARE, fate_BL < MASK_SHARE + RANDOM_SHARE], [num_items + 1, random_BL], items_BL
    )
    return np.where(chosen_BL, replacement_BL, items_BL), np.where(chosen_BL, items_BL, PADDING_ID)
