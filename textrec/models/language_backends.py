"""Causal language models behind one interface, and the one that transformers runs; `language_servers.py` has others.

Vectors are the last real token's, answers follow a `Decoding`, log-likelihoods are in nats over a whole continuation.
The `identity` of a model names its kind, weights and precision; as a part of every cache key it keeps caches apart.

B rows of a batch · L padded length · D width · V vocabulary
"""

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from textrec.schema import InputError
from textrec.seeding import derive_seed

DIGESTED = (".safetensors", ".bin", ".gguf", "config.json", "tokenizer.json", "tokenizer.model")


@dataclass(frozen=True)
class Decoding:
    """All that decides an answer beside the model and the prompt."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: always the likeliest token
    seed: int = 0  # of the draws
    replay: int = 0  # asks again; draws anew
    choices: tuple[str, ...] = ()  # not empty: the answer is these texts, each once, in an order that the model chooses


class Unsupported(InputError):
    """A question that a model's way of running has no answer to, whatever its weights know."""


class LanguageModel(Protocol):
    """What every backend does. `embed` gives float32 [N, D], `log_likelihood` the nats of each continuation [N]."""

    identity: str
    max_tokens: int  # of an embedded text; what decides its vector beside the identity

    def embed(self, texts: Sequence[str]) -> np.ndarray: ...
    def generate(self, prompts: Sequence[str], decoding: Decoding) -> list[str]: ...
    def log_likelihood(self, prompts: Sequence[str], continuations: Sequence[str]) -> np.ndarray: ...


class OnceEach:
    """Which tokens may follow those already given, so that each option (token ids) comes once, in any order."""

    def __init__(self, options: Sequence[Sequence[int]], end: int):
        self.options, self.end = [list(option) for option in options], end
        self.length = sum(map(len, self.options)) + 1

    def __call__(self, given: Sequence[int]) -> list[int]:
        left, begun = list(self.options), []
        for token in given:
            begun.append(token)
            if begun in left:
                left.remove(begun)
                begun = []
        return sorted({o[len(begun)] for o in left if o[: len(begun)] == begun and len(o) > len(begun)}) or [self.end]


