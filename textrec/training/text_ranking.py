"""Rank the items of a set by their texts alone: what a zero-shot row and the stages of a finetuning share.

An encoder is anything with `encode(token_ids_T, type_ids_T, item_positions_T, lengths_B) -> [B, D]` and a `config` with
`max_items` and `max_tokens`: a `RecFormer`, or the `BagOfWords` beside it. Scores are cosines.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from textrec.data.item_text import item_attributes
from textrec.data.prepared import PreparedSet
from textrec.data.tokenizing import (
    KEY_TYPE,
    START_TYPE,
    ItemTokens,
    Packed,
    SpecialTokens,
    history_tokens,
    length_sorted_batches,
    tokenize_items,
)  # fmt: skip
from textrec.data.vectors import text_vectors
from textrec.evaluation.ranking import Ranks, VectorScorer, rank_targets
from textrec.models.recformer import RecFormer, RecFormerConfig
from textrec.models.saving import Saved
from textrec.seeding import derive_seed

if TYPE_CHECKING:
    from pandas import DataFrame

PACKED = ("token_ids_T", "type_ids_T", "item_positions_T", "lengths_B")  # what `encode` reads, in this order
BATCH_TOKENS = {"cpu": 1 << 12, "cuda": 1 << 15}  # encoded at once; on a CPU more leave the cache: a fifth slower
ITEMS_AT_ONCE = 1 << 14  # whose tokens are compared


@dataclass(frozen=True)
class TextSet:
    """A prepared set and its items as tokens."""

    prepared: PreparedSet
    tokens: ItemTokens
    special: SpecialTokens
    tokenizer: Any
    faithful: bool = False

    @classmethod
    def of(
        cls, prepared: PreparedSet, tokenizer: Any, *, attributes: "DataFrame | None" = None, faithful: bool = False,
        folder: Path | None = None,
    ) -> "TextSet":  # fmt: skip
        """Tokenise the catalogue, or `attributes` of its items instead; for the rest see `tokenize_items`."""
        attributes = item_attributes(prepared.catalogue) if attributes is None else attributes
        tokens = tokenize_items(attributes, tokenizer, faithful=faithful, folder=folder)
        return cls(prepared, tokens, SpecialTokens.of(tokenizer), tokenizer, faithful)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What a checkpoint remembers of the set: who is tested on what, and every token of every item."""
        digest = hashlib.sha256(repr(self.special).encode())
        for each in fields(self.tokens):  # not what it has worked out from them since
            digest.update(np.ascontiguousarray(getattr(self.tokens, each.name)))
        return {"fingerprint": self.prepared.fingerprint, "tokens": digest.hexdigest()[:16]}

    @cached_property
    def _tokens_before_E1(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.tokens.lengths_I[self.prepared.histories.items_E])])

    def history_lengths(self, users_U: np.ndarray, ends_U: np.ndarray, config) -> np.ndarray:
        """Return how many tokens the histories before `ends_U` have, as a model of `config` reads them."""
        lasts_U = self.prepared.histories.offsets_U1[users_U] + ends_U
        firsts_U = lasts_U - np.minimum(ends_U, config.max_items)
        lengths_U = self._tokens_before_E1[lasts_U] - self._tokens_before_E1[firsts_U]
        return np.minimum(lengths_U + 1, config.max_tokens)

    def packed(self, items_BL: np.ndarray, config) -> Packed:
        """Return histories of item ids (zeros pad) as packed tokens, cut to what a model of `config` reads."""
        cut = {"max_items": config.max_items, "max_tokens": config.max_tokens}
        return history_tokens(self.tokens, items_BL, start_token=self.special.start, **cut)


@torch.no_grad()
def text_ranks(
    encoder: nn.Module, texts: TextSet, which: str, *, items_ID: Tensor | None = None,
    users: np.ndarray | None = None, max_batch_tokens: int | None = None,
) -> Ranks:  # fmt: skip
    """Rank the `validation` or `test` target of `users` (all that have one by default) by cosine over all items.

    `items_ID` is an `item_table`, the encoder's own by default; the frozen table of a finetuned model is not.
    """
    if items_ID is None:
        items_ID = item_table(encoder, texts, max_batch_tokens=max_batch_tokens)
    max_batch_tokens = max_batch_tokens or BATCH_TOKENS[items_ID.device.type]
    histories, config = texts.prepared.histories, encoder.config
    users_U, ends_U = texts.prepared.split.targets(which)
    if users is not None:
        chosen_U = np.isin(users_U, users)
        users_U, ends_U = users_U[chosen_U], ends_U[chosen_U]
    lengths_U = texts.history_lengths(users_U, ends_U, config)
    by_length_U = np.argsort(lengths_U, kind="stable")
    users_U, ends_U, lengths_U = users_U[by_length_U], ends_U[by_length_U], lengths_U[by_length_U]

    def user_vectors(rows: slice) -> Tensor:
        users_B, ends_B = users_U[rows], ends_U[rows]
        vectors_BD = items_ID.new_empty(len(users_B), items_ID.shape[1])
        for part in length_sorted_batches(lengths_U[rows], max_batch_tokens):
            items_BL, _, _ = histories.windows(users_B[part], ends_B[part], config.max_items)
            vectors_BD[part] = _vectors(encoder, texts.packed(items_BL, config)).to(vectors_BD)
        return vectors_BD

    with evaluating(encoder):
        ranks = rank_targets(
            VectorScorer(user_vectors, items_ID[1:]), users_U, histories.at(users_U, ends_U),
            lambda rows: histories.prefixes(users_U[rows], ends_U[rows]), num_items=texts.prepared.num_items,
        )  # fmt: skip
    return ranks.subset(np.argsort(by_length_U, kind="stable"))


