"""The item table as a choice: vectors of texts in place of random ones, trained or frozen, adapted, or beside ids.

"The Elephant in the Room" (Qu et al. 2024): item vectors of a language model, best of one tuned on behaviour, start the
embedding table of an ordinary id model, which costs nothing at inference. UniSRec (Hou et al. 2022, section 2.1) keeps
the vectors and learns parametric whitening and a mixture of experts above them instead.

Tables are (I + 1, E), row 0 is padding and zero throughout; E is the width of given vectors, D that of the model.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.bert4rec import BERT4Rec
from textrec.models.gru4rec import GRU4Rec
from textrec.models.hstu import HSTU
from textrec.models.llama import Llama
from textrec.models.sasrec import SASRec
from textrec.models.sequence_model import SequenceModel
from textrec.schema import PADDING_ID, InputError

MODELS = {each.__name__: each for each in (SASRec, BERT4Rec, GRU4Rec, HSTU, Llama)}
TRANSFORMS = ("permuted", "same_covariance", "whitened", "pca")
ADAPTORS = ("none", "linear", "mlp", "experts")


def transformed(items_IE: Tensor, names: Sequence[str], *, seed: int = 0, width: int | None = None) -> Tensor:
    """Apply transforms in order to a table.

    `permuted`: each item gets some item's vector. `same_covariance`: random vectors with the mean and the covariance of
    the given ones. `whitened`: mean zero, equal variance in all directions there are, a mean squared norm of one (with
    the axes kept: ZCA). `pca`: the `width` strongest principal components. Raises `InputError` for another name.
    """
    rows = items_IE[1:].double()
    source = torch.Generator().manual_seed(seed)
    for name in names:
        if name not in TRANSFORMS:
            raise InputError(f"transform {name!r}: expected one of {TRANSFORMS}")
        if name == "permuted":
            rows = rows[torch.randperm(len(rows), generator=source)]
            continue
        mean_E = rows.mean(0)
        left, strength, right = torch.linalg.svd(rows - mean_E, full_matrices=False)
        rank = max(int((strength > 1e-7 * strength[0]).sum()), 1)  # fewer items than directions, or equal ones
        left, strength, right = left[:, :rank], strength[:rank], right[:rank]
        if name == "same_covariance":
            drawn = torch.randn(left.shape, generator=source, dtype=left.dtype)
            left = torch.linalg.qr(drawn - drawn.mean(0)).Q  # as orthonormal as before, and as orthogonal to ones
            rows = mean_E + (left * strength) @ right
        elif name == "whitened":
            rows = left @ right * math.sqrt(len(rows) / len(strength))
        else:
            if width is None:
                raise InputError("transform 'pca' needs width=..., the number of components")
            kept = (left * strength)[:, :width]
            rows = F.pad(kept, (0, width - kept.shape[1]))
    return F.pad(rows, (0, 0, 1, 0)).to(items_IE.dtype)


@dataclass(frozen=True, kw_only=True)
class WithItemTableConfig:
    """Which model reads through the table, and how the table makes its rows from given vectors."""

    model: dict[str, Any]  # `model_type` and the fields of that model's configuration
    vector_dim: int  # E
    adaptor: str = "none"  # none | linear | mlp | experts (UniSRec)
    freeze: bool = False  # the given vectors
    add_ids: bool = False  # a trained vector per item beside the given one
    train_mask: bool = True  # of BERT4Rec's mask token; else it stays zero, as published
    num_experts: int = 8
    dropout: float = 0.2  # on what the experts read

    def __post_init__(self):
        if self.adaptor not in ADAPTORS:
            raise InputError(f"adaptor={self.adaptor!r}: expected one of {ADAPTORS}")
        if self.model.get("model_type") not in MODELS:
            raise InputError(f"model_type {self.model.get('model_type')!r}: expected one of {sorted(MODELS)}")

    @property
    def num_items(self) -> int:
        return self.model["num_items"]

    @property
    def max_sequence_length(self) -> int:
        return self.model["max_sequence_length"]


class Experts(nn.Module):
    """UniSRec's adaptor (equations 4-6): each expert shifts and projects, a gate mixes; noise while training."""

    def __init__(self, vector_dim: int, width: int, num_experts: int, dropout: float):
        super().__init__()
        self.shifts = nn.Parameter(torch.zeros(num_experts, vector_dim))
        self.weights = nn.Parameter(torch.empty(num_experts, width, vector_dim).normal_(std=0.02))
        self.gate, self.noise = (nn.Linear(vector_dim, num_experts, bias=False) for _ in range(2))
        for each in (self.gate, self.noise):
            nn.init.zeros_(each.weight)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TE: Tensor) -> Tensor:
        logits_TK = self.gate(x_TE)
        if self.training:
            logits_TK = logits_TK + torch.randn_like(logits_TK) * (F.softplus(self.noise(x_TE)) + 1e-2)
        moved_TKD = torch.einsum("te,kde->tkd", self.dropout(x_TE), self.weights)
        moved_TKD = moved_TKD - torch.einsum("ke,kde->kd", self.shifts, self.weights)
        return (logits_TK.softmax(1)[:, :, None] * moved_TKD).sum(1)


