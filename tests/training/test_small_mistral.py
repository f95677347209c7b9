"""The small model is reproducible, learns its texts, and is the same in its two files."""

import numpy as np
import pytest
import torch
from models.small_language_model import TITLES, tiny

from textrec.training import small_mistral
from textrec.training.small_mistral import GGUF_FILE, rehearsed_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("mistral"))


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(2, 40)[None]).logits


def test_the_same_seed_makes_the_same_files_and_another_does_not(folder, tmp_path):
    same, other = tiny(tmp_path / "same"), tiny(tmp_path / "other", seed=1)
    for name in ("model.safetensors", "tokenizer.json", GGUF_FILE):
        assert (folder / name).read_bytes() == (same / name).read_bytes()
    assert (folder / GGUF_FILE).read_bytes() != (other / GGUF_FILE).read_bytes()


def test_what_is_there_is_left_alone_until_its_inputs_change(tmp_path, monkeypatch):
    made = tiny(tmp_path, steps=1)
    before = (made / GGUF_FILE).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(small_mistral, "_tokenizer", lambda *given: 1 / 0)
        tiny(tmp_path, steps=1)
        with pytest.raises(ZeroDivisionError):
            tiny(tmp_path, steps=2)
    assert (tiny(tmp_path, steps=2) / GGUF_FILE).read_bytes() != before


def test_training_lowers_the_loss_on_its_texts(folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt, losses = rehearsed_prompts(TITLES, 1, 4, 0)[0], []
    tokens = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    for each in (folder, tiny(tmp_path, steps=30)):
        with torch.inference_mode():
            losses.append(AutoModelForCausalLM.from_pretrained(each)(tokens, labels=tokens).loss.item())
    assert losses[1] < 0.7 * losses[0]


def test_the_gguf_file_is_the_same_model_and_the_same_tokenizer(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE)
    torch.testing.assert_close(logits(read), logits(own), rtol=0, atol=1e-6)
    tokenizer, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, gguf_file=GGUF_FILE)
    for text in (*TITLES, "Order the numbers 1 to 12: 3, 1, 2.", "ünïcode  spaces\nlines"):
        assert tokenizer(text)["input_ids"] == other(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_header_and_tensors_of_the_gguf_file(folder):
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    reader, weights = GGUFReader(folder / GGUF_FILE), load_file(folder / "model.safetensors")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.architecture"] == "llama" and told["llama.attention.head_count_kv"] == 2
    assert told["tokenizer.ggml.tokens"][told["tokenizer.ggml.bos_token_id"]] == "<s>"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == len(weights)
    np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], weights["model.layers.1.self_attn.v_proj.weight"])
    query = weights["model.layers.0.self_attn.q_proj.weight"]  # 4 heads of 16: row 1 of the file is row 8 of ours
    np.testing.assert_array_equal(tensors["blk.0.attn_q.weight"][:3], query[[0, 8, 1]])
    assert not np.array_equal(tensors["blk.0.attn_q.weight"], query)


def test_a_file_without_the_interleaving_is_noticed(folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(small_mistral, "_interleaved", lambda weight, heads: weight)
    wrong = tiny(tmp_path)
    pair = [AutoModelForCausalLM.from_pretrained(wrong, **given) for given in ({}, {"gguf_file": GGUF_FILE})]
    assert (logits(pair[0]) - logits(pair[1])).abs().max() > 1e-4


def test_rehearsed_prompts_end_in_orders_and_are_seeded():
    prompts = rehearsed_prompts(TITLES, 5, 4, 0)
    assert all(sorted(prompt.rpartition("Answer: ")[2].split(", ")) == list("1234") for prompt in prompts)
    assert prompts == rehearsed_prompts(TITLES, 5, 4, 0) != rehearsed_prompts(TITLES, 5, 4, 1)
