"""Language models that others run, behind the interface of `language_backends.py`: llama.cpp, servers, and recordings.

`GgufModel` runs a GGUF file through llama.cpp, `EndpointModel` asks a server that speaks the OpenAI protocol (Ollama,
vLLM), `Recorded` has no weights and stands for a model whose answers are on disk.

L tokens · V vocabulary
"""

import http.client
import importlib
import inspect
import json
import os
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textrec.models.language_backends import (
    Decoding,
    LanguageModel,
    OnceEach,
    TransformersModel,
    Unsupported,
    files_digest,
)  # fmt: skip
from textrec.schema import InputError
from textrec.seeding import derive_seed


class GgufModel:
    """A GGUF file run by llama.cpp, quantised as it is; `gpu_layers` of it on a GPU (-1: all)."""

    def __init__(self, model: str | Path, *, max_tokens: int = 1024, context: int = 4096, gpu_layers: int = 0):
        try:
            self.library = importlib.import_module("llama_cpp")
        except ImportError as error:
            raise InputError("a GGUF file is run by llama.cpp: pip install 'textrec[llama]'") from error
        if not Path(model).is_file():
            raise InputError(f"no GGUF file at {model}")
        self.settings = {"model_path": str(model), "n_gpu_layers": gpu_layers, "verbose": False}
        self.identity = f"llama.cpp {files_digest(Path(model))}"
        self.max_tokens, self.context = max_tokens, context

    @cached_property
    def _embedder(self):
        size, last = self.max_tokens, self.library.LLAMA_POOLING_TYPE_LAST
        sizes = {"n_ctx": size, "n_batch": size, "n_ubatch": size}
        return self.library.Llama(embedding=True, pooling_type=last, **sizes, **self.settings)

    @cached_property
    def _writer(self):
        return self.library.Llama(n_ctx=self.context, logits_all=True, **self.settings)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._embedder.embed(text, normalize=False) for text in texts], np.float32)

    def generate(self, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        options = [self._tokens(text, add_bos=False) for text in decoding.choices]
        once = OnceEach(options, self._writer.token_eos()) if options else None
        answers = []
        for prompt in prompts:
            tokens, given = self._tokens(prompt), {}
            if once:
                given["logits_processor"] = self.library.LogitsProcessorList([masking(once, len(tokens))])
            seed = derive_seed(decoding.seed, decoding.replay, prompt) % 2**31
            told = self._writer.create_completion(
                tokens, max_tokens=once.length if once else decoding.max_new_tokens, seed=seed,
                temperature=decoding.temperature, top_p=1.0, top_k=0, min_p=0.0, repeat_penalty=1.0, **given,
            )  # fmt: skip
            answers.append(told["choices"][0]["text"])
        return answers

    def log_likelihood(self, prompts: Sequence[str], continuations: Sequence[str]) -> np.ndarray:
        found = []
        for prompt, text in zip(prompts, continuations, strict=True):
            before, after = self._tokens(prompt), self._tokens(text, add_bos=False)
            self._writer.reset()
            self._writer.eval(before + after)
            logits_LV = torch.from_numpy(self._writer.scores[len(before) - 1 : len(before) + len(after) - 1])
            found.append(logits_LV.log_softmax(1).gather(1, torch.tensor(after)[:, None]).sum().item())
        return np.array(found)

    def _tokens(self, text: str, add_bos: bool = True) -> list[int]:
        return list(self._writer.tokenize(text.encode(), add_bos=add_bos, special=True))


def masking(once: OnceEach, length: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Return a processor of llama.cpp's scores [V] that leaves only what may follow a prompt of `length` tokens."""

    def mask(tokens: np.ndarray, scores_V: np.ndarray) -> np.ndarray:
        masked_V, allowed = np.full_like(scores_V, -np.inf), once(list(tokens[length:]))
        masked_V[allowed] = scores_V[allowed]
        return masked_V

    return mask


class EndpointModel:
    """A model behind a server that speaks the OpenAI protocol; `url` ends where its paths begin, mostly in /v1.

    Which pooling its vectors have, which template it puts around a prompt, how it is quantised and where it cuts a text
    is the server's affair; `max_tokens` tells what it was set to. `key_variable` names the environment variable of a
    key, if one is asked for.
    """

    def __init__(
        self, url: str, model: str, *, timeout_s: float = 120.0, retries: int = 3, wait_s: float = 1.0,
        at_once: int = 8, key_variable: str = "", max_tokens: int = 1024,
    ):  # fmt: skip
        self.url, self.model, self.timeout_s, self.at_once = url.rstrip("/"), model, timeout_s, at_once
        self.retries, self.wait_s, self.key = retries, wait_s, os.environ.get(key_variable, "")
        self.identity, self.max_tokens = f"endpoint {self.url} {model}", max_tokens

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = self._ask("embeddings", {"input": list(texts)}, _vectors)
        if len(vectors) != len(texts):
            raise InputError(f"{self.url} gave {len(vectors)} vectors of {len(texts)} texts")
        return vectors

    def generate(self, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        if decoding.choices:
            raise Unsupported(f"{self.identity}: an endpoint cannot be kept to given choices; run the weights here")
        settings = {"max_tokens": decoding.max_new_tokens, "temperature": decoding.temperature}

        def answer(prompt: str) -> str:
            seed = derive_seed(decoding.seed, decoding.replay, prompt) % 2**31
            body = settings | {"prompt": prompt, "seed": seed}
            return self._ask("completions", body, lambda told: "" + told["choices"][0]["text"])

        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(answer, prompts))

    def log_likelihood(self, prompts: Sequence[str], continuations: Sequence[str]) -> np.ndarray:
        """Ask for the prompt's own log-probabilities (`echo`), which vLLM gives and Ollama does not."""

        def likelihood(prompt: str, text: str) -> float:
            body = {"prompt": prompt + text, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0.0}
            *spans, (end, _) = self._ask("completions", body, _spans) or [(0, 0.0)]
            moved = end - len(prompt + text)  # the written token begins where what was sent ends, behind a start token
            own = [value for at, value in spans if len(prompt) <= at - moved < len(prompt + text)]
            if not own:
                raise Unsupported(f"{self.identity}: this endpoint gives no log-probabilities of a prompt (echo)")
            return sum(own)

        with ThreadPoolExecutor(self.at_once) as pool:
            return np.array(list(pool.map(likelihood, prompts, continuations)))

    def _ask(self, path: str, body: dict, read: Callable[[Any], Any]) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        told = json.dumps({"model": self.model} | body).encode()
        for attempt in range(self.retries + 1):
            try:
                request = urllib.request.Request(f"{self.url}/{path}", told, headers)
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return read(json.loads(reply.read()))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                raise InputError(f"{self.url}/{path} gave no reply of the OpenAI protocol ({error!r})") from error
            except (OSError, http.client.HTTPException) as error:  # HTTP errors are OSErrors
                code = getattr(error, "code", 500)
                if attempt == self.retries or code < 500 and code != 429:
                    raise InputError(f"{self.url}/{path} failed {attempt + 1} times: {error}") from error
                time.sleep(self.wait_s * 2**attempt)


def _vectors(told: dict) -> np.ndarray:
    entries = sorted(told["data"], key=lambda entry: entry["index"])
    return np.array([entry["embedding"] for entry in entries], np.float32)


def _spans(told: dict) -> list[tuple[int, float]]:
    found = {**told["choices"][0]}.get("logprobs")
    return list(zip(found["text_offset"], found["token_logprobs"], strict=True)) if found else []


class Recorded:
    """A model that is not here; its answers and vectors are read from disk, under the identity that it had."""

    def __init__(self, identity: str, max_tokens: int = 1024):
        self.identity, self.max_tokens = identity, max_tokens

    def _refuse(self, *_):
        raise InputError(f"an answer of {self.identity!r} is not on disk, and the model is not here to be asked")

    embed = generate = log_likelihood = _refuse


KINDS = {"transformers": TransformersModel, "gguf": GgufModel, "endpoint": EndpointModel, "recorded": Recorded}


def open_model(kind: str, *, device: str = "cpu", **settings: Any) -> LanguageModel:
    """Return the language model of a kind of `KINDS`; `settings` are its class's own, `device` is where weights go."""
    if kind not in KINDS:
        raise InputError(f"the kind of language model is {kind!r}; expected one of {', '.join(KINDS)}")
    where = {"transformers": {"device": device}, "gguf": {"gpu_layers": -1 * device.startswith("cuda")}}.get(kind, {})
    try:
        inspect.signature(KINDS[kind]).bind(**where | settings)
    except TypeError as error:
        raise InputError(f"settings of the language model of kind {kind}: {error}") from error
    return KINDS[kind](**where | settings)
