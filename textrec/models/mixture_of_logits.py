"""Mixture of logits: a learnt similarity of user and item vectors, for any sequence model (Zhai et al. 2023).

Both sides become a few unit vectors; their inner products are weighted by a gate that sees the user, the item and the
products. What depends on the items alone is computed once for all users. X = user groups times item groups.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK_NUMBERS = 1 << 22  # logits held at once while a catalogue is scored


@dataclass(frozen=True, kw_only=True)
class MixtureOfLogitsConfig:
    """Sizes of a mixture; without `hidden_dim` the first group of each side is its own vector."""

    embedding_dim: int  # of the vectors given
    user_groups: int = 4
    item_groups: int = 4
    group_dim: int = 64
    hidden_dim: int | None = None  # of a GeGLU layer before the groups; None: first group as given, the others linear
    gate_dim: int = 64  # hidden width of the three gate networks
    temperature: float = 0.05
    dropout: float = 0.1  # before the groups and on the gate

    def __post_init__(self):
        if self.hidden_dim is None and self.group_dim != self.embedding_dim:
            raise ValueError(f"{self.group_dim=}: expected {self.embedding_dim=} where hidden_dim is None")
        if self.user_groups < 1 or self.item_groups < 1:
            raise ValueError(f"{self.user_groups=}, {self.item_groups=}: expected at least 1")


class GeGLU(nn.Module):
    """Gated layer: gelu(gate x) * up x."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.gate(x)) * self.up(x)


class Groups(nn.Module):
    """Turn each vector (N, D) into unit vectors (N, groups, group_dim)."""

    def __init__(self, config: MixtureOfLogitsConfig, groups: int):
        super().__init__()
        self.keeps_first, self.group_dim = config.hidden_dim is None, config.group_dim
        width, projected = config.hidden_dim or config.embedding_dim, (groups - self.keeps_first) * config.group_dim
        gated = nn.Identity() if self.keeps_first else GeGLU(config.embedding_dim, config.hidden_dim)
        self.project = (
            nn.Sequential(nn.Dropout(config.dropout), gated, nn.Linear(width, projected)) if projected else None
        )

    def forward(self, vectors_ND: Tensor) -> Tensor:
        parts = [vectors_ND] if self.keeps_first else []
        if self.project is not None:
            parts.append(self.project(vectors_ND))
        return F.normalize(torch.cat(parts, 1).unflatten(1, (-1, self.group_dim)), dim=2, eps=1e-6)


class MixtureOfLogits(nn.Module):
    """Scores of users for items as gated mixtures of the inner products of their groups."""

    def __init__(self, config: MixtureOfLogitsConfig):
        super().__init__()
        self.config, pairs = config, config.user_groups * config.item_groups
        self.user_groups, self.item_groups = Groups(config, config.user_groups), Groups(config, config.item_groups)

        def gate(width: int, bias: bool) -> nn.Sequential:
            layers = nn.Linear(width, config.gate_dim), nn.SiLU(), nn.Linear(config.gate_dim, pairs, bias=bias)
            return nn.Sequential(*layers)

        self.user_gate, self.item_gate = gate(config.embedding_dim, False), gate(config.embedding_dim, False)
        self.pair_gate, self.dropout = gate(pairs, True), nn.Dropout(config.dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw linear layers Xavier-uniform, those of the GeGLU N(0, 0.02); biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for gated in (module for module in self.modules() if isinstance(module, GeGLU)):
            nn.init.normal_(gated.gate.weight, std=0.02)
            nn.init.normal_(gated.up.weight, std=0.02)

    def items(self, vectors_ID: Tensor) -> tuple[Tensor, Tensor]:
        """Return what scoring needs of the items, whoever asks: groups (I, groups, group_dim) and gates (I, X)."""
        return self.item_groups(vectors_ID), self.item_gate(vectors_ID)

    def forward(self, vectors_BD: Tensor, items: tuple[Tensor, Tensor]) -> Tensor:
        """Return the scores (B, I) of prepared items for users; B x I x X numbers are held."""
        return self._mixed(*self._users(vectors_BD), "bpg,iqg->bipq", *items)

    def contrasted(self, vectors_TD: Tensor, own: tuple[Tensor, Tensor], shared: tuple[Tensor, Tensor]) -> Tensor:
        """Return the scores (T, 1 + N) of each row's own prepared item and of N that all rows share."""
        users = self._users(vectors_TD)
        own_T1 = self._mixed(*users, "tpg,tiqg->tipq", *(each[:, None] for each in own))
        return torch.cat([own_T1, self._mixed(*users, "tpg,iqg->tipq", *shared)], 1)

    def _users(self, vectors_BD: Tensor) -> tuple[Tensor, Tensor]:
        return self.user_groups(vectors_BD), self.user_gate(vectors_BD)[:, None]

    def _mixed(self, user_groups: Tensor, user_gates: Tensor, pairs: str, item_groups: Tensor, item_gates: Tensor):
        logits_BIX = torch.einsum(pairs, user_groups, item_groups).flatten(2) / self.config.temperature
        gates_BIX = user_gates * item_gates + self.pair_gate(logits_BIX)
        weights_BIX = self.dropout((gates_BIX * gates_BIX.sigmoid()).softmax(2))
        weights_BIX = weights_BIX / weights_BIX.sum(2, keepdim=True).clamp(min=1e-6)
        return (weights_BIX * logits_BIX).sum(2)

    @torch.no_grad()
    def scorer(self, user_vectors: Callable[[slice], Tensor], vectors_ID: Tensor) -> Callable[[slice], Tensor]:
        """Return what `rank_targets` calls, in evaluation mode; row k of `vectors_ID` is item k + 1.

        The items are prepared once and scored in blocks, so that memory does not grow with the catalogue.
        """
        groups, gates_IX = self.eval().items(vectors_ID)

        @torch.no_grad()
        def scores(rows: slice) -> Tensor:
            vectors_BD = user_vectors(rows)
            step = max(BLOCK_NUMBERS // (len(vectors_BD) * gates_IX.shape[1]), 1)
            blocks = zip(groups.split(step), gates_IX.split(step), strict=True)
            return torch.cat([self(vectors_BD, block) for block in blocks], 1)

        return scores
