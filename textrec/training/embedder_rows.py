"""Rows of text embedders: histories as one text or as their items' vectors, unseen, whitened, or with a learned map.

A row is laid out as by `rows.py`. Texts are encoded once for an encoder and a side (see `text_vectors`); what that cost
is kept beside the vectors, so that a row whose texts another one encoded costs the same: a row's `tokens` are those of
the texts that it reads, `cpu_s` holds the seconds of encoding them.

U users with a test target · I items + 1, row 0 padding · D width
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textrec.data.choices import closest
from textrec.data.files import write_text
from textrec.data.item_text import item_attributes, item_texts
from textrec.data.prepared import PreparedSet
from textrec.data.vectors import text_vectors
from textrec.evaluation.ranking import Ranks, VectorScorer, rank_targets
from textrec.models.item_table import transformed
from textrec.models.text_encoder import TextEncoder, VectorModel, VectorModelConfig
from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.seeding import derive_seed, seed_everything
from textrec.training.module import TrainingConfig
from textrec.training.rows import RowResult, cached_row, code_files, configurations
from textrec.training.text_ranking import weights_digest

SEPARATOR = "; "  # between the items of a history
PUBLISHED_PIECES = 32  # of an attribute, its key included
_CODE = code_files("text_encoder") + [
    ROOT / "textrec" / name for name in ("data/item_text.py", "models/item_table.py", "training/embedder_rows.py")
]


@dataclass(frozen=True)
class EmbedderRow:
    """What a row is, and the one thing in which it differs from `zero_shot_concatenated` or `zero_shot_recency`."""

    changed: str
    user: str = "recency_weighted"  # concatenated | one of `VectorModelConfig.user`
    side: str = "document"  # of histories: read as items are, or as queries, behind the prompt
    transforms: tuple[str, ...] = ()  # of `transformed`, in order
    learned: bool = False
    published: bool = False


_USERS = {"concatenated": "concatenated", "mean": "mean", "recency": "recency_weighted", "last_item": "last_item"}
EMBEDDER_ROWS = {
    "zero_shot_concatenated": EmbedderRow("reference of the untrained rows: the history as one text", "concatenated"),
    "zero_shot_mean": EmbedderRow("user: mean of item vectors", "mean"),
    "zero_shot_recency": EmbedderRow("user: item vectors weighted by recency"),
    "zero_shot_last_item": EmbedderRow("user: vector of the last item", "last_item"),
    **{f"zero_shot_{name}_prompted": EmbedderRow(f"{name}, read behind the query prompt", user, "query")
       for name, user in _USERS.items()},
    "zero_shot_permuted": EmbedderRow("control: vectors exchanged between items", transforms=("permuted",)),
    "whitened": EmbedderRow("item vectors whitened", transforms=("whitened",)),
    "linear_probe": EmbedderRow("a linear map of the user vector, trained", learned=True),
    "linear_probe_whitened": EmbedderRow("the map, above whitened vectors", transforms=("whitened",), learned=True),
    "published": EmbedderRow(
        "the published code: items by pooler, histories by mean, pieces read twice", "concatenated", published=True
    ),
}  # fmt: skip


class Encoded(NamedTuple):
    """Vectors of texts, the real tokens of the distinct ones, and the processor seconds that reading those takes."""

    vectors: Tensor  # (N, D)
    tokens: int
    cpu_s: float
    here_s: float  # the part of them that was spent now


def encoded(encoder: TextEncoder, texts: Sequence[str], side: str, *, folder: Path, progress: Any = None) -> Encoded:
    """Return the vectors of `texts` as one side of `encoder` reads them; `folder` keeps them and never reads twice."""
    pooling, prompt = encoder.sides[side]
    key = {"encoder": _identity(encoder), "pooling": f"{pooling}, unit norm", "prompt": prompt}
    key["max_tokens"] = encoder.max_tokens
    place = Path(folder) / f"cost-{derive_seed(*key.values()):016x}.json"
    spent = json.loads(place.read_text()) if place.is_file() else {"tokens": 0, "cpu_s": 0.0}
    before_s = spent["cpu_s"]

    def encode(tokens_B: list[np.ndarray]) -> np.ndarray:
        started = time.process_time()
        vectors_BD = encoder.encode(tokens_B, side)
        spent["cpu_s"] += time.process_time() - started
        spent["tokens"] += sum(map(len, tokens_B))
        return vectors_BD

    vectors = text_vectors(
        texts, encode, folder=folder, tokenize=partial(encoder.tokenize, side=side), progress=progress, **key
    )
    write_text(place, json.dumps(spent))
    tokens = sum(map(len, encoder.tokenize(list({*texts}), side)))
    here_s, rate = spent["cpu_s"] - before_s, spent["cpu_s"] / max(spent["tokens"], 1)
    return Encoded(torch.from_numpy(np.asarray(vectors)), tokens, max(tokens * rate, here_s), here_s)


def _identity(encoder: TextEncoder) -> str:
    encoder.identity = encoder.identity or weights_digest(encoder)  # seconds for a large one
    return encoder.identity


def history_texts(
    prepared: PreparedSet, texts: Sequence[str], *, which: str = "test", max_items: int = 50,
    encoder: TextEncoder | None = None, side: str = "document", separator: str = SEPARATOR,
) -> list[str]:  # fmt: skip
    """Return the history of each user with a target as one text, newest item first; `texts[k]` is that of item k + 1.

    With `encoder`, items that it would not read whole are left out, but for the newest one.
    """
    users_U, ends_U = prepared.split.targets(which)
    items_E = prepared.histories.items_E
    lasts_U = prepared.histories.offsets_U1[users_U] + ends_U
    firsts_U = lasts_U - np.minimum(ends_U, max_items)
    if encoder is not None:
        around = len(encoder.tokenize([""], side)[0])  # special tokens and the prompt
        pieces = encoder.tokenize([separator + text for text in texts], side)
        lengths_I = np.array([0, *(len(each) - around for each in pieces)])
        before_E1 = np.concatenate([[0], np.cumsum(lengths_I[items_E])])
        room = encoder.max_tokens - around
        whole_U = np.searchsorted(before_E1, before_E1[lasts_U] - room)
        firsts_U = np.maximum(firsts_U, np.minimum(whole_U, lasts_U - 1))
    return [separator.join(texts[item - 1] for item in items_E[first:last][::-1].tolist())
            for first, last in zip(firsts_U, lasts_U, strict=True)]  # fmt: skip


def respelled(attributes, tokenizer) -> list[str]:
    """Return item texts as the published code makes them: keys glued to values, word pieces, to be read as words."""
    written = [""] * len(attributes)
    for name in attributes.columns:
        pieces = (tokenizer.tokenize(f"{name}{value}")[:PUBLISHED_PIECES] for value in attributes[name])
        written = [f"{text} {' '.join(each)}".strip() for text, each in zip(written, pieces, strict=True)]
    return written


def run_embedder_rows(
    rows: Sequence[str], prepared: PreparedSet, encoder: TextEncoder, *, seed: int, run_dir: Path, store: Path,
    device: str = "cpu", overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skipped: Mapping[str, str] | None = None, progress: bool = False, name: str = "",
) -> list[RowResult]:  # fmt: skip
    """Run the named rows of `EMBEDDER_ROWS`; finished ones are read back, a broken one is a result with its reason.

    `store` is the folder of vectors. `overrides` maps a row, or "all", to settings of `VectorModelConfig` or of the
    training of a learned row; `skipped` maps a row that is not run to the reason. `name` marks the rows of a further
    embedder: `<row>@<name>`. Raises `InputError` for an unknown row or setting.
    """
    overrides, skipped, results = overrides or {}, skipped or {}, []
    for row in (*rows, *(set(overrides) - {"all"}), *skipped):
        if row not in EMBEDDER_ROWS or row not in rows:
            hint = closest(row, EMBEDDER_ROWS)
            raise InputError(f"row {row!r} is unknown{hint}; expected one of {sorted(EMBEDDER_ROWS)}")
    width, digest = encoder.model.get_embedding_dimension(), _identity(encoder)
    for row in rows:
        preset, (config, training) = EMBEDDER_ROWS[row], plan(row, prepared.num_items, width, overrides)
        told = {"encoder": digest, "sides": encoder.sides, "max_tokens": encoder.max_tokens} | asdict(preset)
        parameters = json.loads(json.dumps(told | asdict(config) | (asdict(training) if preset.learned else {})))
        label, why = f"{row}@{name}" if name else row, skipped.get(row)
        if preset.side == "query" and not encoder.sides["query"][1]:
            why = why or "the embedder names no prompt for queries, and none was given"
        if why:
            results.append(RowResult(label, preset.changed, parameters, "not_attempted", why))
            continue
        folder = Path(run_dir) / "rows" / label
        key = {"fingerprint": prepared.fingerprint, "seed": seed}
        run = partial(_ranked, preset, config, training, prepared, encoder, seed, folder, store, device, progress)
        results.append(cached_row(label, preset.changed, parameters, key, folder, _CODE, run))
    return results


def plan(row: str, num_items: int, width: int, overrides: Mapping) -> tuple[VectorModelConfig, TrainingConfig]:
    """Return the complete configurations of a row's model and of the training of its map, if it learns one."""
    preset = EMBEDDER_ROWS[row]
    user = "mean" if preset.user == "concatenated" else preset.user  # which reads no vectors of items
    fixed = {"num_items": num_items, "embedding_dim": width, "learned": preset.learned, "user": user}
    return configurations(row, VectorModelConfig, fixed, {}, overrides)


