"""What every model that reads a history of item ids shares: the padding-free layout, scoring, saving, recommending.

Linear layers, norms and losses see only the T real positions of a batch; padded blocks, of rows of like length, exist
inside attention alone. `Layout` holds the map between the two. Shape suffixes: see `textrec.schema`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from textrec.models.saving import Saved
from textrec.schema import PADDING_ID, InputError


@dataclass(frozen=True)
class Layout:
    """Where each real position of a batch sits in its row once padding (left, right or between) is squeezed out."""

    rows_T: Tensor
    columns_T: Tensor
    lengths_B: Tensor
    max_length: int
    slots_T: Tensor  # rows_T * max_length + columns_T

    @classmethod
    def of(cls, real_BL: Tensor) -> "Layout":
        """Build the layout from a mask of real positions."""
        lengths_B = real_BL.sum(1)
        max_length = max(int(lengths_B.max()), 1) if len(lengths_B) else 1
        columns_T = (real_BL.cumsum(1) - 1)[real_BL]
        rows_T = torch.arange(len(real_BL), device=real_BL.device).repeat_interleave(lengths_B)
        return cls(rows_T, columns_T, lengths_B, max_length, rows_T * max_length + columns_T)

    def pad(self, packed_TD: Tensor) -> Tensor:
        """Spread packed rows into a left-aligned block (B, L, D), zeros behind each row's end."""
        block = packed_TD.new_zeros(len(self.lengths_B) * self.max_length, packed_TD.shape[1])
        return block.index_copy(0, self.slots_T, packed_TD).view(len(self.lengths_B), self.max_length, -1)

    def pack(self, block_BLD: Tensor) -> Tensor:
        """Take the real positions of a left-aligned block back out: (B, L, D) -> (T, D)."""
        return block_BLD.reshape(-1, block_BLD.shape[-1]).index_select(0, self.slots_T)

    def in_blocks(self, packed_TC: Tensor, function: Callable[[Tensor, "Layout"], Tensor]) -> Tensor:
        """Apply `function` to left-aligned blocks (b, l, C) of rows of like length, and pack its (b, l, D) into (T, D).

        It is told the layout of the block. What stands behind a row's end is zero, and dropped in the result.
        """
        order_T, places_T, tiles = self.tiles
        if len(tiles) < 2:
            return self.pack(function(self.pad(packed_TC), self))
        # copied to where each position goes, as the gradient of that is a gather, and that of a gather a slow sum
        sorted_TC = torch.empty_like(packed_TC).index_copy(0, places_T, packed_TC)
        parts = zip(sorted_TC.split([len(tile.rows_T) for tile in tiles]), tiles, strict=True)
        mixed_TD = torch.cat([tile.pack(function(tile.pad(part_NC), tile)) for part_NC, tile in parts])
        return torch.empty_like(mixed_TD).index_copy(0, order_T, mixed_TD)

    @cached_property
    def tiles(self) -> tuple[Tensor, Tensor, list["Layout"]]:
        """Split the rows by length, at powers of two from 8 on: the positions in that order, its inverse, the layouts.

        On CUDA there is one tile: starting many small kernels costs more than padding.
        """
        sizes_B = torch.frexp(self.lengths_B - 0.5).exponent.clamp_min(3)  # length 2 ** (size - 1) + 1 to 2 ** size
        sizes = [] if self.lengths_B.is_cuda else sizes_B[self.lengths_B > 0].unique().tolist()
        orders, tiles = [self.rows_T[:0]], []
        for size in sizes:
            chosen_B = sizes_B == size
            order_N, lengths_B = chosen_B[self.rows_T].nonzero().flatten(), self.lengths_B[chosen_B]
            rows_N, columns_N = (chosen_B.cumsum(0) - 1)[self.rows_T[order_N]], self.columns_T[order_N]
            longest = int(lengths_B.max())
            tiles.append(Layout(rows_N, columns_N, lengths_B, longest, rows_N * longest + columns_N))
            orders.append(order_N)
        order_T = torch.cat(orders)
        return order_T, order_T.argsort(), tiles

    def last(self, packed_TD: Tensor) -> Tensor:
        """Return each row's newest state (B, D); an empty row gives zeros."""
        ends_B = self.lengths_B.cumsum(0) - 1
        states_BD = packed_TD.new_zeros(len(ends_B), packed_TD.shape[1])
        filled_B = self.lengths_B > 0
        states_BD[filled_B] = packed_TD[ends_B[filled_B]]
        return states_BD


