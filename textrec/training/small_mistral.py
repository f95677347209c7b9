"""A small language model of Mistral's architecture, made on the spot from item texts: it tests plumbing, offline.

It has seen a few hundred texts, so whatever it says about recommending is chance. It is saved as transformers saves a
model and as the GGUF file that llama.cpp reads: there Mistral is a "llama" whose query and key rows are interleaved.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from textrec.data.files import replacing, write_text
from textrec.data.tokenizing import train_tokenizer
from textrec.models.listwise_prompt import listwise_prompt
from textrec.provenance import code_hash
from textrec.seeding import derive_seed, generator, seed_everything

if TYPE_CHECKING:
    from pandas import DataFrame

GGUF_FILE = "model.gguf"
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}  # fmt: skip


def rehearsed_prompts(texts: Sequence[str], number: int, num_candidates: int, seed: int) -> list[str]:
    """Return listwise prompts about random items with random answers: the form of an answer without its content."""
    source, prompts = generator(seed, "rehearsed prompts"), []
    for _ in range(number):
        shown = [texts[row] for row in source.integers(0, len(texts), num_candidates + 3)]
        answer = ", ".join(map(str, source.permutation(num_candidates) + 1))
        prompts.append(f"{listwise_prompt(shown[num_candidates:], shown[:num_candidates])} {answer}")
    return prompts


def small_mistral(
    attributes: "DataFrame", texts: Sequence[str], folder: Path, *, seed: int, steps: int = 60, num_tokens: int = 500,
    length: int = 384, batch_size: int = 4,
) -> Path:  # fmt: skip
    """Train a tokenizer on `attributes` and a model on `texts`; return the folder of both, with `model.gguf` in it.

    A step reads `batch_size` stretches of `length` tokens. What is there already, of the same inputs, is left alone.
    """
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    told = [attributes.to_dict("records"), list(texts), seed, steps, num_tokens, length, batch_size]
    key = hashlib.sha256(json.dumps([told, SIZES, code_hash([Path(__file__)])]).encode()).hexdigest()
    if (folder / "made_from").is_file() and (folder / "made_from").read_text(encoding="utf-8") == key:
        return folder
    seed_everything(derive_seed(seed, "small mistral"))
    tokenizer = _tokenizer(attributes, num_tokens)
    config = MistralConfig(
        vocab_size=len(tokenizer), max_position_embeddings=4096, sliding_window=None, bos_token_id=0, eos_token_id=2,
        pad_token_id=1, **SIZES,
    )  # fmt: skip
    model = MistralForCausalLM(config).train()
    ends = tokenizer([*texts])["input_ids"]
    stream_T = torch.tensor([token for ids in ends for token in (*ids, config.eos_token_id)])
    length = min(length, len(stream_T) - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts_B = torch.randint(len(stream_T) - length, (batch_size,)).tolist()
        tokens_BL = torch.stack([stream_T[start : start + length] for start in starts_B])
        optimizer.zero_grad()
        model(input_ids=tokens_BL, labels=tokens_BL).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_gguf(model, tokenizer, folder / GGUF_FILE)
    write_text(folder / "made_from", key)
    return folder


def _tokenizer(attributes: "DataFrame", num_tokens: int):
    from tokenizers import decoders, processors
    from transformers import PreTrainedTokenizerFast

    backend = train_tokenizer(attributes, num_tokens)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def write_gguf(model, tokenizer, path: Path) -> None:
    """Write a `MistralForCausalLM` and its byte-level tokenizer as GGUF, float32."""
    import gguf

    config, backend = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    heads, kv_heads, blocks = (getattr(config, f"num_{name}") for name in (
        "attention_heads", "key_value_heads", "hidden_layers"))  # fmt: skip
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, blocks)
    known = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    special = set(tokenizer.get_added_vocab())
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        writer.add_name("small-mistral")
        writer.add_vocab_size(config.vocab_size)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_block_count(blocks)
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        writer.add_rope_dimension_count(config.hidden_size // heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([token for token, _ in known])
        writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t, _ in known])
        writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
        writer.add_bos_token_id(config.bos_token_id)
        writer.add_eos_token_id(config.eos_token_id)
        writer.add_pad_token_id(config.pad_token_id)
        writer.add_add_bos_token(True)
        for name, weight in model.state_dict().items():
            values = weight.detach().float().numpy()
            if ".q_proj." in name or ".k_proj." in name:
                values = _interleaved(values, heads if ".q_proj." in name else kv_heads)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows of a head's two rotary halves in turns, as llama.cpp rotates neighbours."""
    halves = weight.reshape(heads, 2, len(weight) // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