@torch.no_grad()
def item_table(
    encoder: nn.Module, texts: TextSet, *, max_batch_tokens: int | None = None, folder: Path | None = None,
    out: Tensor | None = None, rank: int = 0, world_size: int = 1,
) -> Tensor:  # fmt: skip
    """Return the unit vectors (I, D), float32, of all items read as histories of one; row 0, padding, is zero.

    Each distinct text is encoded once, longest first, `max_batch_tokens` at a time, by default what suits the device.
    `folder` keeps the vectors on disk (see `text_vectors`), under the hash of the weights; `out` is filled instead of a
    new tensor and may be a memory map. Several processes share the work and get the same table.
    """
    tokens, device = texts.tokens, next(encoder.parameters()).device
    max_batch_tokens = max_batch_tokens or BATCH_TOKENS[device.type]
    first_U, inverse_N = distinct_items(tokens)
    copies_N = np.flatnonzero(first_U[inverse_N] != np.arange(len(inverse_N)))
    with evaluating(encoder):
        if folder is not None:
            vectors_UD = _stored_vectors(encoder, texts, first_U + 1, folder, max_batch_tokens)
            batches: Iterator = iter([(first_U + 1, vectors_UD.to(device))])
        else:
            batches = _encoded(encoder, texts, first_U + 1, max_batch_tokens, rank, world_size)
        for items_B, vectors_BD in batches:
            if out is None:
                out = torch.zeros(len(inverse_N) + 1, vectors_BD.shape[1], device=device)
            out[items_B] = F.normalize(vectors_BD, dim=-1, eps=1e-8).to(out)
    if world_size > 1 and folder is None:
        torch.distributed.all_reduce(out)
    out[copies_N + 1] = out[first_U[inverse_N[copies_N]] + 1]
    return out


def distinct_items(tokens: ItemTokens) -> tuple[np.ndarray, np.ndarray]:
    """Return one item (id - 1) for each distinct text, and which of them each item equals."""
    hashes = []
    for start in range(1, len(tokens.offsets_I1) - 1, ITEMS_AT_ONCE):
        offsets_B1 = tokens.offsets_I1[start : start + ITEMS_AT_ONCE + 1]
        part, offsets_B1 = slice(offsets_B1[0], offsets_B1[-1]), offsets_B1 - offsets_B1[0]
        codes_T = tokens.token_ids_T[part].astype(np.uint64) * np.uint64(4) + tokens.type_ids_T[part].astype(np.uint64)
        place_T = np.arange(len(codes_T)) - np.repeat(offsets_B1[:-1], np.diff(offsets_B1))
        mixed_T = (codes_T + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + place_T.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            mixed_T = (mixed_T ^ (mixed_T >> np.uint64(shift))) * np.uint64(factor)
        sums_T1 = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed_T)])  # modulo 2^64, as are the differences
        hashes.append(sums_T1[offsets_B1[1:]] - sums_T1[offsets_B1[:-1]])
    _, first_U, inverse_N = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    return first_U, inverse_N


def _encoded(
    encoder, texts: TextSet, items_U: np.ndarray, max_batch_tokens: int, rank: int, world_size: int
) -> Iterator[tuple[np.ndarray, Tensor]]:
    lengths_U = np.minimum(texts.tokens.lengths_I[items_U] + 1, encoder.config.max_tokens)
    for number, rows_B in enumerate(length_sorted_batches(lengths_U, max_batch_tokens)):
        if number % world_size == rank or not number:  # the first tells every process the width
            items_B = items_U[rows_B]
            vectors_BD = _vectors(encoder, texts.packed(items_B[:, None], encoder.config))
            yield items_B, vectors_BD if number % world_size == rank else torch.zeros_like(vectors_BD)


def _vectors(encoder, packed: Packed) -> Tensor:
    device = next(encoder.parameters()).device
    return encoder.encode(*(torch.from_numpy(packed[name]).to(device) for name in PACKED)).float()


