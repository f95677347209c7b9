"""Recommending by texts: pretrained and finetuned folders, the frozen table, catalogues that nobody was trained on."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from training.text_sets import BRANDS, brand_set
from training.text_sets import SMALL as COLLAPSED

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.evaluation.ranking import VectorScorer, top_k
from textrec.models.recformer import RecFormer, RecFormerForPretraining
from textrec.schema import InputError
from textrec.training.pretraining import save_tokenizer
from textrec.training.text_ranking import TextSet, item_table, text_ranks
from textrec.training.text_recommending import text_recommender, with_new_items
from textrec.training.text_rows import run_text_rows
from textrec.training.two_stage import load_pair

SMALL = replace(COLLAPSED, initial_std=0.3)  # so that cosines differ by more than rounding


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> TextSet:
    prepared = brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0, num_users=24)
    return TextSet.of(prepared, train_tokenizer(item_attributes(prepared.catalogue), 400))


@pytest.fixture(scope="module")
def pretrained(texts, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    RecFormerForPretraining(SMALL).save_pretrained(folder)
    save_tokenizer(texts.tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def row(texts, pretrained, tmp_path_factory):
    run_dir, start = tmp_path_factory.mktemp("run"), RecFormerForPretraining.from_pretrained(pretrained).encoder
    brief = {"max_epochs": 1, "batch_size": 12, "warmup_steps": 0, "learning_rate": 1e-2}
    run_text_rows(["two_stage"], texts, start, seed=0, run_dir=run_dir, overrides={"all": brief})
    return run_dir / "rows" / "two_stage"


def history_of(texts: TextSet, user: int) -> list[int]:
    return texts.prepared.histories.prefixes(np.array([user]), texts.prepared.split.test_target_U[[user]])[0].tolist()


def expected(encoder, texts: TextSet, items_ID, history: list[int], k: int) -> list[int]:
    """The list that the evaluation's own scoring gives."""
    packed = texts.packed(np.array([history]), encoder.config)
    arrays = [torch.from_numpy(packed[name]) for name in ("token_ids_T", "type_ids_T", "item_positions_T", "lengths_B")]
    with torch.no_grad():
        vector_1D = torch.nn.functional.normalize(encoder.encode(*arrays), dim=-1)
    seen = np.array(history), np.array([0, len(history)])
    scorer = VectorScorer(lambda rows: vector_1D, items_ID[1:])
    return top_k(scorer, np.array([0]), lambda rows: seen, k, num_items=len(items_ID) - 1)[0].tolist()


def test_a_pretrained_model_lists_what_its_ranks_say(texts, pretrained):
    model, history = text_recommender(pretrained, texts.prepared.catalogue), history_of(texts, 5)
    listed = model.recommend(history, 239)
    assert not {item for item, _ in listed} & set(history) and len(listed) == 240 - len(set(history))
    scores = [score for _, score in listed]
    assert scores == sorted(scores, reverse=True) and scores[0] <= 1 / SMALL.temperature + 1e-4
    encoder = RecFormerForPretraining.from_pretrained(pretrained).encoder
    own = item_table(encoder, texts)
    assert [item for item, _ in listed[:9]] == expected(encoder, texts, own, history, 9)
    ranks, kept = text_ranks(encoder, texts, "test"), [item for item, _ in model.recommend(history, 240, False)]
    assert abs(kept.index(ranks.targets_U[5]) - ranks.kept.higher_U[5]) <= ranks.kept.ties_U[5]
    assert model.recommend(history[::-1], 9) != listed[:9]  # the newest item counts most
    assert len(model.recommend([], 3)) == 3 and not model.encoder.training


