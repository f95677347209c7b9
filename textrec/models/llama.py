"""LLaMA-2 blocks over item ids: RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases (Toy-RecLM).

Deviates from the published recommender by default: padding is a zero row that is never attended, and the matrices that
end a residual branch start small; `faithful` brings the published initialisation and its attended padding row back.
Linear layers, for adapters: `blocks.N.attention.{query,key,value,output}`, `blocks.N.feed_forward.{gate,up,down}`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.reading import Reading, right_edge
from textrec.models.saving import load_exactly
from textrec.models.sequence_model import Layout, SequenceModel, newest, rotary_turns, rotate
from textrec.schema import PADDING_ID, InputError

RENAMED = {  # names of transformers -> ours
    "^norm": "final_norm", "embed_tokens": "item_table", "^layers": "blocks", "self_attn": "attention",
    "mlp": "feed_forward", "_proj": "", r"\.q\.": ".query.", r"\.k\.": ".key.", r"\.v\.": ".value.",
    r"\.o\.": ".output.", "input_layernorm": "attention_norm", "post_attention_layernorm": "forward_norm",
}  # fmt: skip
FIELDS = {  # of a configuration of transformers -> ours
    "hidden_size": "embedding_dim", "num_hidden_layers": "num_blocks", "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_key_value_heads", "intermediate_size": "feed_forward_dim",
    "rms_norm_eps": "norm_eps", "initializer_range": "initial_std",
}  # fmt: skip
COMPUTED = {  # what a language model has to say for our blocks to compute its states
    "model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_type": "default",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes as of SASRec in the same tables; the published ones are 512 wide, 8 blocks, 8 heads, 50 items."""

    num_items: int  # catalogue size, padding not counted
    max_sequence_length: int = 200  # items read, newest kept
    embedding_dim: int = 64
    num_blocks: int = 2
    num_heads: int = 1
    num_key_value_heads: int | None = None  # None: one per head; fewer are shared by neighbouring heads
    feed_forward_dim: int | None = None  # None: two thirds of four times the width, up to a multiple of 32
    dropout: float = 0.2  # on embeddings, attention output and feed-forward
    attention_dropout: float = 0.0  # on attention weights
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    scale_item_table: bool = True  # times sqrt(embedding_dim) at the input
    temperature: float | None = None  # None: inner product; else cosine / temperature
    initial_std: float = 0.02
    faithful: bool = False  # left-pad and attend a random padding row, shrink `up` instead of `down` at the start

    def __post_init__(self):
        if self.num_items < 1 or self.max_sequence_length < 1 or self.num_blocks < 1:
            raise ValueError(f"{self.num_items=}, {self.max_sequence_length=}, {self.num_blocks=}: expected at least 1")
        if self.embedding_dim % (2 * self.num_heads):
            raise ValueError(f"{self.embedding_dim=} is not a multiple of twice {self.num_heads=}")
        if self.num_heads % (self.num_key_value_heads or self.num_heads):
            raise ValueError(f"{self.num_heads=} is not a multiple of {self.num_key_value_heads=}")

    @property
    def attend_padding(self) -> bool:
        return self.faithful


class RotaryAttention(nn.Module):
    """Causal attention of rotated queries and keys, of those that a `reading` has kept where there is one."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim, self.dropout = config.embedding_dim // config.num_heads, config.attention_dropout
        width, shared = config.embedding_dim, self.head_dim * (config.num_key_value_heads or config.num_heads)
        self.query, self.key = nn.Linear(width, width, bias=False), nn.Linear(width, shared, bias=False)
        self.value, self.output = nn.Linear(width, shared, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x_TD: Tensor, turns_T1P: Tensor, layout: Layout, reading: Reading | None = None) -> Tensor:
        queries_TD, keys_TC = (rotate(project(x_TD), turns_T1P) for project in (self.query, self.key))
        pairs_TD = torch.cat([keys_TC, self.value(x_TD)], 1)
        if reading is not None:
            known = reading.remember(self, pairs_TD), reading.seen_BNK[:, None]
            return self.output(layout.pack(self._mix(layout.pad(queries_TD), *known)))
        sizes = queries_TD.shape[1], pairs_TD.shape[1]
        joined_TC = torch.cat([queries_TD, pairs_TD], 1)
        return self.output(layout.in_blocks(joined_TC, lambda block, _: self._mix(*block.split(sizes, 2))))

    def _mix(self, queries_BLD: Tensor, pairs_BKD: Tensor, mask: Tensor | None = None) -> Tensor:
        queries, keys, values = (
            each.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in (queries_BLD, *pairs_BKD.chunk(2, dim=2))
        )
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None,
            dropout_p=self.dropout if self.training else 0.0, enable_gqa=keys.shape[1] != queries.shape[1],
        )  # fmt: skip
        return mixed.transpose(1, 2).flatten(2)


class SwiGLU(nn.Module):
    """Gated feed-forward network: down(silu(gate x) * up x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        width = config.embedding_dim
        hidden = config.feed_forward_dim or 32 * math.ceil(8 * width // 3 / 32)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_TD)) * self.up(x_TD))


class LlamaBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.embedding_dim, eps=config.norm_eps)  # fp32 inside
        self.forward_norm = nn.RMSNorm(config.embedding_dim, eps=config.norm_eps)
        self.attention, self.feed_forward = RotaryAttention(config), SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, turns_T1P: Tensor, layout: Layout, reading: Reading | None = None) -> Tensor:
        x_TD = x_TD + self.dropout(self.attention(self.attention_norm(x_TD), turns_T1P, layout, reading))
        return x_TD + self.dropout(self.feed_forward(self.forward_norm(x_TD)))


