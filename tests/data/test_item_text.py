"""Item attributes follow the set and its gaps; texts for embedders; shuffled texts keep the texts, not the items."""

import numpy as np
import pandas as pd
import pytest

from textrec.data.item_text import duplicate_share, item_attributes, item_texts, shuffled_texts
from textrec.data.prepared import PreparedSet
from textrec.paths import PROCESSED
from textrec.schema import InputError


def catalogue(**columns) -> pd.DataFrame:
    length = len(next(iter(columns.values())))
    return pd.DataFrame({"item": [f"i{k}" for k in range(length)], **columns})


FULL = catalogue(
    category=["Tools", "", "Music"], title=["Saw", "Drill", ""], description=["long", "", ""], brand=["", "Ox", ""]
)


def test_the_attributes_come_in_the_order_of_the_model_not_of_the_file():
    found = item_attributes(FULL)
    assert list(found.columns) == ["title", "brand", "category"]
    assert found.to_numpy().tolist() == [["Saw", "", "Tools"], ["Drill", "Ox", ""], ["", "", "Music"]]


def test_an_attribute_that_no_item_has_is_no_attribute():
    assert list(item_attributes(catalogue(title=["a", "b"], brand=["", ""])).columns) == ["title"]
    assert list(item_attributes(catalogue(title=["", ""], brand=["", "b"])).columns) == ["brand"]


def test_other_columns_are_taken_by_name_and_a_misspelt_one_is_an_error():
    assert list(item_attributes(FULL, ["description", "title"]).columns) == ["description", "title"]
    with pytest.raises(InputError, match=r"no text column 'titel' \(did you mean 'title'\?\); .*category, title"):
        item_attributes(FULL, ["titel"])


def test_a_merged_text_alone_stands_under_the_key_title():
    found = item_attributes(catalogue(title=["", ""], merged_text=["Saw. Ox.", ""]))
    assert found.to_dict("list") == {"title": ["Saw. Ox.", ""]}
    beside = item_attributes(catalogue(title=["Saw", ""], merged_text=["Saw. Ox.", "Drill."]))
    assert beside.to_dict("list") == {"title": ["Saw", ""]}


@pytest.mark.parametrize("names", [None, ["title"]])
def test_a_set_without_texts_is_refused_by_name(names):
    with pytest.raises(InputError, match="none of the 2 items has a text in title"):
        item_attributes(catalogue(title=["", ""]), names)


def test_missing_values_of_a_frame_made_by_hand_are_empty():
    assert item_attributes(catalogue(title=["a", None]))["title"].tolist() == ["a", ""]


def test_item_texts_leave_out_what_is_empty():
    assert item_texts(item_attributes(FULL)).tolist() == ["Saw. Tools", "Drill. Ox", "Music"]
    assert item_texts(item_attributes(FULL, ["title"])).tolist() == ["Saw", "Drill", ""]


def test_duplicates_are_counted_on_both_sides():
    assert duplicate_share(pd.Series(["a", "b", "a", "c"])) == 0.5
    assert duplicate_share(pd.DataFrame({"title": ["a", "a"], "brand": ["x", "y"]})) == 0


def test_shuffled_texts_move_whole_rows_and_depend_on_the_seed():
    attributes = pd.DataFrame({"title": [f"t{k}" for k in range(200)], "brand": [f"b{k}" for k in range(200)]})
    shuffled = shuffled_texts(attributes, 3)
    assert sorted(shuffled["title"]) == sorted(attributes["title"])
    assert (shuffled["title"].str[1:] == shuffled["brand"].str[1:]).all()
    assert shuffled.index.equals(attributes.index)
    assert (shuffled["title"] == attributes["title"]).mean() < 0.05
    assert shuffled.equals(shuffled_texts(attributes, 3)) and not shuffled.equals(shuffled_texts(attributes, 4))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("amazon-2018-scientific", ["title", "brand", "category"]),
        ("amazon-2014-beauty", ["title", "brand", "category"]),
        ("amazon-2018-games", ["title"]),
        ("amazon-2014-clothing", ["title"]),
    ],
)
def test_prepared_sets_have_the_attributes_that_their_sources_give(name, expected):
    if not (PROCESSED / name / "fingerprint.json").is_file():
        pytest.skip(f"needs data/processed/{name}")
    prepared = PreparedSet.load(PROCESSED / name)
    attributes = item_attributes(prepared.catalogue)
    assert list(attributes.columns) == expected and len(attributes) == prepared.num_items
    texts = item_texts(attributes)
    assert (texts != "").mean() > 0.9 and duplicate_share(texts) < 0.5
    assert np.array_equal(texts.index, np.arange(prepared.num_items))
