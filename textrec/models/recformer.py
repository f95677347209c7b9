"""RecFormer (Li et al. 2023, "Text Is All You Need", section 2): a history of item texts, read by a windowed encoder.

A sequence is a start token followed by the texts of the items, newest first; four embeddings are summed (word,
position, kind of token, which item), then come post-norm blocks whose attention is `BandedAttention`. The state of the
start token stands for the history; an item is encoded as a history of one. The input is packed: no padding anywhere.
Deviates from the published code: `encode` computes of the last block only what the start token needs, and the
vocabulary is scored at masked positions only; both give the same numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.models.attention import PATHS, BandedAttention, BandLayout, Dropout
from textrec.models.saving import Saved
from textrec.schema import InputError


@dataclass(frozen=True, kw_only=True)
class RecFormerConfig:
    """The sizes of the published model; a backbone other than Longformer brings its own."""

    vocabulary_size: int = 50_265
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072  # width of the feed-forward network
    num_positions: int = 4098  # rows of the position table
    position_offset: int = 2  # row of a sequence's first token: 2 in RoBERTa and Longformer, 0 in BERT
    num_token_types: int = 4  # start, attribute name, attribute value, padding (never read here)
    max_items: int = 50  # items of a history; the item position table has one row more, 0 for the start token
    max_tokens: int = 1024  # tokens of a history, start token included
    attention_window: int = 64  # tokens seen, half on either side
    attention_path: str = "auto"  # auto | dense | blocked | flex, see `attention`
    dropout: float = 0.1  # behind the embeddings and both branches
    attention_dropout: float = 0.1  # on attention weights
    norm_eps: float = 1e-5
    padding_id: int = 1  # a row of the word table that is never learnt
    temperature: float = 0.05  # of the cosine that scores an item
    initial_std: float = 0.02  # of every matrix; biases start at zero

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise InputError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        if self.max_tokens + self.position_offset > self.num_positions:
            raise InputError(
                f"max_tokens={self.max_tokens} from position {self.position_offset} on: expected at most "
                f"num_positions={self.num_positions} rows"
            )
        if self.attention_path not in PATHS:
            raise InputError(f"attention_path={self.attention_path!r}: expected one of {PATHS}")


PRESETS = {
    "base": RecFormerConfig(),
    "mini": RecFormerConfig(hidden_size=256, num_layers=6, num_heads=4, intermediate_size=1024),
    "minilm": RecFormerConfig(
        vocabulary_size=30_522, hidden_size=384, num_layers=6, intermediate_size=1536, num_positions=512,
        position_offset=0, max_tokens=512, norm_eps=1e-12, padding_id=0,
    ),
    "tiny": RecFormerConfig(hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128, num_positions=1026),
}  # fmt: skip


class RecFormerBlock(nn.Module):
    """Attention, then the feed-forward network, each normed after its residual."""

    def __init__(self, config: RecFormerConfig):
        super().__init__()
        width = config.hidden_size
        self.attention = BandedAttention(width, config.num_heads, config.attention_dropout)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.enter, self.leave = nn.Linear(width, config.intermediate_size), nn.Linear(config.intermediate_size, width)
        self.forward_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_TD: Tensor, layout: BandLayout, first_only: bool = False) -> Tensor:
        """Return the states (T, D) or, with `first_only`, those of the first tokens (B, D)."""
        attended = self.attention(x_TD, layout, first_only)
        x = x_TD[layout.starts_B] if first_only else x_TD
        x = self.attention_norm(x + self.dropout(self.attention_output(attended)))
        x = self.forward_norm(x + self.dropout(self.leave(F.gelu(self.enter(x)))))
        if first_only and torch.is_grad_enabled():  # what is left out stays a used parameter, with a gradient of zero
            left_out = self.attention.query, self.attention.key, self.attention.value
            x = x + 0.0 * sum(part(x[:1]).sum() for part in left_out)  # called: ZeRO 3 gathers weights at a call
        return x


class RecFormer(Saved, nn.Module):
    """The encoder. Every method takes the packed tokens of B sequences, their lengths, and no padding."""

    config_class = RecFormerConfig

    def __init__(self, config: RecFormerConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        self.word_table = nn.Embedding(config.vocabulary_size, width, padding_idx=config.padding_id)
        self.position_table = nn.Embedding(config.num_positions, width)
        self.type_table = nn.Embedding(config.num_token_types, width)
        self.item_position_table = nn.Embedding(config.max_items + 1, width)
        self.embedding_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(RecFormerBlock(config) for _ in range(config.num_layers))
        draw_weights(self, config.initial_std)

    def forward(self, token_ids_T: Tensor, type_ids_T: Tensor, item_positions_T: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the states (T, D) of all tokens.

        Raises InputError if the lengths do not add up to T, if one is zero, or if one passes the position table.
        """
        x_TD, layout = self._embed(token_ids_T, type_ids_T, item_positions_T, lengths_B)
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return x_TD

    def encode(self, token_ids_T: Tensor, type_ids_T: Tensor, item_positions_T: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state (B, D) of each sequence's first token, not normalised."""
        x_TD, layout = self._embed(token_ids_T, type_ids_T, item_positions_T, lengths_B)
        for block in self.blocks[:-1]:
            x_TD = block(x_TD, layout)
        return self.blocks[-1](x_TD, layout, first_only=True)

    def scores(self, user_vectors_BD: Tensor, item_vectors_ID: Tensor) -> Tensor:
        """Return the scores (B, I): cosine over the temperature (section 2.3)."""
        users_BD, items_ID = (F.normalize(x, dim=-1, eps=1e-8) for x in (user_vectors_BD, item_vectors_ID))
        return users_BD @ items_ID.T / self.config.temperature

    def _embed(
        self, token_ids_T: Tensor, type_ids_T: Tensor, item_positions_T: Tensor, lengths_B: Tensor
    ) -> tuple[Tensor, BandLayout]:
        config = self.config
        layout = BandLayout.of(lengths_B, config.attention_window, config.num_heads, config.attention_path)
        if len(layout.position_T) != len(token_ids_T):
            raise InputError(f"lengths_B adds up to {len(layout.position_T)}: expected {len(token_ids_T)} tokens")
        if layout.longest + config.position_offset > config.num_positions:
            most = config.num_positions - config.position_offset
            raise InputError(f"lengths_B holds a sequence of {layout.longest} tokens: expected at most {most}")
        x_TD = self.word_table(token_ids_T) + self.position_table(layout.position_T + config.position_offset)
        x_TD = x_TD + self.type_table(type_ids_T) + self.item_position_table(item_positions_T)
        return self.dropout(self.embedding_norm(x_TD)), layout


class MaskedLanguageHead(nn.Module):
    """Score the vocabulary for a state: dense, GELU, norm, decoder. The decoder is not tied to the word table."""

    def __init__(self, config: RecFormerConfig):
        super().__init__()
        width = config.hidden_size
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=config.norm_eps)
        self.decoder = nn.Linear(width, config.vocabulary_size)
        draw_weights(self, config.initial_std)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Return the logits (N, vocabulary)."""
        return self.decoder(self.norm(F.gelu(self.dense(hidden_ND))))


class RecFormerForPretraining(Saved, nn.Module):
    """The encoder with the head that guesses masked tokens; the decoder starts as a copy of the word table."""

    config_class = RecFormerConfig

    def __init__(self, config: RecFormerConfig):
        super().__init__()
        self.config = config
        self.encoder, self.head = RecFormer(config), MaskedLanguageHead(config)
        with torch.no_grad():
            self.head.decoder.weight.copy_(self.encoder.word_table.weight)

    def forward(
        self,
        token_ids_T: Tensor,
        type_ids_T: Tensor,
        item_positions_T: Tensor,
        lengths_B: Tensor,
        masked_N: Tensor,
    ) -> Tensor:
        """Return the logits (N, vocabulary) of the masked tokens, given their rows among the T packed tokens."""
        hidden_TD = self.encoder(token_ids_T, type_ids_T, item_positions_T, lengths_B)
        return self.head(hidden_TD.index_select(0, masked_N))


def draw_weights(module: nn.Module, std: float) -> None:
    """Draw all matrices from N(0, std); biases and padding rows zero, norms one (BERT's initialisation)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
