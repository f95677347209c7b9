"""Write a sequence model as one graph from padded item ids to scores, for torch.export and ONNX runtimes.

The graph keeps the padding-free computation and takes any batch and any length up to `max_sequence_length`; a recurrent
model, whose steps are unrolled, takes exactly that many columns.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from textrec.models.sequence_model import Layout, SequenceModel
from textrec.schema import PADDING_ID, InputError


class _TraceableLayout(Layout):
    """The same map with a width known from the shapes, since a traced graph cannot take it from the lengths."""

    @classmethod
    def of(cls, real_BL: Tensor) -> "_TraceableLayout":
        width = real_BL.shape[1]
        rows_T, places_T = real_BL.nonzero(as_tuple=True)
        columns_T = (real_BL.cumsum(1) - 1)[rows_T, places_T]
        return cls(rows_T, columns_T, real_BL.sum(1), width, rows_T * width + columns_T)

    def pad(self, packed_TD: Tensor) -> Tensor:
        num_rows, width = self.lengths_B.shape[0], packed_TD.shape[1]  # `len` would fix the batch size
        block = packed_TD.new_zeros(num_rows * self.max_length, width)
        return block.index_copy(0, self.slots_T, packed_TD).view(num_rows, self.max_length, width)

    @property
    def tiles(self) -> tuple[Tensor, Tensor, list[Layout]]:
        return self.rows_T, self.rows_T, []  # how many there are would depend on the lengths

    def last(self, packed_TD: Tensor) -> Tensor:
        ends_B = (self.lengths_B.cumsum(0) - 1).clamp(min=0)
        with_spare = torch.cat([packed_TD, packed_TD.new_zeros(1, packed_TD.shape[1])])  # a batch may be all padding
        return with_spare[ends_B] * (self.lengths_B > 0)[:, None]


@contextmanager
def _traceable_layouts() -> Iterator[None]:
    original = Layout.__dict__["of"]
    Layout.of = _TraceableLayout.of
    try:
        yield
    finally:
        Layout.of = original


class _Scorer(nn.Module):
    """Scores (B, num_items + 1) of all items after each history; column 0, the padding, is -inf."""

    def __init__(self, model: SequenceModel):
        super().__init__()
        self.model = model

    def forward(self, items_BL: Tensor) -> Tensor:
        scores_BI = self.model.scores(self.model.encode(items_BL), self.model.item_vectors())
        return torch.cat([torch.full_like(scores_BI[:, :1], -torch.inf), scores_BI[:, PADDING_ID + 1 :]], 1)


def export_program(model: SequenceModel) -> torch.export.ExportedProgram:
    """Return the graph from `items_BL` (int64, 0 pads either side) to scores (B, num_items + 1); column 0 is -inf.

    Raises `InputError` for a model that attends its padding, as its graph would depend on the amount of it, and for
    one whose attention goes through a batch row by row (`exportable`).
    """
    if not model.exportable:
        raise InputError(f"{type(model).__name__}: its attention depends on the lengths of a batch and has no graph")
    if getattr(model.config, "attend_padding", False):
        raise InputError(f"attend_padding=True: a {type(model).__name__} that attends padding cannot be exported")
    length = model.config.max_sequence_length - hasattr(model.config, "mask_id")  # the mask token takes a place
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    example_BL = torch.ones(2, length if recurrent else min(length, 3), dtype=torch.long, device=_device(model))
    shapes = {0: torch.export.Dim("batch", min=1)}
    if not recurrent and length > 1:
        shapes[1] = torch.export.Dim("length", min=1, max=length)
    was_training = model.training
    try:
        with torch.no_grad(), _traceable_layouts():
            return torch.export.export(_Scorer(model.eval()), (example_BL,), dynamic_shapes={"items_BL": shapes})
    finally:
        model.train(was_training)


def export_onnx(model: SequenceModel, path: Path) -> None:
    """Write `export_program(model)` as an ONNX file with input `items` and output `scores`; needs onnxscript."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    program = torch.onnx.export(
        export_program(model), dynamo=True, input_names=["items"], output_names=["scores"], verbose=False
    )
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        program.save(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
