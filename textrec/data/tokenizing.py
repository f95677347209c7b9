"""Items as tokens, and histories as packed batches of them (RecFormer, section 2.2).

An item is its attributes one after the other, each the tokens of its key and of its value; a history is a start token
and its items, newest first. Packed means one row after the other, without padding.

T tokens · B rows · I item ids (0 pads and has no tokens) · K kept items of all rows · S stretches of tokens
"""

import hashlib
import json
import string
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textrec.data.storage import staged_folder
from textrec.provenance import code_hash
from textrec.schema import PADDING_ID, InputError

if TYPE_CHECKING:
    from pandas import DataFrame, Series
    from tokenizers import Tokenizer

START_TYPE, KEY_TYPE, VALUE_TYPE = 0, 1, 2
TEXTS_PER_CALL = 50_000  # of the tokenizer: what it returns is large

Packed = dict[str, np.ndarray]


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that a tokenizer gives to the start of a sequence (`<s>`, `[CLS]`), to a hidden token and to padding."""

    start: int
    mask: int
    padding: int
    num_tokens: int  # of the vocabulary, special ones included

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Read them from a fast tokenizer of transformers, or from a plain one by their usual names."""
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        found = {}
        for kind, attributes, names in (
            ("start", ("cls_token", "bos_token"), ("<s>", "[CLS]")),
            ("mask", ("mask_token",), ("<mask>", "[MASK]")),
            ("padding", ("pad_token",), ("<pad>", "[PAD]")),
        ):
            tried = [getattr(tokenizer, attribute, None) for attribute in attributes] + list(names)
            ids = [backend.token_to_id(str(name)) for name in tried if name]
            found[kind] = next((number for number in ids if number is not None), None)
            if found[kind] is None:
                raise InputError(f"the tokenizer has no {kind} token; expected it to know one of {', '.join(names)}")
        return cls(**found, num_tokens=1 + max(backend.get_vocab().values()))


@dataclass(frozen=True)
class ItemTokens:
    """The tokens of all items in flat arrays; item i owns offsets_I1[i] .. offsets_I1[i + 1], item 0 nothing."""

    token_ids_T: np.ndarray  # int32
    type_ids_T: np.ndarray  # int8: 1 key, 2 value
    word_starts_T: np.ndarray  # bool: the first token of a whole word
    offsets_I1: np.ndarray  # int64

    @cached_property
    def lengths_I(self) -> np.ndarray:
        return np.diff(self.offsets_I1)

    @classmethod
    def load(cls, folder: Path) -> "ItemTokens":
        """Memory-map what `tokenize_items` has stored."""
        return cls(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls.__dataclass_fields__))


def tokenize_items(
    attributes: "DataFrame",
    tokenizer: Any,
    *,
    max_attribute_tokens: int = 32,
    max_attributes: int = 3,
    faithful: bool = False,
    folder: Path | None = None,
) -> ItemTokens:
    """Tokenise item attributes (row k is item id k + 1), each cut to `max_attribute_tokens`, key included.

    Key and value are tokenised apart, with no space before either and no special token between them. `faithful` keeps
    two habits of the original: text that spells a special token becomes it, and the first word of each key and value
    belongs to the word before it (it begins with no space). `tokenizer` is a fast one of transformers or of tokenizers.
    With `folder`, the arrays are stored there under the hash of all that they depend on, and read back next time.
    """
    attributes = attributes.iloc[:, :max_attributes]
    backend = _plain(tokenizer, faithful)
    if folder is None:
        return _tokenize(attributes, backend, max_attribute_tokens, faithful)
    place = Path(folder) / _content_key(attributes, backend, max_attribute_tokens, faithful)
    if not place.is_dir():
        with staged_folder(place, keep_existing=True) as partial:
            for name, array in vars(_tokenize(attributes, backend, max_attribute_tokens, faithful)).items():
                np.save(partial / f"{name}.npy", array)
    return ItemTokens.load(place)


