"""Embedders read as sentence-transformers does, each side with its prompt; users made of item vectors, by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.models.text_encoder import TextEncoder, VectorModel, VectorModelConfig, save_random_embedder
from textrec.schema import InputError

TEXTS = [
    "red kettle, acme",
    "",
    "blue tent with poles and a very long name that goes on and on",
    "kettle",
    "tent 12-inch",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import pandas as pd

    place = tmp_path_factory.mktemp("embedder") / "model"
    attributes = item_attributes(pd.DataFrame({"item": range(len(TEXTS)), "title": TEXTS}))
    save_random_embedder(train_tokenizer(attributes, 300), place, max_tokens=48)
    return place


@pytest.fixture(scope="module")
def prompted(folder, tmp_path_factory):
    """The same model saved with prompts, last-token pooling and a dense layer, as some are published."""
    place = tmp_path_factory.mktemp("prompted") / "model"
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    torch.manual_seed(0)
    modules = [Transformer(str(folder)), Pooling(32, "lasttoken", include_prompt=False), Dense(32, 16)]
    prompts = {"query": "find: ", "passage": "item: "}
    SentenceTransformer(modules=modules, prompts=prompts).save(str(place))
    return place


def read(encoder, side, texts=TEXTS):
    return encoder.encode(encoder.tokenize(texts, side), side)


@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("name", ["folder", "prompted"])
def test_vectors_are_those_of_sentence_transformers(request, name, side):
    place = request.getfixturevalue(name)
    encoder, theirs = TextEncoder(place), SentenceTransformer(str(place))
    prompt = {"folder": None, "prompted": {"query": "find: ", "document": "item: "}[side]}[name]
    expected = theirs.encode(TEXTS, prompt=prompt, normalize_embeddings=True)
    np.testing.assert_allclose(read(encoder, side), expected, atol=2e-6)
    np.testing.assert_allclose(np.concatenate([read(encoder, side, [text]) for text in TEXTS]), expected, atol=2e-6)


def test_one_text_is_one_vector_on_both_sides_but_as_published(folder):
    encoder = TextEncoder(folder)
    texts = [text for text in TEXTS if text]
    np.testing.assert_allclose((read(encoder, "query", texts) * read(encoder, "document", texts)).sum(1), 1, atol=1e-5)
    published = read(encoder, "published_history", texts) * read(encoder, "published_item", texts)
    assert published.sum(1).max() < 0.9  # a mean and a pooler are two spaces


def test_named_poolings_are_what_they_are_called(folder):
    states = TextEncoder(folder).model.encode(TEXTS[0], output_value="token_embeddings")
    by_hand = {"first": states[0], "mean": states.mean(0), "last": states[-1]}
    for pooling, expected in by_hand.items():
        found = read(TextEncoder(folder, pooling=pooling), "document", TEXTS[::2])[0]  # which is padded
        np.testing.assert_allclose(found, F.normalize(expected, dim=0).numpy(), atol=1e-5)


def test_texts_are_cut_to_the_limit_and_prompts_given_replace_those_of_the_folder(folder, prompted):
    assert max(map(len, TextEncoder(folder, max_tokens=5).tokenize(TEXTS))) == 5
    assert TextEncoder(prompted).sides["query"] == ("own", "find: ")
    given = TextEncoder(prompted, query_prompt="", document_prompt="a: ")
    assert (given.sides["query"][1], given.sides["document"][1]) == ("", "a: ")
    plain = given.tokenize(["kettle"], "query")[0]
    np.testing.assert_array_equal(plain, TextEncoder(folder).tokenize(["kettle"])[0])


def test_a_tokenizer_of_other_rules_and_the_same_vocabulary_is_another_encoder(folder, tmp_path):
    own, place = TextEncoder(folder), tmp_path / "model"
    own.tokenize(TEXTS)  # cuts, which is no rule of the tokenizer
    assert TextEncoder(folder).config == own.config
    shutil.copytree(folder, place)
    (written,) = place.rglob("tokenizer.json")
    rules = json.loads(written.read_text())
    rules["normalizer"] = {"type": "Lowercase"} if rules["normalizer"] is None else None
    written.write_text(json.dumps(rules))
    other = TextEncoder(place)
    assert other.model.tokenizer.get_vocab() == own.model.tokenizer.get_vocab()
    assert other.config["tokenizer"] != own.config["tokenizer"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"max_tokens": 49}, "3 to 48"), ({"pooling": "max"}, "pooling='max'"), ({"dtype": "int8"}, "dtype='int8'")],
)
def test_a_wrong_setting_is_one_sentence(folder, settings, said):
    with pytest.raises(InputError, match=said):
        TextEncoder(folder, **settings)


def test_a_folder_without_an_embedder_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="holds no text embedder") as error:
        TextEncoder(tmp_path)
    assert "\n" not in str(error.value)


# ---- users as sums of item vectors -----------------------------------------------------------------------------------


def model_of(user, **settings):
    vectors = F.pad(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), (0, 0, 1, 0))
    return VectorModel(VectorModelConfig(num_items=6, embedding_dim=4, user=user, **settings), vectors).eval()


@pytest.mark.parametrize(("user", "weights"), [("mean", (1, 1, 1)), ("recency_weighted", (0.25, 0.5, 1)),
                                               ("last_item", (0, 0, 1))])  # fmt: skip
def test_users_are_the_named_sums(user, weights):
    model = model_of(user, half_life=1.0)
    unit = model.item_vectors()
    torch.testing.assert_close(unit[1:].norm(dim=1), torch.ones(6))
    expected = F.normalize(weights[0] * unit[2] + weights[1] * unit[5] + weights[2] * unit[3], dim=0)
    for history in ([[2, 5, 3]], [[0, 0, 2, 5, 3]], [[2, 5, 3, 0]]):
        torch.testing.assert_close(model.encode(torch.tensor(history))[0], expected)
    states_TD = model(torch.tensor([[4, 1, 0], [2, 5, 3]]))  # each position sees those before it
    torch.testing.assert_close(states_TD[-1], expected)
    torch.testing.assert_close(states_TD[0], unit[4])


def test_a_map_starts_as_cosines_trains_nothing_else_and_is_saved(tmp_path):
    plain, learned = model_of("mean"), model_of("mean", learned=True)
    history = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(learned.encode(history), learned.config.scale * plain.encode(history))
    assert [name for name, each in learned.named_parameters() if each.requires_grad] == ["map.weight"]
    learned.save_pretrained(tmp_path)
    torch.testing.assert_close(VectorModel.from_pretrained(tmp_path).encode(history), learned.encode(history))
    best = plain.recommend([1, 2, 3], 3)
    scores = plain.encode(history)[0] @ plain.item_vectors().T
    assert [item for item, _ in best] == [item for item in scores.argsort(descending=True).tolist() if item > 3]


def test_no_history_ties_all_items():
    assert not model_of("mean").encode(torch.tensor([[0, 0]])).any()


def test_an_unknown_user_is_refused():
    with pytest.raises(InputError, match="user='sum'"):
        VectorModelConfig(num_items=2, embedding_dim=2, user="sum")
