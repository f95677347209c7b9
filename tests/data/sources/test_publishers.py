"""Every publisher's format is written from one synthetic set and prepared through its own reader."""

import gzip
import re

import numpy as np
import pytest

from tests.data.publishers import PUBLISHERS, write_raw
from textrec.data import preparing
from textrec.data.sources.synthetic import SyntheticConfig, generate

MADE = generate(SyntheticConfig(num_users=40, seed=5))
ORDER_ONLY = {"mind", "bilibili", "recformer"}
WITHOUT_BRAND = {"movielens-100k", "movielens-1m", "movielens-csv", "mind", "hm", "bilibili"}


@pytest.fixture(scope="module", params=PUBLISHERS)
def prepared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_raw(MADE, folder / "raw", request.param)
    reader, files = PUBLISHERS[request.param]
    recipe = preparing.SetRecipe(name=request.param, reader=reader, files=files, choices={"catalogue": "all"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "known_sets", lambda: {request.param: recipe})
        return preparing.prepare(request.param, raw=folder / "raw", processed=folder / "processed")


def numbers(external) -> np.ndarray:
    return np.array([int(re.sub(r"\D", "", one)) for one in external])


def test_the_same_histories_come_back(prepared):
    users = np.argsort(numbers(prepared.users))
    assert numbers(prepared.users)[users].tolist() == list(range(1, 41))
    items = numbers(prepared.catalogue["item"])
    rows = [slice(*prepared.histories.offsets_U1[user : user + 2]) for user in users]
    assert (
        np.concatenate([items[prepared.histories.items_E[row] - 1] for row in rows]).tolist() == MADE.items_E.tolist()
    )
    resolution = 86_400 if prepared.name == "hm" else 1
    expected_E = np.where(prepared.name in ORDER_ONLY, 0, MADE.times_E // resolution * resolution)
    assert np.array_equal(np.concatenate([prepared.histories.times_E[row] for row in rows]), expected_E)


def test_the_same_item_texts_come_back(prepared):
    found = prepared.catalogue.assign(number=numbers(prepared.catalogue["item"])).set_index("number")
    assert sorted(found.index) == list(range(1, 61))
    for row in MADE.items().itertuples():
        title = re.sub(r" \(\d{4}\)$", "", found["title"][int(row.item)])
        assert title == (row.title.replace('"', "'") if prepared.name == "recbole" else row.title)
        if prepared.name not in WITHOUT_BRAND:
            assert found["brand"][int(row.item)] == row.brand


def test_files_carry_the_habits_of_their_publishers(tmp_path):
    latin = write_raw(MADE, tmp_path / "1m", "movielens-1m")["items"].read_bytes()
    assert "crème".encode("latin-1") in latin
    assert b"::" in latin
    articles = write_raw(MADE, tmp_path / "hm", "hm")["items"].read_text(encoding="utf-8")
    assert articles.splitlines()[1].startswith("0000000001,")
    with gzip.open(write_raw(MADE, tmp_path / "2014", "amazon-2014")["items"], "rt") as file:
        assert file.readline().startswith("{'asin': 'B000000001'")
