"""What a RecFormer's training starts from: a tokenizer, and a model with random or pretrained weights that fits it."""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textrec.data.choices import closest
from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import SpecialTokens, train_tokenizer
from textrec.models.pretrained import find_pretrained, load_recformer
from textrec.models.recformer import PRESETS, RecFormerConfig, RecFormerForPretraining
from textrec.schema import InputError

if TYPE_CHECKING:
    from pandas import DataFrame


def tokenizer_of(name: str, catalogues: Iterable["DataFrame"] = (), vocabulary_size: int = 1000) -> Any:
    """Return the fast tokenizer of a pretrained model (see `find_pretrained`).

    "train" makes one of at most `vocabulary_size` tokens from the item texts of `catalogues`.
    """
    if name == "train":
        import pandas

        frames = [item_attributes(catalogue) for catalogue in catalogues]
        return train_tokenizer(pandas.concat(frames).fillna(""), vocabulary_size)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(find_pretrained(name))


def saved_tokenizer(folder: Path) -> Any:
    """Return the tokenizer that notebook 02 left beside a model."""
    from tokenizers import Tokenizer

    if not (path := Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder} holds no pretrained model: expected the one that `textrec run 02` leaves there")
    return Tokenizer.from_file(str(path))


def start_of(backbone: str, encoder: Mapping[str, Any], tokenizer: Any) -> RecFormerForPretraining:
    """Return a model whose word table has a row for each token of `tokenizer`.

    With the backbone "random", `encoder` holds a `preset` of `PRESETS` and changes to its fields, and torch's generator
    draws the weights; any other is read by `load_recformer`, and `encoder` holds changes alone. Raises `InputError` for
    an unknown preset or field, and where the tokenizer is not the backbone's.
    """
    special, changes = SpecialTokens.of(tokenizer), dict(encoder)
    if backbone == "random":
        preset = changes.pop("preset", None)
        if preset not in PRESETS:
            raise InputError(f"encoder has the preset {preset!r}; a random backbone takes one of {', '.join(PRESETS)}")
        changes = {"vocabulary_size": special.num_tokens, "padding_id": special.padding} | changes
    known = [field.name for field in fields(RecFormerConfig)]
    if unknown := sorted(changes.keys() - set(known)):
        what = "; a preset is for the backbone 'random'" if unknown[0] == "preset" else closest(unknown[0], known)
        raise InputError(f"encoder sets {unknown[0]!r}, which is no field of RecFormerConfig{what}")
    if backbone == "random":
        model = RecFormerForPretraining(replace(PRESETS[preset], **changes))
    else:
        model = load_recformer(backbone, **changes)
    config = model.config
    if special.num_tokens > config.vocabulary_size or special.padding != config.padding_id:
        raise InputError(
            f"the tokenizer has {special.num_tokens} tokens and pads with {special.padding}, the backbone {backbone!r} "
            f"has {config.vocabulary_size} and {config.padding_id}: expected the backbone's own tokenizer"
        )
    return model
