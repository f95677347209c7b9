"""A store of text vectors encodes each text once, survives kills, and holds little in memory."""

import hashlib
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from textrec.data.vectors import text_vectors
from textrec.schema import InputError

TEXTS = [f"item {k} " + "long " * (k % 7) for k in range(50)] + ["item 3 " + "long " * 3, "", ""]


def vector(text: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8).astype(np.float32) / 256


class Encoder:
    """Counts what it is asked for; `stop_after` texts it breaks, as a killed run would."""

    def __init__(self, stop_after: int | None = None):
        self.batches, self.stop_after = [], stop_after

    @property
    def texts(self) -> list[str]:
        return [text for batch in self.batches for text in batch]

    def __call__(self, batch: list) -> np.ndarray:
        if self.stop_after is not None and len(self.texts) + len(batch) > self.stop_after:
            raise KeyboardInterrupt
        self.batches.append(list(batch))
        return np.stack([vector(text) for text in batch])


def stored(texts, encode, folder, **settings):
    return text_vectors(texts, encode, folder=folder, **{"encoder": "hash@1", "max_tokens": 32, **settings})


def expected(texts) -> np.ndarray:
    return np.stack([vector(text) for text in texts])


@pytest.mark.parametrize("chunk_texts", [1, 7, 1000])
def test_row_k_is_the_vector_of_text_k_for_any_chunk_and_each_text_is_encoded_once(tmp_path, chunk_texts):
    encode = Encoder()
    vectors = stored(TEXTS, encode, tmp_path, chunk_texts=chunk_texts, max_batch_tokens=40)
    assert sorted(encode.texts) == sorted(set(TEXTS))
    assert len(vectors) == len(TEXTS) and isinstance(vectors.stored_UD, np.memmap)
    assert np.array_equal(np.asarray(vectors), expected(TEXTS))
    assert np.array_equal(vectors[np.array([52, 3])], expected([TEXTS[52], TEXTS[3]]))


def test_a_second_call_encodes_nothing_and_new_texts_alone_are_added(tmp_path):
    stored(TEXTS, Encoder(), tmp_path)
    shuffled = TEXTS[::-1][:30]
    assert np.array_equal(stored(shuffled, None, tmp_path)[:], expected(shuffled))
    encode = Encoder()
    grown = [*TEXTS, "new", "newer"]
    assert np.array_equal(stored(grown, encode, tmp_path)[:], expected(grown))
    assert sorted(encode.texts) == ["new", "newer"]