def _stored_vectors(encoder, texts: TextSet, items_U: np.ndarray, folder: Path, max_batch_tokens: int) -> Tensor:
    """Encode what the store lacks; its texts are the items' tokens and types, written as hexadecimal numbers."""
    tokens, most = texts.tokens, encoder.config.max_tokens - 1
    codes_T = np.asarray(tokens.token_ids_T, np.int32) * 4 + tokens.type_ids_T
    written = [codes_T[tokens.offsets_I1[item] : tokens.offsets_I1[item + 1]].tobytes().hex() for item in items_U]

    def encode(codes: Sequence[np.ndarray]) -> np.ndarray:
        lengths_B = np.array([len(each) + 1 for each in codes])
        firsts_B = np.cumsum(lengths_B) - lengths_B
        codes_T = np.insert(
            np.concatenate(codes), firsts_B - np.arange(len(codes)), texts.special.start * 4 + START_TYPE
        )
        positions_T = (codes_T % 4 != START_TYPE).astype(np.int32)
        arrays = (codes_T // 4, codes_T % 4, positions_T, lengths_B)
        return _vectors(encoder, dict(zip(PACKED, arrays, strict=True))).cpu().numpy()

    vectors = text_vectors(
        written, encode, folder=folder, encoder=weights_digest(encoder), max_tokens=encoder.config.max_tokens,
        pooling="first", max_batch_tokens=max_batch_tokens,
        tokenize=lambda texts_B: [np.frombuffer(bytes.fromhex(each), np.int32)[:most] for each in texts_B],
    )  # fmt: skip
    return torch.from_numpy(np.asarray(vectors))


def weights_digest(model: nn.Module) -> str:
    """Return a hash of the configuration and of every weight."""
    digest = hashlib.sha256(f"{type(model).__name__} {model.config}".encode())
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)


class HalfPrecision(nn.Module):
    """An encoder of histories and items under bf16 autocast; cosines of its vectors are float32, as any other's.

    On a CPU with bf16 instructions three times as fast as float32, where the test of a row takes a third of its time.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.config, self.training = encoder, encoder.config, encoder.training

    def encode(self, token_ids_T: Tensor, *layout: Tensor) -> Tensor:
        """Return the vectors (B, D) of packed histories, float32."""
        with torch.autocast(token_ids_T.device.type, torch.bfloat16):
            return self.encoder.encode(token_ids_T, *layout).float()


class BagOfWords(Saved, nn.Module):
    """The mean word vector of all tokens of a history, keys included: what a word table says without its encoder."""

    config_class = RecFormerConfig

    def __init__(self, config: RecFormerConfig):
        super().__init__()
        self.config = config
        self.word_table = nn.Embedding(config.vocabulary_size, config.hidden_size, padding_idx=config.padding_id)

    @classmethod
    def of(cls, encoder: RecFormer) -> "BagOfWords":
        """Return what the words of `encoder` say; the table is shared."""
        bag = cls(encoder.config)
        bag.word_table = encoder.word_table
        return bag

    def encode(self, token_ids_T: Tensor, type_ids_T: Tensor, item_positions_T: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the means (B, D); an empty history's is zero, so that all items tie."""
        rows_T = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
        words_TD = self.word_table(token_ids_T) * (type_ids_T >= KEY_TYPE)[:, None]
        sums_BD = words_TD.new_zeros(len(lengths_B), words_TD.shape[1]).index_add(0, rows_T, words_TD)
        return sums_BD / (lengths_B - 1).clamp_min(1)[:, None]


def with_permuted_words(encoder: nn.Module, seed: int) -> nn.Module:
    """Return a copy in which each word has another word's vector: the marginal statistics without the meaning."""
    permuted = copy.deepcopy(encoder)
    weight = permuted.word_table.weight
    source = torch.Generator().manual_seed(derive_seed(seed, "permuted words"))
    with torch.no_grad():
        weight.copy_(weight[torch.randperm(len(weight), generator=source).to(weight.device)])
    return permuted


def with_random(encoder: RecFormer, part: str, seed: int) -> RecFormer:
    """Return a copy of which a part (word_table, blocks) is drawn anew, each matrix as spread as the one before it."""
    drawn = copy.deepcopy(encoder)
    torch.manual_seed(derive_seed(seed, "random", part))
    own, anew = (each.get_submodule(part).state_dict() for each in (drawn, RecFormer(encoder.config)))
    scaled = {name: new * (own[name].std() / new.std()) if new.dim() > 1 else new for name, new in anew.items()}
    drawn.get_submodule(part).load_state_dict(scaled)
    return drawn


def with_uniform_attention(encoder: RecFormer) -> RecFormer:
    """Return a copy in which a token takes the mean of the values it may see, whatever they are: its queries are zero.

    Zero queries give their keys no gradient, so that attention stays uniform in a training that freezes the queries.
    """
    uniform = copy.deepcopy(encoder)
    for block in uniform.blocks:
        for query in (block.attention.query, block.attention.query_global):
            query.weight.data.zero_()
            query.bias.data.zero_()
    return uniform
