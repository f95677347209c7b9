"""Vectors of texts on disk: each distinct text is encoded once for one encoder and its settings, and never again.

A store is a folder named by the hash of its settings. In it `vectors.npy` (one row per text) and `texts.npy` (the hash
of each row's text) grow together; their headers are written after the rows that they count, so whatever a killed run
left behind them does not exist, and the next run loses one chunk at most. Any NumPy reads and memory-maps the files.

N texts asked for · U distinct texts in the store · D width
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from textrec.data.storage import write_header
from textrec.data.tokenizing import length_sorted_batches
from textrec.schema import InputError

CHARACTERS_PER_TOKEN = 4  # a first guess, which orders the texts


@dataclass(frozen=True)
class TextVectors:
    """One row for each text asked for: `vectors[rows]` reads some of them, `np.asarray(vectors)` all."""

    stored_UD: np.ndarray  # memory-mapped
    rows_N: np.ndarray  # where in the store each text's vector is

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, rows) -> np.ndarray:
        return self.stored_UD[self.rows_N[rows]]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


def text_vectors(
    texts: Sequence[str],
    encode: Callable[[list], np.ndarray],
    *,
    folder: Path,
    encoder: str,
    max_tokens: int,
    pooling: str = "",
    prompt: str = "",
    dtype: str = "float32",
    tokenize: Callable[[list[str]], Sequence[np.ndarray]] | None = None,
    max_batch_tokens: int = 16_384,
    chunk_texts: int = 4_096,
    progress: Callable[[int, int], Any] | None = None,
) -> TextVectors:
    """Return the vectors of `texts` (row k is text k); `encode` makes those that `folder` does not hold yet.

    `encode` gets a batch, of texts or, with `tokenize`, of their token arrays, and returns [batch, D]. `encoder` names
    weights and tokenizer down to the revision; with `pooling`, `prompt`, `max_tokens` and `dtype` (float32 or float16)
    it says which vectors are the same; to act on them is up to `tokenize` and `encode`. Texts of a batch are about
    equally long, the longest times their number at most `max_batch_tokens`. Each `chunk_texts` texts are put on disk
    and reported to `progress(done, wanted)`; memory holds a chunk of vectors and a few numbers per text. Raises
    `InputError` for vectors that are not [batch, D], not of the width stored, or not finite (float16 ends at 65,504).
    """
    if dtype not in ("float32", "float16"):
        raise InputError(f"dtype is {dtype!r}; expected float32 or float16")
    if not len(texts):
        raise InputError("there are no texts to encode")
    settings = {"encoder": encoder, "pooling": pooling, "prompt": prompt, "max_tokens": max_tokens, "dtype": dtype}
    described, texts = json.dumps(settings, indent=1), list(texts)
    place = Path(folder) / hashlib.sha256(described.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    distinct, first, inverse_N = np.unique(
        np.frombuffer(b"".join(digests), np.int64), return_index=True, return_inverse=True
    )
    with (place / "settings.json").open("a", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever wants the same vectors waits, and then reads them
        if not os.fstat(lock.fileno()).st_size:
            lock.write(described)
        stored_U = np.load(place / "texts.npy") if (place / "texts.npy").exists() else np.zeros(0, np.int64)
        missing = ~np.isin(distinct, stored_U)
        lengths = np.fromiter((len(texts[row]) for row in first[missing]), np.int64) // CHARACTERS_PER_TOKEN
        longest_first = np.argsort(-lengths, kind="stable")
        rows, hashes = first[missing][longest_first], distinct[missing][longest_first]
        for start in range(0, len(rows), chunk_texts):
            chunk = [texts[row] for row in rows[start : start + chunk_texts]]
            vectors = _encode_chunk(chunk, encode, tokenize, max_tokens, max_batch_tokens, dtype)
            _append(place / "vectors.npy", vectors, len(stored_U) + start)
            _append(place / "texts.npy", hashes[start : start + chunk_texts], len(stored_U) + start)
            if progress:
                progress(start + len(chunk), len(rows))
    stored_U = np.load(place / "texts.npy")
    order = np.argsort(stored_U)
    rows_N = order[np.searchsorted(stored_U, distinct, sorter=order)][inverse_N]
    return TextVectors(np.load(place / "vectors.npy", mmap_mode="r"), rows_N)


def _encode_chunk(texts: list[str], encode, tokenize, max_tokens: int, max_batch_tokens: int, dtype: str) -> np.ndarray:
    inputs = tokenize(texts) if tokenize else texts
    per_token = 1 if tokenize else CHARACTERS_PER_TOKEN
    lengths = np.minimum([-(-len(each) // per_token) for each in inputs], max_tokens)
    vectors = None
    for rows in length_sorted_batches(lengths, max_batch_tokens):
        made = np.asarray(encode([inputs[row] for row in rows]))
        if made.ndim != 2 or len(made) != len(rows) or vectors is not None and made.shape[1] != vectors.shape[1]:
            told = f"the encoder made an array of shape {made.shape} of {len(rows)} texts"
            raise InputError(f"{told}; expected a row each")
        if vectors is None:
            vectors = np.empty((len(texts), made.shape[1]), dtype)
        with np.errstate(over="ignore"):
            vectors[rows] = made
    finite = np.isfinite(vectors).all(1)
    if not finite.all():
        text = texts[int(np.argmin(finite))]
        raise InputError(f"the encoder's vector of {text[:60]!r} is not finite in {dtype}")
    return vectors


def _append(path: Path, rows: np.ndarray, at: int) -> None:
    """Write `rows` from row `at` of a .npy file on, then the header that counts them, each safe before the next."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        if at:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if shape[1:] != rows.shape[1:]:
                told = f"the encoder makes vectors of {rows.shape[1]} numbers"
                raise InputError(f"{told}, {path} holds {shape[1]} a text")
        else:
            write_header(file, rows.dtype, (0, *rows.shape[1:]))
        beginning = file.tell()
        file.seek(beginning + at * rows[:1].nbytes)
        file.write(rows.tobytes())
        _synced(file)
        file.seek(0)
        write_header(file, rows.dtype, (at + len(rows), *rows.shape[1:]))
        if file.tell() != beginning:
            raise RuntimeError(f"the header of {path} did not keep its length")
        _synced(file)


def _synced(file) -> None:
    file.flush()
    os.fsync(file.fileno())