class Llama(SequenceModel):
    """Predict the next item from the state of the newest one; the item table is input and output."""

    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.item_table = nn.Embedding(config.num_items + 1, config.embedding_dim, padding_idx=PADDING_ID)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(LlamaBlock(config) for _ in range(config.num_blocks))
        self.final_norm = nn.RMSNorm(config.embedding_dim, eps=config.norm_eps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all matrices afresh (norms one): N(0, initial_std), the ends of residual branches smaller."""
        small = ("attention.output.weight", f"feed_forward.{'up' if self.config.faithful else 'down'}.weight")
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
            else:
                shrink = math.sqrt(2 * self.config.num_blocks) if name.endswith(small) else 1.0
                nn.init.normal_(parameter, std=self.config.initial_std / shrink)
        if not self.config.faithful:
            self.item_table.weight.data[PADDING_ID] = 0.0

    def item_vectors(self) -> Tensor:
        table_ID = self.item_table.weight
        return table_ID if self.config.temperature is None else F.normalize(table_ID, dim=-1, eps=1e-6)

    def forward(self, items_BL: Tensor, times_BL: Tensor | None = None) -> Tensor:
        if self.config.faithful:
            items_BL = right_edge(items_BL, items_BL != PADDING_ID, self.config.max_sequence_length)
            layout, items_T = Layout.of(torch.ones_like(items_BL, dtype=torch.bool)), items_BL.flatten()
            return self._states(items_T, layout.columns_T, layout)[items_T != PADDING_ID]
        items_BL = newest(items_BL, self.config.max_sequence_length)
        layout = Layout.of(items_BL != PADDING_ID)
        return self._states(items_BL[items_BL != PADDING_ID], layout.columns_T, layout)

    def _states(self, items_T: Tensor, positions_T: Tensor, layout: Layout, reading: Reading | None = None) -> Tensor:
        config = self.config
        turns_T1P = rotary_turns(positions_T, config.embedding_dim // config.num_heads, config.rope_theta)
        scale = math.sqrt(config.embedding_dim) if config.scale_item_table else 1.0
        x_TD = self.dropout(self.item_table(items_T) * scale)
        for block in self.blocks:
            x_TD = block(x_TD, turns_T1P, layout, reading)
        x_TD = self.final_norm(x_TD)
        return x_TD if config.temperature is None else F.normalize(x_TD, dim=-1, eps=1e-6) / config.temperature

    def continue_reading(self, reading: Reading, items_T: Tensor, *_: Tensor | None) -> Tensor:
        return self._states(items_T, reading.places_T, reading.layout, reading)

    def start(self, items_BL: Tensor) -> Reading:
        """Read B histories in evaluation mode and keep their keys and values, so that further items cost little."""
        if self.config.faithful:
            raise InputError("faithful=True: a Llama that attends its padding reads every history anew")
        return Reading(self.eval(), items_BL)

    @classmethod
    def from_causal_lm(
        cls, folder: Path, num_items: int, num_blocks: int | None = None, items_ID: Tensor | None = None, **changes: Any
    ) -> "Llama":  # fmt: skip
        """Return a model whose blocks are the first `num_blocks` (None: all) of a LLaMA that transformers saved.

        `items_ID` (num_items + 1, D) starts the item table, else chance does; `changes` replace other fields.
        Raises InputError where the folder holds no such model or what our blocks cannot compute.
        """
        theirs, weights = _read_causal_lm(Path(folder), num_blocks)
        settings = {ours: getattr(theirs, name) for name, ours in FIELDS.items()}
        settings |= {"rope_theta": theirs.rope_parameters["rope_theta"], "scale_item_table": False}
        model = cls(LlamaConfig(num_items=num_items, **(settings | changes)))
        table_ID = (model.item_table.weight if items_ID is None else items_ID).detach().clone()
        table_ID[PADDING_ID] = 0.0
        load_exactly(model, weights | {"item_table.weight": table_ID}, folder)
        return model


def _read_causal_lm(folder: Path, num_blocks: int | None) -> tuple[Any, dict[str, Tensor]]:
    """Return the configuration of a LLaMA and the weights of its first blocks under our names."""
    from transformers import AutoConfig, LlamaModel

    try:
        theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no language model that transformers can read: {error}") from error
    head_dim, num_blocks = theirs.hidden_size // theirs.num_attention_heads, num_blocks or theirs.num_hidden_layers
    found = theirs.to_dict() | (getattr(theirs, "rope_parameters", None) or {})
    for name, expected in (COMPUTED | {"head_dim": head_dim}).items():
        if found.get(name) != expected:
            raise InputError(f"{folder}: {name} is {found.get(name)!r}, expected {expected!r}")
    if not 1 <= num_blocks <= theirs.num_hidden_layers:
        raise InputError(f"num_blocks={num_blocks}: expected 1 to the {theirs.num_hidden_layers} blocks of {folder}")
    theirs.num_hidden_layers, weights = num_blocks, {}
    language_model = LlamaModel.from_pretrained(folder, config=theirs, dtype=torch.float32, local_files_only=True)
    for name, weight in language_model.state_dict().items():
        if re.search(r"\.[qk]_proj", name):  # pairs that turn together lie a half apart there, side by side here
            weight = weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        for pattern, ours in RENAMED.items():
            name = re.sub(pattern, ours, name)
        weights[name] = weight
    return theirs, weights
