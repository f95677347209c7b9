"""Last tokens under either padding, likelihoods by hand, batches that change nothing, draws, constrained answers."""

import numpy as np
import pytest
import torch
from models.small_language_model import TITLES, tiny

from textrec.models.language_backends import Decoding, OnceEach, TransformersModel, drawing
from textrec.models.listwise_prompt import choices, parse
from textrec.schema import InputError

TEXTS = ["glue", "a much longer text about a paint brush, and paper", "", "pen and card"]  # "" is its start token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def model(folder):
    return TransformersModel(folder, batch_size=3)


def last_states(model, texts):
    """One text at a time, so without any padding."""
    with torch.inference_mode():
        rows = [model.tokenizer(text, return_tensors="pt")["input_ids"] for text in texts]
        return np.stack([model.model.base_model(row).last_hidden_state[0, -1].numpy() for row in rows])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_vector_is_that_of_the_last_real_token_whichever_side_is_padded(model, folder, side):
    other = TransformersModel(folder, padding=side, batch_size=4)
    expected = last_states(model, TEXTS)
    np.testing.assert_allclose(other.embed(TEXTS), expected, atol=1e-5)
    padded = other.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.inference_mode():  # the published habit: the last position, whatever stands there
        naive = other.model.base_model(**padded).last_hidden_state[:, -1].numpy()
    assert np.abs(naive - expected).max() > 1e-2


def test_a_long_text_is_cut_to_its_beginning(folder, model):
    short = TransformersModel(folder, max_tokens=5)
    kept = model.tokenizer.decode(model.tokenizer(TEXTS[1])["input_ids"][1:5])
    np.testing.assert_allclose(short.embed([TEXTS[1]]), last_states(model, [kept]), atol=1e-5)


def test_log_likelihoods_are_sums_over_the_continuation(model):
    prompts, ends = ["red", "a paint brush and", "red", "red"], [" glue and paper", " Yes", " No", " Yes"]
    told = model.log_likelihood(prompts, ends)
    for prompt, end, found in zip(prompts, ends, told, strict=True):
        before = model.tokenizer(prompt)["input_ids"]
        after = model.tokenizer(end, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model.model(torch.tensor([before + after])).logits[0].log_softmax(1)
        by_hand = sum(logits[len(before) - 1 + place, token].item() for place, token in enumerate(after))
        assert found == pytest.approx(by_hand, abs=1e-4)


def test_a_prompt_is_read_once_for_all_answers_of_one_token(model, monkeypatch):
    ends = [model.tokenizer.decode([token]) for token in model.tokenizer("a", add_special_tokens=False)["input_ids"]]
    ends = [ends[0], model.tokenizer.decode(model.tokenizer("b", add_special_tokens=False)["input_ids"][:1])]
    assert len(set(ends)) == 2 and all(len(model._continuation(end)) == 1 for end in ends)
    alone = [model.log_likelihood(["red glue"], [end]).item() for end in ends]
    rows, honest = [], model._batches
    monkeypatch.setattr(model, "_batches", lambda texts, side: rows.extend(texts) or honest(texts, side))
    assert model.log_likelihood(["red glue"] * 2, ends).tolist() == pytest.approx(alone, abs=1e-5)
    assert len(rows) == 1 and alone[0] != pytest.approx(alone[1], abs=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_does_not_depend_on_its_batch(folder, model, temperature):
    prompts, decoding = [f"{title} and" for title in TITLES[:5]], Decoding(8, temperature)
    together = model.generate(prompts, decoding)
    assert together == TransformersModel(folder, batch_size=1).generate(prompts, decoding)
    assert together[::-1] == model.generate(prompts[::-1], decoding)


def test_replays_and_seeds_draw_anew_and_the_likeliest_token_does_not(model):
    prompts = TITLES[:4]
    drawn = [model.generate(prompts, Decoding(8, 1.0, seed, replay)) for seed, replay in ((0, 0), (0, 1), (1, 0))]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[2]
    assert model.generate(prompts, Decoding(8)) == model.generate(prompts, Decoding(8, replay=1))


def test_draws_follow_the_softmax():
    scores = torch.tensor([[2.0, 1.0, 0.0]]).repeat(20_000, 1)
    drawn = drawing(0.5, range(20_000))(None, scores).argmax(1)
    expected = (scores[0] / 0.5).softmax(0).numpy()
    np.testing.assert_allclose(np.bincount(drawn, minlength=3) / 20_000, expected, atol=0.01)


def test_a_constrained_answer_is_an_order_of_all_numbers_where_a_free_one_is_not(model):
    prompts, num = ["Order the numbers:", "red glue", "a"], 12
    free = model.generate(prompts, Decoding(40, 1.0))
    kept = model.generate(prompts, Decoding(1, 1.0, choices=choices(num)))
    assert [parse(answer, num).kind for answer in kept] == ["strict"] * 3 and len(set(kept)) > 1
    assert "strict" not in [parse(answer, num).kind for answer in free]


def test_what_may_follow_by_hand():
    once = OnceEach([[1, 9], [1, 2, 9], [3]], end=0)
    assert [once(given) for given in ([], [1], [1, 9], [1, 9, 1], [3], [3, 1, 9, 1, 2, 9], [3, 1, 9, 1, 2, 9, 0])] == [
        [1, 3], [2, 9], [1, 3], [2], [1], [0], [0]]  # fmt: skip


def test_a_gguf_file_answers_as_the_folder_it_was_made_from(folder, model):
    other = TransformersModel(folder / "model.gguf")
    prompts, decoding = TITLES[:3], Decoding(8)
    np.testing.assert_allclose(other.embed(TEXTS), model.embed(TEXTS), atol=1e-5)
    assert other.generate(prompts, decoding) == model.generate(prompts, decoding)
    kept = Decoding(choices=choices(5))
    assert other.generate(prompts, kept) == model.generate(prompts, kept)


def test_the_identity_names_weights_and_precision_and_not_the_layout(folder, model, tmp_path):
    others = [TransformersModel(folder, dtype="float64"), TransformersModel(tiny(tmp_path, seed=1)),
              TransformersModel(folder / "model.gguf")]  # fmt: skip
    assert len({model.identity, *(each.identity for each in others)}) == 4
    assert TransformersModel(folder, padding="left", batch_size=1).identity == model.identity


def test_half_precision_embeds_in_single_and_nearly_the_same(folder, model):
    half, single = TransformersModel(folder, dtype="bfloat16", batch_size=4).embed(TEXTS), model.embed(TEXTS)
    assert half.dtype == np.float32 and half.shape == single.shape and (half != single).any()
    lengths = np.linalg.norm(half, axis=1) * np.linalg.norm(single, axis=1)
    assert ((half * single).sum(1) / lengths).min() > 0.999


def test_mistakes_are_named(model, tmp_path):
    with pytest.raises(InputError, match="no causal language model '.*nowhere'"):
        TransformersModel(tmp_path / "nowhere")
    with pytest.raises(InputError, match="bits=4: expected 4 or 8, a CUDA device"):
        TransformersModel(tmp_path, bits=4)
    with pytest.raises(InputError, match="tokens or none; expected 1 to 4096"):
        model.generate(["glue " * 5000], Decoding())
