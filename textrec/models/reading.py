"""Histories that grow, for models whose states depend on no later item. N new positions of a row, K of its window."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.sequence_model import Layout, SequenceModel
from textrec.schema import PADDING_ID


class Reading:
    """Histories that grow: `user_vectors_BD` is what `encode` would return, at the cost of the new positions only.

    The model's `continue_reading` returns the states of what is new. The newest `unsettled` positions of a row may
    change yet and are new at every step. A history longer than `max_sequence_length` loses its oldest item, and with it
    every state that has seen that item: from then on each step reads the windows of all rows anew.
    """

    def __init__(self, model: SequenceModel, items_BL: Tensor, times_BL=None, requests_B=None, unsettled: int = 0):
        self.model, self.unsettled, self.kept = model, unsettled, {}
        self.items_BL = self.times_BL = items_BL[:, :0]
        self.settled_B = items_BL.new_zeros(len(items_BL))
        self.user_vectors_BD = model.item_table.weight.new_zeros(len(items_BL), model.config.embedding_dim)
        self.extend(items_BL, times_BL, requests_B)

    @torch.no_grad()
    def extend(self, items_BN: Tensor, times_BN: Tensor | None = None, requests_B: Tensor | None = None) -> Tensor:
        """Append N items per row (0: none) and return the user vectors (B, D).

        Times and requests are `encode`'s, of the new items and after the newest; give times always or never.
        """
        window = self.model.config.max_sequence_length
        times_BN = torch.zeros_like(items_BN) if times_BN is None else times_BN
        items_BL, times_BL = torch.cat([self.items_BL, items_BN], 1), torch.cat([self.times_BL, times_BN], 1)
        real_BL = items_BL != PADDING_ID
        if real_BL.sum(1).max() > window:
            self.settled_B = torch.zeros_like(self.settled_B)
        self.items_BL, self.times_BL = (right_edge(each, real_BL, window) for each in (items_BL, times_BL))
        real_BL = self.items_BL != PADDING_ID
        new_BL, lengths_B = real_BL & (real_BL.cumsum(1) > self.settled_B[:, None]), real_BL.sum(1)
        self.layout, self.length = Layout.of(new_BL), max(int(lengths_B.max()), 1)
        columns_N = torch.arange(self.layout.max_length, device=items_BN.device)
        self.places_BN = (self.settled_B[:, None] + columns_N).clamp_max(self.length - 1)
        self.places_T = self.places_BN[self.layout.rows_T, self.layout.columns_T]
        self.seen_BNK = torch.arange(self.length, device=items_BN.device) <= self.places_BN[:, :, None]
        self.settled_B = (lengths_B - self.unsettled).clamp_min(0)
        states_TD = self.model.continue_reading(self, self.items_BL[new_BL], self.times_BL[new_BL], requests_B)
        read_B1 = self.layout.lengths_B[:, None] > 0
        self.user_vectors_BD = torch.where(read_B1, self.layout.last(states_TD), self.user_vectors_BD)
        return self.user_vectors_BD

    def remember(self, what: Any, new_TC: Tensor) -> Tensor:
        """Keep numbers of the new positions under the key `what`, and return those of all positions (B, K, C)."""
        if what not in self.kept:
            self.kept[what] = new_TC.new_zeros(*self.items_BL.shape, new_TC.shape[1])
        self.kept[what][self.layout.rows_T, self.places_T] = new_TC
        return self.kept[what][:, : self.length]


class PointwiseReading(Reading):
    """Does for HSTU's layers what `Tiles` do in training, for few queries and many keys: explicit weights, no tiles."""

    buckets_BNK: Tensor  # of elapsed times; a model whose layers have tables of them fills them in

    def attend(self, layer: nn.Module, q_TC, k_TC, v_TC, bias_LL: Tensor, table: Tensor | None) -> Tensor:
        """Return `silu(q k + bias_LL + table[bucket]) v` (T, H * D); the bias makes what is later vanish."""
        sizes, pairs_BKC = (k_TC.shape[1], v_TC.shape[1]), self.remember(layer, torch.cat([k_TC, v_TC], 1))
        blocks = self.layout.pad(q_TC), *pairs_BKC.split(sizes, 2)
        q, k, v = (each.unflatten(2, (layer.config.num_heads, -1)).transpose(1, 2) for each in blocks)
        bias_BNK = bias_LL[self.places_BN] + (0 if table is None else table[self.buckets_BNK])
        return self.layout.pack((F.silu(q @ k.mT + bias_BNK[:, None]) @ v).transpose(1, 2).flatten(2))

    def mix_by_table(self, layer: nn.Module, v_TC: Tensor, table: Tensor) -> Tensor:
        """Return `weights v` (T, H * D) with the values that `attend` has just kept for this layer."""
        weights_BNK = table[self.places_BN] if table.dim() == 2 else table[self.buckets_BNK] * self.seen_BNK
        return self.layout.pack(weights_BNK @ self.kept[layer][:, : self.length, -v_TC.shape[1] :])


def right_edge(block_BL: Tensor, real_BL: Tensor, length: int) -> Tensor:
    """Move the newest `length` real columns of each row to the right edge of a block of `length` columns."""
    order_BL = real_BL.int().argsort(dim=1, stable=True)
    return F.pad(block_BL.gather(1, order_BL), (length, 0))[:, -length:]
