"""Two own files and an embedder: every listed item is a candidate, those nobody had are marked, vectors are written."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors import safe_open

from textrec.data import preparing
from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.models.text_encoder import TextEncoder, save_random_embedder
from textrec.schema import InputError
from textrec.training.embedder_recommending import recommender_of_files, write_item_vectors

ITEMS = [("tent", "camping tent"), ("stove", "camping stove"), ("violin", "student violin"), ("reed", "clarinet reed"),
         ("bag", "camping bag camping bag"), ("bow", "violin bow student violin")]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    pd.DataFrame(ITEMS, columns=["item", "title"]).to_csv(tmp_path / "products.csv", index=False)
    rows = [("u1", "tent", 1), ("u1", "stove", 2), ("u2", "reed", 1), ("u2", "violin", 2)]
    pd.DataFrame(rows, columns=["user", "item", "time"]).to_csv(tmp_path / "sales.csv", index=False)
    return tmp_path


@pytest.fixture
def encoder(files):
    attributes = item_attributes(pd.DataFrame(ITEMS, columns=["item", "title"]))
    save_random_embedder(train_tokenizer(attributes, 350), files / "model")
    return TextEncoder(files / "model")


def test_cold_items_are_recommended_and_named(files, encoder, monkeypatch):
    monkeypatch.setattr(preparing, "PROCESSED", files / "processed")
    interactions, items = files / "sales.csv", files / "products.csv"
    prepared, model, new = recommender_of_files(interactions, items, encoder, folder=files / "store")
    ids = {external: row + 1 for row, external in enumerate(prepared.catalogue["item"])}
    assert new == {ids["bag"], ids["bow"]} and prepared.num_items == len(ITEMS)
    read = encoder.encode(encoder.tokenize(prepared.catalogue["title"].tolist()))
    older, newest = (read[ids[item] - 1] for item in ("tent", "stove"))
    by_hand = read @ (older * 0.5 ** (1 / model.config.half_life) + newest)
    expected = sorted((item for item in ids if item not in ("tent", "stove")), key=lambda item: -by_hand[ids[item] - 1])
    found = [item for item, _ in model.recommend([ids["tent"], ids["stove"]], 4)]
    assert found == [ids[item] for item in expected] and new < {*found}


def test_vectors_are_written_in_the_order_of_the_file(files, encoder):
    told = []
    place = {"folder": files / "store", "progress": lambda done, wanted: told.append((done, wanted))}
    assert write_item_vectors(files / "products.csv", encoder, files / "out.safetensors", **place) == (6, 32)
    with safe_open(files / "out.safetensors", "np") as file:
        vectors, named = file.get_tensor("vectors"), json.loads(file.metadata()["items"])
    assert named == [item for item, _ in ITEMS] and told == [(6, 6)]
    np.testing.assert_allclose(vectors, encoder.encode(encoder.tokenize([title for _, title in ITEMS])), atol=1e-6)


def test_a_file_without_titles_is_one_sentence(files, encoder):
    (files / "bare.csv").write_text("item,colour\na,red\n")
    with pytest.raises(InputError, match="no column 'title'"):
        write_item_vectors(files / "bare.csv", encoder, files / "out.safetensors", folder=files / "store")