def _plain(tokenizer: Any, faithful: bool) -> "Tokenizer":
    """Return a copy of the fast tokenizer that neither cuts nor pads."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(getattr(tokenizer, "backend_tokenizer", tokenizer).to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not faithful
    return backend


def _content_key(attributes: "DataFrame", backend: "Tokenizer", *settings) -> str:
    digest = hashlib.sha256(json.dumps([code_hash([Path(__file__)]), *settings]).encode())
    digest.update(backend.to_str().encode())
    for name in attributes.columns:
        digest.update(json.dumps([name, attributes[name].tolist()]).encode())
    return digest.hexdigest()[:16]


def _tokenize(attributes: "DataFrame", backend: "Tokenizer", most: int, faithful: bool) -> ItemTokens:
    """Lay the stretches (key, value, key, value, ...) of each item one after the other."""
    num_items, stored = len(attributes), 0
    pieces, starts_SI, lengths_SI = [], [], []
    for name in attributes.columns:
        key = np.array(backend.encode(name, add_special_tokens=False).ids[:most], dtype=np.int32)
        values_T, offsets, codes_I = _encode_distinct(backend, attributes[name], most)
        value_lengths_I = np.minimum(np.diff(offsets)[codes_I], most - len(key))
        for piece, starts_I, lengths_I in (
            (key, np.zeros(num_items, np.int64), np.full(num_items, len(key))),
            (values_T, offsets[codes_I], value_lengths_I),
        ):
            pieces.append(piece)
            starts_SI.append(stored + starts_I)
            lengths_SI.append(lengths_I)
            stored += len(piece)
    lengths_IS = np.stack(lengths_SI, axis=1)
    lengths_S = lengths_IS.ravel()
    token_ids_T = np.concatenate(pieces)[stretches(np.stack(starts_SI, axis=1).ravel(), lengths_S)]
    word_starts_T = _begins_word(backend)[token_ids_T]
    if not faithful:
        word_starts_T[(np.cumsum(lengths_S) - lengths_S)[lengths_S > 0]] = True
    types_S = np.tile(np.array([KEY_TYPE, VALUE_TYPE], np.int8), len(lengths_S) // 2)
    offsets_I1 = np.concatenate([[0, 0], np.cumsum(lengths_IS.sum(1))])
    return ItemTokens(token_ids_T, np.repeat(types_S, lengths_S), word_starts_T, offsets_I1)


def _encode_distinct(backend: "Tokenizer", texts: "Series", most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokenise each distinct text once; return the flat ids, their offsets, and which text each item has."""
    import pandas

    codes_I, distinct = pandas.factorize(texts)
    ids, lengths = [np.zeros(0, np.int32)], [0]
    for start in range(0, len(distinct), TEXTS_PER_CALL):
        encoded = backend.encode_batch_fast(distinct[start : start + TEXTS_PER_CALL].tolist(), add_special_tokens=False)
        cut = [each.ids[:most] for each in encoded]
        lengths += map(len, cut)
        ids.append(np.fromiter(chain.from_iterable(cut), np.int32))
    return np.concatenate(ids), np.cumsum(lengths), codes_I


def _begins_word(backend: "Tokenizer") -> np.ndarray:
    """Return for each id whether it begins a word: a WordPiece without `##`, else a space or punctuation in front."""
    known = backend.get_vocab()
    begins = np.zeros(1 + max(known.values()), dtype=bool)
    if type(backend.model).__name__ == "WordPiece":
        prefix = backend.model.continuing_subword_prefix
        begins[[number for token, number in known.items() if not token.startswith(prefix)]] = True
    else:
        first = {"Ġ", "▁", *string.punctuation}  # spaces as byte-level and SentencePiece vocabularies write them
        begins[[number for token, number in known.items() if token[:1] in first]] = True
    return begins