def test_batches_are_longest_first_and_within_the_budget(tmp_path):
    encode = Encoder()
    stored(TEXTS, encode, tmp_path, max_batch_tokens=40)
    lengths = [[max(1, -(-len(text) // 4)) for text in batch] for batch in encode.batches]
    assert all(max(batch) * len(batch) <= 40 for batch in lengths) and len(lengths) > 5
    assert all(min(before) >= max(after) for before, after in zip(lengths, lengths[1:], strict=False))


def test_token_arrays_are_made_chunk_by_chunk_and_batched_by_their_number(tmp_path):
    asked, batches = [], []

    def tokenize(texts):
        asked.append(len(texts))
        return [np.arange(len(text.split()) + 2) for text in texts]

    def encode(arrays):
        batches.append([len(tokens) for tokens in arrays])
        return np.array([[len(tokens), 1] for tokens in arrays], dtype=np.float32)

    vectors = stored(TEXTS, encode, tmp_path, tokenize=tokenize, chunk_texts=20, max_batch_tokens=24)
    assert asked == [20, 20, 11] and all(len(batch) * max(batch) <= 24 for batch in batches)
    assert vectors[:][:, 0].tolist() == [len(text.split()) + 2 for text in TEXTS]


@pytest.mark.parametrize("stop_after", [0, 25, 50])
def test_a_killed_run_keeps_its_finished_chunks(tmp_path, stop_after):
    first, second = Encoder(stop_after), Encoder()
    with pytest.raises(KeyboardInterrupt):
        stored(TEXTS, first, tmp_path, chunk_texts=10, max_batch_tokens=10)
    assert np.array_equal(stored(TEXTS, second, tmp_path, chunk_texts=10)[:], expected(TEXTS))
    assert len(second.texts) == len(set(TEXTS)) - stop_after // 10 * 10
    assert len(first.texts) + len(second.texts) < len(set(TEXTS)) + 10


@pytest.mark.parametrize("torn", ["vectors.npy", "texts.npy", "vectors ahead"])
def test_what_a_dying_process_left_behind_the_counted_rows_does_not_exist(tmp_path, torn):
    stored(TEXTS[:20], Encoder(), tmp_path)
    place = next(tmp_path.iterdir())
    if torn == "vectors ahead":  # died between the two files
        from textrec.data.vectors import _append

        _append(place / "vectors.npy", np.full((5, 32), 9, np.float32), 20)
    else:
        with (place / torn).open("ab") as file:
            file.write(b"half a row")
    encode = Encoder()
    assert np.array_equal(stored(TEXTS, encode, tmp_path)[:], expected(TEXTS))
    assert len(encode.texts) == len(set(TEXTS)) - 20
    assert np.array_equal(stored(TEXTS, None, tmp_path)[:], expected(TEXTS))


def test_a_real_kill_loses_one_chunk_at_most(tmp_path):
    child = os.fork()
    if child == 0:
        encode = Encoder(stop_after=37)
        try:
            stored(TEXTS, encode, tmp_path, chunk_texts=10, max_batch_tokens=10)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    encode = Encoder()
    assert np.array_equal(stored(TEXTS, encode, tmp_path)[:], expected(TEXTS))
    assert len(encode.texts) == len(set(TEXTS)) - 30


def test_two_at_once_share_the_work(tmp_path):
    encoders = [Encoder(), Encoder()]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda encode: stored(TEXTS, encode, tmp_path, chunk_texts=5)[:], encoders))
    assert all(np.array_equal(result, expected(TEXTS)) for result in results)
    assert sum(len(encode.texts) for encode in encoders) == len(set(TEXTS))


def test_whatever_a_vector_depends_on_is_part_of_the_key(tmp_path):
    for count, changed in enumerate(
        (
            {},
            {"encoder": "hash@2"},
            {"pooling": "mean"},
            {"prompt": "query: "},
            {"dtype": "float16"},
            {"max_tokens": 8},
        ),
        start=1,
    ):
        encode = Encoder()
        stored(TEXTS, encode, tmp_path, **changed)
        assert len(encode.texts) == len(set(TEXTS)) and len(list(tmp_path.iterdir())) == count


def test_half_precision_is_stored_as_such(tmp_path):
    vectors = stored(TEXTS, Encoder(), tmp_path, dtype="float16")
    assert vectors.stored_UD.dtype == np.float16
    np.testing.assert_allclose(vectors[:], expected(TEXTS), atol=5e-4)


def test_the_files_are_plain_arrays(tmp_path):
    for count in (3, 20, 53):
        stored(TEXTS[:count], Encoder(), tmp_path, chunk_texts=4)
        place = next(tmp_path.iterdir())
        assert np.load(place / "vectors.npy").shape == (len(set(TEXTS[:count])), 32)
        assert np.load(place / "texts.npy").shape == (len(set(TEXTS[:count])),)


def test_bad_vectors_and_settings_are_named_and_not_stored(tmp_path):
    with pytest.raises(InputError, match="dtype is 'int8'; expected float32 or float16"):
        stored(TEXTS, Encoder(), tmp_path, dtype="int8")
    with pytest.raises(InputError, match="no texts"):
        stored([], Encoder(), tmp_path)
    with pytest.raises(InputError, match=r"shape \(2,\) of 2 texts"):
        stored(["a", "b"], lambda batch: np.zeros(len(batch)), tmp_path)
    for value, dtype in ((np.nan, "float32"), (7e4, "float16")):
        with pytest.raises(InputError, match=f"vector of 'b' is not finite in {dtype}"):
            stored(["a", "b"], lambda b, v=value: np.array([[v if t == "b" else 0] for t in b]), tmp_path, dtype=dtype)
    stored(["a"], Encoder(), tmp_path)
    with pytest.raises(InputError, match="vectors of 3 numbers, .* holds 32 a text"):
        stored(["b"], lambda batch: np.zeros((len(batch), 3)), tmp_path)
    assert np.array_equal(stored(["a", "b"], Encoder(), tmp_path)[:], expected(["a", "b"]))


def test_memory_holds_a_chunk_not_the_catalogue(tmp_path):
    texts = [f"{k} of many items" for k in range(20_000)]

    def encode(batch):
        return np.repeat(np.array([[len(text)] for text in batch], np.float32), 512, axis=1)

    tracemalloc.start()
    try:
        vectors = stored(texts, encode, tmp_path, chunk_texts=1_024)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert vectors.stored_UD.nbytes > 40e6 and peak < 12e6
    assert vectors[0][0] == len(texts[0]) and vectors[[19_999]][0, -1] == len(texts[-1])
