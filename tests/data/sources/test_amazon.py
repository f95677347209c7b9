"""Amazon reviews and metadata of three editions, with the traps they carry."""

import gzip
import json

import duckdb
import pytest

from textrec.data import files
from textrec.data.choices import Choices
from textrec.data.preparing import SetRecipe, prepare, prepare_recipe
from textrec.data.sources import amazon
from textrec.schema import InputError

REVIEWS_2018 = [
    {
        "overall": 5.0,
        "reviewerID": "A",
        "asin": "B1",
        "unixReviewTime": 1472688000,
        "style": {"Size:": "7"},
        "vote": "3",
    },
    {"overall": 4.0, "reviewerID": "A", "asin": "B2", "unixReviewTime": 1384387200, "reviewText": "x\ny"},
    {"overall": 1.0, "reviewerID": "A", "asin": "B1", "unixReviewTime": 1472688000},
]
META_2018 = [
    {
        "asin": "B1",
        "title": '<span class="a-size-medium"',
        "brand": "",
        "category": ["Home &amp; Garden", "X"],
        "rank": ["9"],
    },
    {
        "asin": "B1",
        "title": "Lamp &quot;Eve&quot;",
        "brand": "Acme",
        "category": [],
        "rank": "12 in Home (",
        "price": "$1,004.99",
    },
    {
        "asin": "B2",
        "title": "Rug",
        "description": ["One.", "", "<b>Two</b>"],
        "price": ".a-box{border:0}",
        "rank": None,
    },
    {"asin": "B3", "title": "Never sold", "price": "$4.99 - $6.99"},
]


def write(path, records, as_text=json.dumps):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(as_text(record) + "\n" for record in records))
    return path


def made(tmp_path, reviews, items=None, **choices):
    files = {"interactions": reviews} | ({"items": items} if items else {})
    recipe = SetRecipe(name="set", reader="amazon.read")
    return prepare_recipe("set", recipe, files, Choices(**choices), tmp_path / "out")


def test_2018(tmp_path):
    reviews, meta = write(tmp_path / "r.json.gz", REVIEWS_2018), write(tmp_path / "m.json.gz", META_2018)
    prepared = made(tmp_path, reviews, meta)
    rows = prepared.catalogue.set_index("item")
    assert rows.loc["B1", ["title", "brand", "category", "price"]].tolist() == [
        'Lamp "Eve"',
        "Acme",
        "Home & Garden, X",
        "1004.99",
    ]
    assert rows.loc["B2", ["title", "description", "price"]].tolist() == ["Rug", "One., Two", ""]
    assert prepared.details["catalogue"] == {"listed": 4, "duplicate_rows": 1, "without_row": 0, "without_title": 0}
    assert prepared.histories.items_E.tolist() == [2, 1, 1]  # the repeated pair is kept unless a rule is chosen
    assert made(tmp_path, reviews, meta, duplicate_rule="keep_first").histories.items_E.tolist() == [2, 1]
    assert made(tmp_path, reviews, meta, min_rating=4).histories.items_E.tolist() == [2, 1]


def test_2014_metadata_are_python_literals(tmp_path):
    meta = [
        {"asin": "B1", "title": 'It\'s "here"', "categories": [["Beauty", "Skin"], ["Beauty", "Hair"]], "price": 5.04},
        {"asin": "B2", "description": "No title", "related": {"also_viewed": ["X"]}, "categories": [["Beauty"]]},
    ]
    prepared = made(tmp_path, write(tmp_path / "r.json.gz", REVIEWS_2018), write(tmp_path / "m.json.gz", meta, repr))
    assert prepared.catalogue["title"].tolist() == ['It\'s "here"', ""]
    assert prepared.catalogue["category"].tolist() == ["Beauty, Skin, Hair", "Beauty"]
    assert prepared.catalogue["price"].tolist() == ["5.04", ""]
    broken = tmp_path / "broken.json.gz"
    broken.write_bytes(gzip.compress(b"{'asin': 'B1'}\n{'asin': open('x')}\n"))
    with pytest.raises(InputError, match=r"broken.json.gz, line 2: neither a JSON object nor a Python literal"):
        made(tmp_path, tmp_path / "r.json.gz", broken)


def test_2023_milliseconds_order_and_seconds_are_stored(tmp_path):
    times = {"P1": 1588687728923, "P2": 1588687728111, "P3": 1588687728500}
    reviews = [
        {"rating": 5.0, "title": "t", "asin": "V", "parent_asin": item, "user_id": "U", "timestamp": time}
        for item, time in times.items()
    ]
    meta = [
        {
            "parent_asin": "P1",
            "title": "One",
            "store": "Shop",
            "categories": ["A", "B"],
            "features": ["f"],
            "price": None,
        }
    ]
    prepared = made(tmp_path, write(tmp_path / "r.jsonl.gz", reviews), write(tmp_path / "m.jsonl.gz", meta))
    assert prepared.histories.items_E.tolist() == [2, 3, 1]
    assert prepared.histories.times_E.tolist() == [1588687728] * 3
    row = prepared.catalogue.iloc[0]
    assert [row["title"], row["brand"], row["category"], row["feature"], row["price"]] == [
        "One",
        "Shop",
        "A, B",
        "f",
        "",
    ]