def train_tokenizer(attributes: "DataFrame", num_tokens: int = 1000) -> "Tokenizer":
    """Train a byte-level BPE tokenizer, laid out as RoBERTa's, on texts and keys, for runs without a pretrained one.

    The same attributes give the same tokenizer. It knows at least the 256 bytes and 5 special tokens.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens - 1, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    corpus = chain.from_iterable(chain([name] * len(attributes), attributes[name]) for name in attributes.columns)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(["<mask>"])  # the last id
    return tokenizer


def stretches(starts_S: np.ndarray, lengths_S: np.ndarray) -> np.ndarray:
    """Return the indices of the stretches start .. start + length, one after the other."""
    ends_S = np.cumsum(lengths_S)
    return np.repeat(starts_S - (ends_S - lengths_S), lengths_S) + np.arange(ends_S[-1] if len(ends_S) else 0)


def history_tokens(
    item_tokens: ItemTokens,
    histories: np.ndarray | tuple[np.ndarray, np.ndarray],
    *,
    start_token: int,
    max_items: int = 50,
    max_tokens: int = 1024,
) -> Packed:
    """Write histories as packed tokens: the start token (type 0, position 0), then the newest item, the one before...

    `histories` holds item ids, oldest first: an array (B, L) in which 0 pads, or flat items and offsets (B + 1). The
    k-th newest item has item position k; items beyond `max_items` and tokens beyond `max_tokens`, the start token
    included, are left out, within an item where it falls so. An empty history is its start token. Returns
    `token_ids_T`, `type_ids_T`, `item_positions_T` (int32) and `lengths_B` (int64).
    """
    return pack_histories(item_tokens, histories, start_token, max_items, max_tokens)[0]


def pack_histories(item_tokens, histories, start_token, max_items, max_tokens) -> tuple[Packed, np.ndarray]:
    """Return `history_tokens` and where its whole words start (bool [T])."""
    items, offsets_B1 = _flat(histories)
    kept_B = np.minimum(np.diff(offsets_B1), max_items)
    bounds_B1 = np.concatenate([[0], np.cumsum(kept_B)])
    age_K = np.arange(bounds_B1[-1]) - np.repeat(bounds_B1[:-1], kept_B)
    items_K = items[np.repeat(offsets_B1[1:] - 1, kept_B) - age_K]
    row_K = np.repeat(np.arange(len(kept_B)), kept_B)
    full_K = item_tokens.lengths_I[items_K]
    before_K1 = np.concatenate([[0], np.cumsum(full_K)])
    room_K = max_tokens - 1 - (before_K1[:-1] - before_K1[bounds_B1[row_K]])
    taken_K = np.clip(room_K, 0, full_K)
    taken_K1 = np.concatenate([[0], np.cumsum(taken_K)])
    from_T = stretches(item_tokens.offsets_I1[items_K], taken_K)
    to_T = np.arange(len(from_T)) + np.repeat(row_K + 1, taken_K)  # each row begins with one token more
    total = len(from_T) + len(kept_B)
    batch = {
        "token_ids_T": np.full(total, start_token, np.int32),
        "type_ids_T": np.full(total, START_TYPE, np.int32),
        "item_positions_T": np.zeros(total, np.int32),
        "lengths_B": np.diff(taken_K1[bounds_B1]) + 1,
    }
    batch["token_ids_T"][to_T] = item_tokens.token_ids_T[from_T]
    batch["type_ids_T"][to_T] = item_tokens.type_ids_T[from_T]
    batch["item_positions_T"][to_T] = np.repeat(age_K + 1, taken_K)
    word_starts_T = np.ones(total, dtype=bool)
    word_starts_T[to_T] = item_tokens.word_starts_T[from_T]
    return batch, word_starts_T


def _flat(histories: np.ndarray | tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(histories, tuple):
        return histories
    real_BL = histories != PADDING_ID
    return histories[real_BL], np.concatenate([[0], np.cumsum(real_BL.sum(1))])


def length_sorted_batches(lengths_N: np.ndarray, max_batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield rows, longest first, so many that the longest times their number stays within `max_batch_tokens`.

    At least one row a batch: one that is longer than the budget comes alone.
    """
    order_N = np.argsort(-np.asarray(lengths_N), kind="stable")
    start = 0
    while start < len(order_N):
        size = max(1, max_batch_tokens // max(1, int(lengths_N[order_N[start]])))
        yield order_N[start : start + size]
        start += size