class SequenceModel(Saved, nn.Module):
    """Base of all sequence models. A subclass names its `config_class` and writes `forward` and `item_vectors`."""

    config_class: ClassVar[type]
    exportable: bool = True  # as one graph for any batch
    reads_times: bool = False  # whether `forward` and `encode` want times; batches carry them for such models alone

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        """Return the states (T, D) of the real positions (`items_BL != 0`), row by row; padding may be on either side.

        Of a history longer than `max_sequence_length` the newest items alone are read and have states.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def item_vectors(self) -> Tensor:
        """Return the output table (num_items + 1, D) whose row 0 is padding and never ranked."""
        raise TypeError(f"{type(self).__name__} does not define item_vectors")

    def encode(self, items_BL: Tensor, times_BL: Tensor | None = None, requests_B: Tensor | None = None) -> Tensor:
        """Return the user vectors (B, D): the state after the newest item.

        A model that reads times takes the items' and those of the requests (B,) in unix seconds; without the latter
        each request comes at the time of its newest item.
        """
        items_BL = newest(items_BL, self.config.max_sequence_length)
        times = (times_BL, requests_B) if self.reads_times else ()
        return Layout.of(items_BL != PADDING_ID).last(self(items_BL, *times))

    @property
    def similarity(self) -> nn.Module | None:
        """The mixture of logits that scores in place of inner products, where the model has one."""
        return getattr(self, "mixture", None)

    def scores(self, user_vectors_BD: Tensor, item_vectors_ID: Tensor) -> Tensor:
        """Return the scores (B, I) of items for users: inner products, unless the model has a `similarity`."""
        if self.similarity is not None:
            return self.similarity(user_vectors_BD, self.similarity.items(item_vectors_ID))
        return user_vectors_BD @ item_vectors_ID.T

    @torch.no_grad()
    def recommend(
        self, history: Sequence[int], k: int, filter_seen: bool = True, times: Sequence[int] | None = None,
        request_time: int | None = None,
    ) -> list[tuple[int, float]]:  # fmt: skip
        """Return the `k` best (item id, score) pairs after a history of item ids, oldest first.

        `times` are the items' unix seconds and `request_time` that of the request, by default the newest item's; a
        model that reads no times ignores both.
        """
        unknown = [item for item in history if not 1 <= item <= self.config.num_items]
        if unknown:
            raise InputError(f"history holds item id {unknown[0]}: expected ids from 1 to {self.config.num_items}")
        if not 1 <= k <= self.config.num_items:
            raise InputError(f"k={k}: expected a number from 1 to num_items={self.config.num_items}")
        if (times is not None or request_time is not None) and len(times or ()) != len(history):
            raise InputError(f"times={times}: expected one time for each of the {len(history)} items of the history")
        was_training = self.training
        self.eval()
        item_vectors = self.item_vectors()
        items_1L = torch.tensor([list(history)], dtype=torch.long, device=item_vectors.device).view(1, -1)
        told = ()
        if self.reads_times and times is not None:
            request = times[-1:] if request_time is None else [request_time]
            told = (items_1L.new_tensor([list(times)]), items_1L.new_tensor(request))
        scores_I = self.scores(self.encode(items_1L, *told), item_vectors)[0]
        self.train(was_training)
        scores_I[PADDING_ID] = -torch.inf
        if filter_seen:
            scores_I[items_1L[0]] = -torch.inf
        best = scores_I.topk(k)
        return [(int(i), float(s)) for i, s in zip(best.indices, best.values, strict=True) if s > -torch.inf]

    @classmethod
    def kinds(cls) -> list[type]:
        """Return this class and all that derive from it: each is found once its module is imported."""
        from textrec.models import bert4rec, gru4rec, hstu, item_table, llama, sasrec, text_encoder  # noqa: F401

        return [cls, *(deeper for each in cls.__subclasses__() for deeper in each.kinds())]


def newest(items_BL: Tensor, max_length: int) -> Tensor:
    """Replace all but each row's newest `max_length` real items by padding, wherever its padding is."""
    if items_BL.shape[1] <= max_length:
        return items_BL
    from_end_BL = (items_BL != PADDING_ID).flip(1).cumsum(1).flip(1)  # the newest real item counts 1
    return items_BL * (from_end_BL <= max_length)


def rotary_turns(positions_T: Tensor, size: int, theta: float = 1e4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what `rotate` multiplies with (T, 1, size / 2): a complex number per pair of a head's `size` channels."""
    steps_P = torch.arange(0, size, 2, device=positions_T.device, dtype=dtype) / size
    angles_T1P = positions_T[:, None, None] * theta**-steps_P
    return torch.polar(torch.ones_like(angles_T1P), angles_T1P)


def rotate(x_TD: Tensor, turns_T1P: Tensor) -> Tensor:
    """Turn neighbouring pairs (0, 1), (2, 3), ... of every head by the angles of their positions, in fp32 at least."""
    exact = torch.promote_types(x_TD.dtype, torch.float32)
    pairs = torch.view_as_complex(x_TD.to(exact).unflatten(1, (-1, turns_T1P.shape[2], 2)))
    return torch.view_as_real(pairs * turns_T1P).flatten(1).to(x_TD.dtype)