class TransformersModel:
    """Weights that transformers reads: a folder, a hub id or a GGUF file (whose weights it unpacks to `dtype`).

    `bits` 4 or 8 quantises them on a GPU by bitsandbytes. Texts for `embed` are cut to their first `max_tokens` tokens.
    `padding` (left | right) changes the layout of a batch and no vector: the last real token is looked up.
    """

    def __init__(
        self, model: str | Path, *, device: str = "cpu", dtype: str = "float32", bits: int | None = None,
        padding: str = "right", max_tokens: int = 1024, batch_size: int = 16,
    ):  # fmt: skip
        from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path, given = Path(model), {}
        if path.suffix == ".gguf":
            model, given = path.parent, {"gguf_file": path.name}
        if bits is not None:
            if bits not in (4, 8) or not importlib.util.find_spec("bitsandbytes") or not device.startswith("cuda"):
                raise InputError(f"bits={bits}: expected 4 or 8, a CUDA device and pip install bitsandbytes")
            quantised = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, **given)
            given |= {"quantization_config": quantised, "device_map": device} if bits else {}
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **given).eval()
        except (OSError, ValueError, ImportError) as error:
            told = f"no causal language model {str(path)!r}: expected a folder, a GGUF file or a hub id"
            raise InputError(f"{told} ({str(error).splitlines()[0]})") from error
        self.model = self.model if bits else self.model.to(device)
        weights = files_digest(path) if path.exists() else f"{path}@{self.model.config._commit_hash}"
        self.identity = f"transformers {weights} {dtype}" + (f" {bits} bit" if bits else "")
        self.padding, self.max_tokens, self.batch_size = padding, max_tokens, batch_size
        ends = self.model.generation_config.eos_token_id  # of a GGUF file, the tokenizer may not say
        known = (self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends]))
        self.end = next(token for token in known if token is not None)

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        vectors = {}
        rows = [self.tokenizer(text)["input_ids"][: self.max_tokens] for text in texts]
        for part, tokens_BL, inputs in self._batches(rows, self.padding):
            hidden_BLD = self.model.base_model(input_ids=tokens_BL, **inputs).last_hidden_state
            last_B = inputs["attention_mask"].cumsum(1).argmax(1)  # the first of the largest
            vectors |= zip(part, hidden_BLD[torch.arange(len(part)), last_B].float().cpu().numpy(), strict=True)
        return np.stack([vectors[row] for row in range(len(texts))])

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], decoding: Decoding) -> list[str]:
        from transformers import GenerationConfig

        answers: dict[int, str] = {}
        options = [self._continuation(text) for text in decoding.choices]
        once = OnceEach(options, self.end) if options else None
        config = GenerationConfig(
            max_new_tokens=once.length if once else decoding.max_new_tokens, do_sample=False,
            eos_token_id=self.model.generation_config.eos_token_id or self.end, pad_token_id=self.end,
        )  # fmt: skip
        for part, tokens_BL, inputs in self._batches([self.tokenizer(p)["input_ids"] for p in prompts], "left"):
            length, processors, inputs = tokens_BL.shape[1], [], {"attention_mask": inputs["attention_mask"]}
            if decoding.temperature:
                seeds = [derive_seed(decoding.seed, decoding.replay, prompts[row]) for row in part]
                processors = [drawing(decoding.temperature, seeds)]
            if once:
                inputs["prefix_allowed_tokens_fn"] = lambda _, given, length=length: once(given[length:].tolist())
            written_BL = self.model.generate(tokens_BL, config, logits_processor=processors, **inputs)[:, length:]
            answers |= zip(part, self.tokenizer.batch_decode(written_BL, skip_special_tokens=True), strict=True)
        return [answers[row] for row in range(len(prompts))]

    @torch.inference_mode()
    def log_likelihood(self, prompts: Sequence[str], continuations: Sequence[str]) -> np.ndarray:
        found, read = np.zeros(len(prompts)), {}
        ends = [self._continuation(text) for text in continuations]
        for row, (prompt, end) in enumerate(zip(prompts, ends, strict=True)):  # "... Yes" and "... No" are one reading
            read.setdefault((*self.tokenizer(prompt)["input_ids"], *end[:-1]), []).append(row)
        askers = list(read.values())
        for part, tokens_BL, inputs in self._batches([list(text) for text in read], "left"):
            kept = max(len(ends[row]) for place in part for row in askers[place])
            logits_BLV = self.model(input_ids=tokens_BL, logits_to_keep=kept, **inputs).logits.float().log_softmax(2)
            for place, logits_LV in zip(part, logits_BLV, strict=True):
                for row in askers[place]:
                    own_L = torch.tensor(ends[row], device=logits_LV.device)
                    found[row] = logits_LV[kept - len(own_L) :].gather(1, own_L[:, None]).sum().item()
        return found

    def _continuation(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _batches(self, rows: Sequence[list[int]], side: str):
        """Yield row numbers, padded tokens [B, L], and their mask and positions; long rows come first."""
        longest = self.model.config.max_position_embeddings
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        if not all(rows) or len(rows[order[0]]) > longest:
            raise InputError(
                f"a text has {max(map(len, rows))} tokens or none; expected 1 to {longest}, the model's own"
            )
        for start in range(0, len(rows), self.batch_size):
            part = order[start : start + self.batch_size]
            length = len(rows[part[0]])
            pads = [[self.end] * (length - len(rows[row])) for row in part]
            real = [[0] * len(pad) + [1] * (length - len(pad)) for pad in pads]
            if side == "left":
                tokens = [pad + rows[row] for pad, row in zip(pads, part, strict=True)]
            else:
                tokens, real = [rows[r] + p for p, r in zip(pads, part, strict=True)], [each[::-1] for each in real]
            tokens_BL, mask_BL = (torch.tensor(each, device=self.model.device) for each in (tokens, real))
            positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0) * mask_BL
            yield part, tokens_BL, {"attention_mask": mask_BL, "position_ids": positions_BL}


def drawing(temperature: float, seeds: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a processor of scores [B, V] after which the likeliest token is one drawn at this temperature.

    It adds Gumbel noise from a generator per row, so that what is drawn does not depend on the rest of a batch.
    """
    sources = [np.random.default_rng(seed) for seed in seeds]

    def draw(_: Tensor, scores_BV: Tensor) -> Tensor:
        noise_BV = np.stack([source.gumbel(size=scores_BV.shape[1]) for source in sources])
        return scores_BV / temperature + torch.from_numpy(noise_BV).to(scores_BV)

    return draw


def files_digest(path: Path) -> str:
    """Return a hash of a file, or of the weights, configuration and tokenizer in a folder."""
    files = sorted(each for each in path.iterdir() if each.name.endswith(DIGESTED)) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for each in files:
        with each.open("rb") as file:
            digest.update(each.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
