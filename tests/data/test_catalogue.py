"""Texts are cleaned, rows of one item merged, the publisher's files left alone."""

import json
import re

import pytest

from textrec.data.catalogue import NOT_CLEAN, clean_text
from textrec.data.preparing import prepare_frames
from textrec.schema import InputError


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("Barnes &amp; Noble", "Barnes & Noble"),
        ("24&quot; Arm &amp;quot;slim&amp;quot;", '24" Arm "slim"'),
        ("  a\n\tb\u00a0 c ", "a b c"),
        ("<b>Bold</b> and<br/>broken", "Bold and broken"),
        ("&lt;p&gt;escaped&lt;/p&gt;", "escaped"),
        ("x<script>if (a < b) alert('&')</script>y <style type='a'>.b {}</style>z", "x y z"),
        ("<!-- note --> kept", "kept"),
        ('<span class="a-size-medium a-color-secondary"', ""),
        ('Weekly Magazines" />', "Weekly Magazines"),
        ("3 < 4 and I <3 you > me", "3 < 4 and I <3 you > me"),
        ("AT&T R&D", "AT&T R&D"),
        ("Am\u00e9lie \U0001f600", "Am\u00e9lie \U0001f600"),
        ("", ""),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean
    assert raw == clean or re.search(NOT_CLEAN.replace("''", "'"), raw), "no text that needs it is passed by"


LOG = "user_id\titem_id\n" + "".join(f"u\ti{k}\n" for k in (1, 2, 3))
ITEMS = [
    {"item_id": "i2", "title": "<br>", "brand": "", "category": ["A &amp; B", "C"], "_row": 7},
    {"item_id": "i2", "title": "Second", "brand": "Acme", "category": [["D"], ["E", "F"]], "description": None},
    {"item_id": "i9", "title": "Nobody's", "price": 3.5},
    {"item_id": "i1", "title": "First", "brand": None, "category": "plain", "description": ["one", "", "two"]},
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "log.tsv").write_text(LOG, encoding="utf-8")
    (tmp_path / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in ITEMS), encoding="utf-8")
    return tmp_path / "log.tsv", tmp_path / "items.jsonl"


def test_the_first_filled_value_of_each_column_wins(files, tmp_path):
    before = files[1].read_bytes()
    prepared = prepare_frames("set", *files, processed=tmp_path / "processed")
    rows = prepared.catalogue.set_index("item")
    assert rows.index.tolist() == ["i1", "i2", "i3"]
    assert rows.loc["i2", ["title", "brand", "category"]].tolist() == ["Second", "Acme", "A & B, C"]
    assert rows.loc["i1", ["title", "brand", "category", "description"]].tolist() == ["First", "", "plain", "one, two"]
    assert rows.loc["i3"].tolist() == [""] * (len(rows.columns))
    assert prepared.details["catalogue"] == {"listed": 4, "duplicate_rows": 1, "without_row": 1, "without_title": 1}
    assert files[1].read_bytes() == before


def test_every_listed_item_can_be_a_candidate(files, tmp_path):
    prepared = prepare_frames("set", *files, processed=tmp_path / "processed", catalogue="all")
    assert prepared.catalogue["item"].tolist() == ["i1", "i2", "i3", "i9"] and prepared.num_items == 4
    assert prepared.histories.items_E.tolist() == [1, 2, 3]


def test_repeated_and_unlisted_items_can_be_refused(files, tmp_path):
    with pytest.raises(InputError, match="the item table lists 'i2' more than once"):
        prepare_frames("set", *files, processed=tmp_path / "processed", duplicate_items="refuse")
    with pytest.raises(InputError, match="1 items of the interactions have no row in the item table, first 'i3'"):
        prepare_frames("set", *files, processed=tmp_path / "processed", unknown_items="refuse")


def test_interactions_with_unlisted_items_can_be_dropped(files, tmp_path):
    prepared = prepare_frames("set", *files, processed=tmp_path / "processed", unknown_items="drop")
    assert prepared.details["counts"] == {"users": 1, "items": 2, "interactions": 2}
    assert prepared.details["steps"][-1]["step"] == "items with a row in the item table"


def test_without_an_item_file_titles_are_empty(files, tmp_path):
    prepared = prepare_frames("set", files[0], processed=tmp_path / "processed")
    assert prepared.catalogue["title"].tolist() == ["", "", ""]
    assert prepared.details["catalogue"]["without_title"] == 3
