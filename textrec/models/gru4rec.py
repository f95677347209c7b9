"""GRU4Rec (Hidasi et al. 2016): gated recurrent units over the item vectors of a history.

Deviates from the paper: whole histories instead of session-parallel batches, and the loss is the caller's (with
cross-entropy over the catalogue it is the baseline of "Dross into Gold").
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from textrec.models.sequence_model import Layout, SequenceModel, newest
from textrec.schema import PADDING_ID


@dataclass(frozen=True, kw_only=True)
class GRU4RecConfig:
    """What a GRU4Rec is."""

    num_items: int  # catalogue size, padding not counted
    max_sequence_length: int = 200  # newest items read
    embedding_dim: int = 64  # width of items and states
    num_blocks: int = 1  # recurrent layers
    dropout: float = 0.2  # on embeddings, between layers and on states
    tie_item_table: bool = True  # score with the input table

    def __post_init__(self):
        for name in ("num_items", "max_sequence_length", "embedding_dim", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")


class GRU4Rec(SequenceModel):
    """Predict the next item from the recurrent state after the newest one."""

    config_class = GRU4RecConfig

    def __init__(self, config: GRU4RecConfig):
        super().__init__(config)
        rows, width = config.num_items + 1, config.embedding_dim
        self.item_table = nn.Embedding(rows, width, padding_idx=PADDING_ID)
        self.output_table = None if config.tie_item_table else nn.Embedding(rows, width, padding_idx=PADDING_ID)
        self.dropout = nn.Dropout(config.dropout)
        between = config.dropout if config.num_blocks > 1 else 0.0
        self.recurrence = nn.GRU(width, width, config.num_blocks, dropout=between, batch_first=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the tables and input weights Xavier-normal, the recurrent ones orthogonal; biases and padding zero."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.zeros_(parameter)
            elif "weight_hh" in name:
                for gate in parameter.data.chunk(3):
                    nn.init.orthogonal_(gate)
            else:
                nn.init.xavier_normal_(parameter)
        with torch.no_grad():
            for table in (self.item_table, self.output_table):
                if table is not None:
                    table.weight[PADDING_ID].zero_()

    def item_vectors(self) -> Tensor:
        return self.item_table.weight if self.output_table is None else self.output_table.weight

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        items_BL = newest(items_BL, self.config.max_sequence_length)
        real_BL = items_BL != PADDING_ID
        layout = Layout.of(real_BL)
        # left-aligned, so pads come after what is read; a packed sequence would skip them but takes four times as long
        block_BLD = layout.pad(self.dropout(self.item_table(items_BL[real_BL])))
        return self.dropout(layout.pack(self.recurrence(block_BLD)[0]))