def _ranked(preset: EmbedderRow, config, training, prepared, encoder, seed, folder, store, device, progress):
    """Return the test ranks, the curve, and tokens read and seconds spent elsewhere or earlier."""
    attributes, items_side = item_attributes(prepared.catalogue), "document"
    texts, how = list(item_texts(attributes)), {"encoder": encoder, "side": preset.side}
    if preset.published:
        items_side, texts, how = "published_item", respelled(attributes, encoder.model.tokenizer), {"separator": " "}
    items = encoded(encoder, texts, items_side, folder=store)
    read, table_ID = [items], F.pad(items.vectors, (0, 0, 1, 0))
    if preset.user == "concatenated":
        side = "published_history" if preset.published else preset.side
        read.append(encoded(encoder, history_texts(prepared, texts, **how), side, folder=store))
        found = _vector_ranks(read[1].vectors, table_ID, prepared), [], 0.0
    else:
        if preset.side == "query":
            read.append(encoded(encoder, texts, "query", folder=store))
        seed_everything(seed)
        table_ID = transformed(table_ID, preset.transforms, seed=derive_seed(seed, *preset.transforms))
        model = VectorModel(config, F.pad(read[1].vectors, (0, 0, 1, 0)) if len(read) > 1 else table_ID)
        found = _model_ranks(model, table_ID, training, prepared, seed, folder, device, progress)
    ranks, curve, earlier_s = found
    return ranks, curve, (sum(each.tokens for each in read), earlier_s + sum(each.cpu_s - each.here_s for each in read))


def _vector_ranks(users_UD: Tensor, table_ID: Tensor, prepared: PreparedSet) -> Ranks:
    histories, (users_U, ends_U) = prepared.histories, prepared.split.targets("test")
    return rank_targets(
        VectorScorer(lambda rows: users_UD[rows], table_ID[1:]), users_U, histories.at(users_U, ends_U),
        lambda rows: histories.prefixes(users_U[rows], ends_U[rows]), num_items=prepared.num_items,
    )  # fmt: skip


def _model_ranks(model: VectorModel, table_ID: Tensor, training, prepared, seed, folder, device, progress):
    from textrec.training.trainer import evaluate, fit

    if model.config.learned:
        fitted = fit(model, prepared, training, seed=seed, folder=folder, device=device, progress=progress)
        return evaluate(fitted.model, prepared, "test"), fitted.curve, fitted.cpu_s - fitted.here_cpu_s
    scored_ID = F.normalize(table_ID, dim=1).to(device)  # users' vectors may be those of another side
    model.item_vectors = lambda: scored_ID
    return evaluate(model.to(device), prepared, "test"), [], 0.0
