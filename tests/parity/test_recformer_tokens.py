"""Tokens of items, histories and batches against those that RecFormer's own tokenizer gave, id by id."""

import json

import numpy as np
import pandas as pd
import pytest
from transformers import AddedToken, LongformerTokenizer

from textrec.data.tokenizing import SpecialTokens, history_tokens, tokenize_items

KEYS = {"token_ids_T": "input_ids", "type_ids_T": "token_type_ids", "item_positions_T": "item_position_ids"}


@pytest.fixture(scope="module")
def original(golden):
    return json.loads((golden / "recformer" / "encodings.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer(golden):
    folder = golden / "recformer" / "tokenizer"
    mask = AddedToken("<mask>", lstrip=True, special=True)  # takes the space before it, as the published one does
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return LongformerTokenizer(**files, mask_token=mask)


def frame(items: list[dict]) -> pd.DataFrame:
    names = [name for name in ("title", "brand", "category", "color") if name in items[0]]
    return pd.DataFrame(items)[names].fillna("")


def encoded(items, histories, tokenizer, *, max_tokens=1024, **settings) -> dict:
    tokens = tokenize_items(frame(items), tokenizer, faithful=True, **settings)
    start = SpecialTokens.of(tokenizer).start
    return history_tokens(tokens, np.array(histories), start_token=start, max_tokens=max_tokens)


def as_original(packed: dict) -> dict:
    return {theirs: packed[ours].tolist() for ours, theirs in KEYS.items()}


def ids_of(recorded: dict) -> dict:
    return {name: recorded[name] for name in KEYS.values()}


def test_the_special_ids_are_the_originals(tokenizer):
    assert SpecialTokens.of(tokenizer) == SpecialTokens(start=0, mask=400, padding=1, num_tokens=401)


def test_strings_and_keys_become_the_originals_ids(original, tokenizer):
    for table in ("strings", "key_tokens"):
        for text, expected in original[table].items():
            assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == expected, text


def test_items_become_the_originals_tokens(original, tokenizer):
    tokens = tokenize_items(frame(original["items"]), tokenizer, faithful=True)
    assert tokens.offsets_I1[:2].tolist() == [0, 0]
    for item, expected in enumerate(original["encode_item"], start=1):
        at = slice(tokens.offsets_I1[item], tokens.offsets_I1[item + 1])
        assert tokens.token_ids_T[at].tolist() == expected["input_ids"]
        assert tokens.type_ids_T[at].tolist() == expected["token_type_ids"]


def test_one_item_and_none_become_the_originals_sequences(original, tokenizer):
    for item, expected in enumerate(original["encode_single"], start=1):
        assert as_original(encoded(original["items"], [[item]], tokenizer)) == ids_of(expected)
    assert as_original(encoded(original["items"], [[0]], tokenizer)) == ids_of(original["encode_empty_history"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("encode_five_oldest_first", {}),
        ("encode_five_max_token_64", {"max_tokens": 64}),
        ("encode_five_max_attr_2x6", {"max_attributes": 2, "max_attribute_tokens": 6}),
    ],
)
def test_five_items_become_the_originals_sequence(original, tokenizer, name, settings):
    assert as_original(encoded(original["items"], [[1, 2, 3, 4, 5]], tokenizer, **settings)) == ids_of(original[name])


def test_long_histories_are_cut_where_the_original_cuts(original, tokenizer):
    sixty = [[1 + k % 5 for k in range(60)]]
    found = as_original(encoded(original["items"], sixty, tokenizer))
    assert found == ids_of(original["encode_sixty_items_default_1024"]) and len(found["input_ids"]) == 1024
    short = encoded(original["sixty_short_items"], [list(range(1, 61))], tokenizer)
    assert as_original(short) == ids_of(original["encode_sixty_short_items"])
    assert short["item_positions_T"].max() == 50


@pytest.mark.parametrize("name", ["batch_call", "batch_call_pad_to_max_128"])
def test_a_batch_is_the_originals_without_its_padding(original, tokenizer, name):
    recorded = {key: np.array(value) for key, value in original[name].items()}
    real_BL = recorded["attention_mask"] == 1
    singles = {tuple(each["input_ids"]): item for item, each in enumerate(original["encode_item"], start=1)}
    histories = [
        [singles[tuple(ids[positions == k])] for k in range(positions[real].max(initial=0), 0, -1)]
        for ids, positions, real in zip(recorded["input_ids"], recorded["item_position_ids"], real_BL, strict=True)
    ]
    width = max(map(len, histories))
    padded = [[0] * (width - len(items)) + items for items in histories]
    packed = encoded(original["items"], padded, tokenizer)
    assert packed["lengths_B"].tolist() == real_BL.sum(1).tolist()
    assert as_original(packed) == {name: recorded[name][real_BL].tolist() for name in KEYS.values()}


def test_text_that_spells_a_special_token_becomes_it_only_where_we_copy_the_original(original, tokenizer):
    for item, expected in zip(original["hostile_items"][:3], original["encode_hostile"], strict=False):
        tokens = tokenize_items(frame([item]), tokenizer, faithful=True)
        assert tokens.token_ids_T.tolist() == expected["input_ids"]
        assert tokens.type_ids_T.tolist() == expected["token_type_ids"]
    ours = tokenize_items(frame(original["hostile_items"][:1]), tokenizer)
    assert not set(ours.token_ids_T) & {0, 1, 2, 3, 400}


def test_history_order_key_and_cut_each_matter_to_the_parity(original, tokenizer):
    expected = ids_of(original["encode_five_oldest_first"])
    assert as_original(encoded(original["items"], [[5, 4, 3, 2, 1]], tokenizer)) != expected
    assert as_original(encoded(original["items"], [[1, 2, 3, 4, 5]], tokenizer, max_attribute_tokens=33)) != expected
    first = original["encode_item"][0]["input_ids"]
    swapped = [{key: item[key] for key in ("brand", "title", "category")} for item in original["items"]]
    tokens = tokenize_items(pd.DataFrame(swapped), tokenizer, faithful=True)
    assert tokens.token_ids_T[: len(first)].tolist() != first