class ItemTable(nn.Module):
    """Stands where a model has its `nn.Embedding`: called, it looks rows up; `weight` is all of them (rows, D)."""

    def __init__(self, config: WithItemTableConfig, num_rows: int, width: int):
        super().__init__()
        self.num_items, size = config.num_items, config.vector_dim
        self.vectors = nn.Parameter(torch.zeros(self.num_items + 1, size), requires_grad=not config.freeze)
        self.adaptor = {
            "none": nn.Identity, "linear": lambda: nn.Linear(size, width),
            "mlp": lambda: nn.Sequential(nn.Linear(size, width), nn.GELU(), nn.Linear(width, width)),
            "experts": lambda: Experts(size, width, config.num_experts, config.dropout),
        }[config.adaptor]()  # fmt: skip
        self.ids = nn.Parameter(torch.zeros(self.num_items + 1, width)) if config.add_ids else None
        has_mask = num_rows > self.num_items + 1
        self.mask = nn.Parameter(torch.zeros(1, width), requires_grad=config.train_mask) if has_mask else None

    @property
    def weight(self) -> Tensor:
        rows = self.adaptor(self.vectors[1:])
        rows = F.pad(rows if self.ids is None else rows + self.ids[1:], (0, 0, 1, 0))
        return rows if self.mask is None else torch.cat([rows, self.mask])

    def forward(self, items_T: Tensor) -> Tensor:
        known_T = items_T.clamp(max=self.num_items)
        x_TD = self.adaptor(F.embedding(known_T, self.vectors))
        if self.ids is not None:
            x_TD = x_TD + F.embedding(known_T, self.ids)
        x_TD = x_TD * (items_T != PADDING_ID)[..., None]
        return x_TD if self.mask is None else torch.where((items_T > self.num_items)[..., None], self.mask, x_TD)


class WithItemTable(SequenceModel):
    """A sequence model whose item table is an `ItemTable`; it is saved like any other. To export it, export `model`."""

    config_class = WithItemTableConfig

    def __init__(self, config: WithItemTableConfig, model: SequenceModel | None = None):
        super().__init__(config)
        if model is None:
            settings = {name: value for name, value in config.model.items() if name != "model_type"}
            cls = MODELS[config.model["model_type"]]
            model = cls(cls.config_class(**settings))
        self.model, self.reads_times = model, model.reads_times
        self.model.item_table = ItemTable(config, *model.item_table.weight.shape)

    def forward(self, items_BL: Tensor, *times: Tensor | None) -> Tensor:
        return self.model(items_BL, *times)

    def encode(self, items_BL: Tensor, *times: Tensor | None) -> Tensor:
        return self.model.encode(items_BL, *times)

    def item_vectors(self) -> Tensor:
        return self.model.item_vectors()

    @property
    def similarity(self) -> nn.Module | None:
        return self.model.similarity


def attach(model: SequenceModel, items_IE: Tensor, *, match_norm: bool = False, **table: Any) -> SequenceModel:
    """Give a freshly built model the item vectors `items_IE`; `table` are fields of `WithItemTableConfig`.

    Vectors that are trained as they are just fill the model's own table: same parameters, same cost, same class. Else a
    `WithItemTable` around the model is returned. The mask token keeps a vector of its own. `match_norm` scales the
    vectors to the mean squared norm of the rows they replace. An output table of its own stays as it is. Raises
    `InputError` for a table of another shape, with numbers that are not finite, or a row 0 that is not zero.
    """
    num_items, own = model.config.num_items, model.item_table.weight.detach().clone()
    width = own.shape[1]
    if items_IE.dim() != 2 or len(items_IE) != num_items + 1:
        raise InputError(
            f"the item vectors are {tuple(items_IE.shape)}: expected {num_items + 1} rows, padding's first"
        )
    if not items_IE.isfinite().all() or items_IE[PADDING_ID].any():
        raise InputError("the item vectors: expected finite numbers, and zeros in row 0")
    settings = {"model_type": type(model).__name__, **asdict(model.config)}
    config = WithItemTableConfig(model=settings, vector_dim=items_IE.shape[1], **table)
    if config.adaptor == "none" and items_IE.shape[1] != width:
        raise InputError(
            f"the item vectors have {items_IE.shape[1]} numbers, the model {width}: expected as many, an adaptor, or "
            "the transform 'pca'"
        )
    if match_norm:
        items_IE = items_IE * (own[1 : num_items + 1].square().sum() / items_IE.square().sum()).sqrt()
    with torch.no_grad():
        if config == WithItemTableConfig(model=settings, vector_dim=width):
            model.item_table.weight[: num_items + 1] = items_IE
            return model
        wrapped = WithItemTable(config, model)
        made = wrapped.model.item_table
        made.vectors.copy_(items_IE)
        if made.ids is not None:
            made.ids.copy_(own[: num_items + 1])
        if made.mask is not None and config.train_mask:
            made.mask.copy_(own[-1:])
    return wrapped