def test_a_row_recommends_from_its_frozen_table(texts, row, tmp_path):
    catalogue, fingerprint = texts.prepared.catalogue, texts.prepared.fingerprint
    model, history = text_recommender(row, catalogue, fingerprint), history_of(texts, 3)
    encoder = RecFormer.from_pretrained(row / "model")
    frozen = load_pair(row / "stage1" / "best.safetensors", RecFormer(SMALL))  # stage 2 keeps the table of stage 1
    assert torch.equal(model.item_vectors(), frozen)
    assert [item for item, _ in model.recommend(history, 9)] == expected(encoder, texts, frozen, history, 9)
    encoded = text_recommender(row, catalogue).item_vectors()  # of no set by name: encoded by M'
    assert torch.equal(encoded, item_table(encoder, texts)) and not torch.allclose(encoded, frozen, atol=1e-4)
    other = shutil.copytree(row, tmp_path / "row")
    RecFormer(SMALL).save_pretrained(other / "model")  # the pairs are left over from another model
    assert not torch.allclose(text_recommender(other, catalogue, fingerprint).item_vectors(), frozen, atol=1e-4)


def test_a_catalogue_that_nobody_saw_is_encoded_on_the_spot(texts, pretrained, row):
    brands = [BRANDS[0], BRANDS[7], BRANDS[0], BRANDS[9]]
    shop = pd.DataFrame({"item": list("abcd"), "title": ["salta", "tenor", "morix", "vinum"], "brand": brands}, [9] * 4)
    for folder in (pretrained, row):
        model = text_recommender(folder, texts.prepared.catalogue, texts.prepared.fingerprint)
        before = model.recommend([1, 2], 5)
        listed = model.recommend([1, 4], 2, catalogue=shop)
        assert {item for item, _ in listed} == {2, 3}
        assert listed == text_recommender(folder, shop).recommend([1, 4], 2) == model.over(shop).recommend([1, 4], 2)
        assert model.recommend([1, 2], 5) == before
        untitled = shop.drop(columns="brand").assign(colour="red")  # other columns: read by those of the own catalogue
        assert model.over(untitled).attributes.to_dict("list") == {"title": shop["title"].tolist(), "brand": [""] * 4}
    exchanged = shop.assign(title=shop["title"][::-1].tolist(), brand=brands[::-1])
    scores = [dict(model.recommend([1, 2], 4, False, catalogue=each)) for each in (shop, exchanged)]
    assert scores[0] != scores[1]  # texts decide


def test_mistakes_are_named(texts, pretrained, tmp_path):
    model = text_recommender(pretrained, texts.prepared.catalogue)
    for given, sentence in (
        (([1, 241], 5), "history holds item id 241: expected ids from 1 to 240"),
        (([0], 5), "history holds item id 0"),
        (([1], 0), "k=0: expected a number from 1 to num_items=240"),
        (([1], 241), "k=241"),
    ):
        with pytest.raises(InputError, match=sentence):
            model.recommend(*given)
    few = texts.prepared.catalogue[:3]
    with pytest.raises(InputError, match="item id 4: expected ids from 1 to 3"):
        model.recommend([4], 1, catalogue=few)
    with pytest.raises(InputError, match="none of the 3 items has a text"):
        model.recommend([1], 1, catalogue=few[["item"]])
    with pytest.raises(InputError, match="holds no model that reads texts: tokenizer.json is missing"):
        text_recommender(tmp_path, few)
    (tmp_path / "tokenizer.json").write_bytes((pretrained / "tokenizer.json").read_bytes())
    with pytest.raises(InputError, match="holds no saved model: config.json is missing"):
        text_recommender(tmp_path, few)


def test_new_items_come_behind_the_catalogue_in_their_order(tmp_path):
    catalogue = pd.DataFrame({"item": ["a", "b"], "title": ["Ant", "Bee"], "brand": ["X", ""]})
    (tmp_path / "new.csv").write_text(
        "item_id,title,colour\nz,Zebra &amp; co,red\nb,Bear,\n,nameless,\nc,,\nc,Cat,blue\n"
    )
    found = with_new_items(catalogue, tmp_path / "new.csv")
    assert found["item"].tolist() == ["a", "b", "z", "c"]
    assert found["title"].tolist() == ["Ant", "Bee", "Zebra & co", "Cat"]
    assert found["brand"].tolist() == ["X", "", "", ""] and found["colour"].tolist() == ["", "", "red", "blue"]
    (tmp_path / "bad.csv").write_text("item_id,name\nz,Zebra\n")
    with pytest.raises(InputError, match="no column 'title' for the title"):
        with_new_items(catalogue, tmp_path / "bad.csv")