def test_a_file_of_another_kind_is_refused(tmp_path):
    connection = duckdb.connect(config={"temp_directory": str(tmp_path)})
    reviews = write(tmp_path / "r.json.gz", REVIEWS_2018)
    cases = {
        "has no field 'reviewerID' in line 1; its fields are asin": write(tmp_path / "a.json.gz", [{"asin": "B"}]),
        "has no field 'asin' in line 1": write(tmp_path / "b.json.gz", [{"reviewerID": "A"}]),
        "expected a JSON object with named fields": write(tmp_path / "c.json.gz", [[1, 2]]),
        "neither a JSON object nor a Python literal": write(tmp_path / "d.json.gz", ["x"], lambda _: "<html>"),
    }
    for sentence, path in cases.items():
        with pytest.raises(InputError, match=sentence):
            amazon.read(connection, {"interactions": path})
    with pytest.raises(InputError, match="has no field 'asin' or 'parent_asin'"):
        amazon.read(connection, {"interactions": reviews, "items": write(tmp_path / "e.json.gz", [{"title": "x"}])})


@pytest.mark.parametrize("kept", [12, 60, -30])
def test_a_truncated_file_is_named(tmp_path, kept):
    data = write(tmp_path / "r.json.gz", REVIEWS_2018 * 300).read_bytes()
    (tmp_path / "r.json.gz").write_bytes(data[:kept])
    with pytest.raises(InputError, match="r.json.gz cannot be read: "):
        made(tmp_path, tmp_path / "r.json.gz")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("role", ["interactions", "items"])
def test_broken_gzip_and_broken_json_are_told_from_one_another(tmp_path, role):
    files = {"interactions": write(tmp_path / "r.json.gz", REVIEWS_2018 * 300)}
    files["items"] = write(tmp_path / "m.json.gz", [{**META_2018[0], "asin": f"B{k}"} for k in range(900)])
    text = gzip.decompress(files[role].read_bytes())
    broken = text.replace(b'"asin"', b'"asin', 500).replace(b'"asin', b'"asin"', 499)  # in line 500 alone
    for data, told in (
        (gzip.compress(text)[:-8] + bytes(8), "CRC check failed"),
        (gzip.compress(text)[:-9], "Compressed file ended before the end-of-stream marker was reached"),
        (gzip.compress(broken), r"Malformed JSON at byte \d+ in line 50[01]: .*"),
    ):
        files[role].write_bytes(data)
        with pytest.raises(InputError, match=f"{files[role].name} cannot be read: {told}") as caught:
            made(tmp_path, files["interactions"], files["items"])
        assert "work" not in str(caught.value) and not list((tmp_path / "out").iterdir())


def test_on_a_small_disk_the_set_is_the_same(tmp_path, monkeypatch):
    reviews, meta = write(tmp_path / "r.json.gz", REVIEWS_2018), write(tmp_path / "m.json.gz", META_2018)
    fingerprint = made(tmp_path, reviews, meta).fingerprint
    monkeypatch.setattr(files, "ROOM", 2**60)
    monkeypatch.setattr(files.tempfile, "mkstemp", None)  # nothing is unpacked
    assert made(tmp_path / "again", reviews, meta).fingerprint == fingerprint


def test_a_file_in_another_encoding_is_named(tmp_path):
    lines = [json.dumps(record, ensure_ascii=False) for record in [*REVIEWS_2018, {**REVIEWS_2018[0], "asin": "é"}]]
    for order in (1, -1):
        (tmp_path / "r.json").write_text("\n".join(lines[::order]), encoding="latin-1")
        with pytest.raises(InputError, match="r.json cannot be read: "):
            made(tmp_path, tmp_path / "r.json")


def test_a_time_that_is_none_is_named_with_its_line(tmp_path):
    reviews = write(tmp_path / "r.json.gz", [*REVIEWS_2018, {**REVIEWS_2018[0], "unixReviewTime": "soon"}])
    with pytest.raises(InputError, match=r"r.json.gz, line 4: the time is 'soon'"):
        made(tmp_path, reviews)


@pytest.mark.real
def test_the_real_metadata_lose_their_traps(real_data, tmp_path):
    prepared = prepare("amazon-2018-magazines", raw=real_data, processed=tmp_path, catalogue="all")
    assert prepared.details["catalogue"]["listed"] == 3385
    assert prepared.details["catalogue"]["duplicate_rows"] == 3385 - 2320
    listed = prepared.num_items - prepared.details["catalogue"]["without_row"]
    assert listed == 2320
    texts = prepared.catalogue
    assert not texts["title"].str.contains("<span|a-size-medium|&amp;|&quot;").any()
    assert not texts["description"].str.contains("<[a-z]+ |&amp;|&quot;").any()
    prices = texts["price"][texts["price"] != ""].astype(float)
    assert (prices > 0).all()
