"""A server on this machine, llama.cpp where it is installed (else a stand-in of its calls), and a recording."""

import sys
import types

import numpy as np
import pytest
import torch
from models.local_server import local_server
from models.small_language_model import TITLES, tiny

from textrec.models.language_backends import Decoding, TransformersModel
from textrec.models.language_servers import EndpointModel, GgufModel, Recorded, open_model
from textrec.models.listwise_prompt import choices, parse
from textrec.schema import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="module")
def weights(folder):
    return TransformersModel(folder)


@pytest.fixture
def server():
    with local_server() as found:
        yield found


def ask(server, **more):
    return EndpointModel(server.url, "mistral", wait_s=0.01, timeout_s=5, **more)


def test_an_endpoint_embeds_generates_and_scores(server, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    server.replies = [(200, {"data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]})]
    assert ask(server, key_variable="SOME_KEY").embed(["a", "b"]).tolist() == [[1, 2], [3, 4]]
    path, body, headers = server.requests.pop()
    assert (path, body) == ("/v1/embeddings", {"model": "mistral", "input": ["a", "b"]})
    assert headers["Authorization"] == "Bearer secret"
    server.replies = [(200, lambda body: {"choices": [{"text": body["prompt"].upper()}]})]
    assert ask(server).generate(["a", "b", "c"], Decoding(7, 0.5)) == ["A", "B", "C"]
    _, body, headers = server.requests[0]
    assert (body["max_tokens"], body["temperature"]) == (7, 0.5) and "Authorization" not in headers
    assert len({request["seed"] for _, request, _ in server.requests}) == 3
    offsets = {"text_offset": [0, 3, 5, 9], "token_logprobs": [None, -1.0, -2.5, -99.0]}  # the last one is generated
    server.replies = [(200, {"choices": [{"logprobs": offsets}]})]
    assert ask(server).log_likelihood(["red"], [" paint"]).tolist() == [-3.5]
    offsets["text_offset"] = [0, 3, 6, 12]  # <s>, which vLLM counts in, red, paint
    assert ask(server).log_likelihood(["red"], [" paint"]).tolist() == [-2.5]


def test_a_server_that_stumbles_is_asked_again_and_one_that_refuses_is_not(server):
    fine = (200, {"choices": [{"text": "1"}]})
    server.replies = [(503, b"busy"), (429, b"slow down"), fine]
    assert ask(server).generate(["a"], Decoding()) == ["1"] and len(server.requests) == 3
    server.requests.clear()
    server.replies = [(404, b"no such model"), fine]
    with pytest.raises(InputError, match=r"/v1/completions failed 1 times: HTTP Error 404"):
        ask(server).generate(["a"], Decoding())
    server.replies = [(500, b"broken")]
    with pytest.raises(InputError, match="failed 3 times: HTTP Error 500"):
        ask(server, retries=2).generate(["a"], Decoding())


@pytest.mark.parametrize(
    "reply", [b"<html>", {"choices": []}, {"error": "x"}, [], {"choices": [None]},
              {"choices": [{"text": None, "logprobs": {"tokens": []}}], "data": [{"index": 0}]}]
)  # fmt: skip
def test_a_malformed_reply_is_an_input_error(server, reply):
    server.replies, model = [(200, reply)], ask(server)
    for call in (lambda: model.generate(["a"], Decoding()), lambda: model.embed(["a"]),
                 lambda: model.log_likelihood(["a"], ["b"])):  # fmt: skip
        with pytest.raises(InputError, match="gave no reply of the OpenAI protocol"):
            call()
    assert len(server.requests) == 3


def test_a_server_that_is_not_there_or_gives_too_few_vectors_or_may_not_be_constrained(server):
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1/v1/embeddings failed 2 times"):
        EndpointModel("http://127.0.0.1:1/v1", "m", retries=1, wait_s=0.01).embed(["a"])
    server.replies = [(200, {"data": []})]
    with pytest.raises(InputError, match="0 vectors of 1 texts"):
        ask(server).embed(["a"])
    with pytest.raises(InputError, match="cannot be kept to given choices"):
        ask(server).generate(["a"], Decoding(choices=choices(3)))


def stand_in(weights) -> types.ModuleType:
    """Return a module with the calls of llama-cpp-python that we use, answered by the same weights in transformers."""

    class Llama:
        def __init__(self, *, model_path, n_ctx, n_gpu_layers, verbose, embedding=False, logits_all=False, **more):
            assert embedding == ("pooling_type" in more) and embedding != logits_all

        def tokenize(self, text, add_bos=True, special=False):
            return weights.tokenizer(text.decode(), add_special_tokens=add_bos)["input_ids"]

        def token_eos(self):
            return weights.tokenizer.eos_token_id

        def embed(self, text, normalize=True):
            assert not normalize
            return weights.embed([text])[0].tolist()

        def reset(self):
            self.scores = None

        def eval(self, tokens):
            with torch.inference_mode():
                self.scores = weights.model(torch.tensor([tokens])).logits[0].numpy()

        def create_completion(self, tokens, *, max_tokens, temperature, seed, logits_processor=(), **more):
            assert temperature == 0 and 0 <= seed < 2**31
            written = list(tokens)
            for _ in range(max_tokens):
                self.eval(written)
                scores = self.scores[-1]
                for processor in logits_processor:
                    scores = processor(np.array(written), scores)
                if scores.argmax() == self.token_eos():
                    break
                written.append(int(scores.argmax()))
            return {"choices": [{"text": weights.tokenizer.decode(written[len(tokens) :])}]}

    module = types.ModuleType("llama_cpp")
    module.Llama, module.LogitsProcessorList, module.LLAMA_POOLING_TYPE_LAST = Llama, list, 3
    return module


def agrees(gguf, weights, atol):
    prompts, texts = ["red glue and", "a pen"], [*TITLES, "a longer text, about paper"]
    np.testing.assert_allclose(gguf.embed(texts), weights.embed(texts), atol=atol)
    ends = [" paint", " No"]
    np.testing.assert_allclose(gguf.log_likelihood(prompts, ends), weights.log_likelihood(prompts, ends), atol=atol)
    assert gguf.generate(prompts, Decoding(6)) == weights.generate(prompts, Decoding(6))
    kept = gguf.generate(prompts, Decoding(choices=choices(11)))
    assert [parse(answer, 11).kind for answer in kept] == ["strict"] * 2
    assert kept == weights.generate(prompts, Decoding(choices=choices(11)))


def test_our_calls_of_llama_cpp_mean_what_the_weights_mean(folder, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in(weights))
    agrees(GgufModel(folder / "model.gguf"), weights, 1e-5)


def test_llama_cpp_itself_agrees_with_the_weights(folder, weights):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'textrec[llama]'")
    agrees(GgufModel(folder / "model.gguf"), weights, 1e-2)


def test_no_two_kinds_share_an_identity(folder, weights, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in(weights))
    path = folder / "model.gguf"
    told = [weights.identity, TransformersModel(path).identity, GgufModel(path).identity,
            EndpointModel("http://a/v1", "m").identity, EndpointModel("http://a/v1", "n").identity,
            EndpointModel("http://b/v1", "m").identity]  # fmt: skip
    assert len(set(told)) == len(told)


def test_a_missing_library_file_kind_or_setting_is_one_sentence(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"run by llama\.cpp: pip install 'textrec\[llama\]'"):
        GgufModel(folder / "model.gguf")
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in(None))
    with pytest.raises(InputError, match="no GGUF file at"):
        GgufModel(folder / "none.gguf")
    with pytest.raises(InputError, match="kind of language model is 'lama'; expected one of transformers, gguf"):
        open_model("lama")
    with pytest.raises(InputError, match="kind endpoint: missing a required argument: 'model'"):
        open_model("endpoint", url="http://a/v1")


def test_a_recording_answers_nothing_by_itself():
    model = open_model("recorded", identity="transformers 0123 float16")
    assert isinstance(model, Recorded) and model.identity == "transformers 0123 float16"
    for call in (lambda: model.embed(["a"]), lambda: model.generate(["a"], Decoding())):
        with pytest.raises(InputError, match="'transformers 0123 float16' is not on disk, and the model is not here"):
            call()
