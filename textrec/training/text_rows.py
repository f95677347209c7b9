"""The rows of RecFormer's tables: each changes one thing, is tested once, cached in the run folder and resumed there.

Laid out as by `rows.py`: `run_dir/rows/<row>/` with `row.json`, written last, `ranks.parquet` and the checkpoints.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from textrec.data.choices import closest, configured
from textrec.data.item_text import item_attributes, shuffled_texts
from textrec.models.recformer import RecFormer
from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.rows import RowResult, cached_row
from textrec.training.text_launch import two_stage_in_processes
from textrec.training.text_ranking import (
    BagOfWords,
    HalfPrecision,
    TextSet,
    text_ranks,
    weights_digest,
    with_permuted_words,
    with_random,
    with_uniform_attention,
)  # fmt: skip
from textrec.training.two_stage import FAITHFUL, TwoStageConfig, trainable, two_stage

_CODE = [ROOT / "textrec" / name for name in (
    "data/histories.py", "data/item_text.py", "data/tokenizing.py", "data/examples.py", "evaluation/metrics.py",
    "evaluation/ranking.py", "models/adapters.py", "models/attention.py", "models/recformer.py", "seeding.py",
    "training/batches.py", "training/losses.py", "training/optimizers.py", "training/strategies.py",
    "training/text_batches.py", "training/text_ranking.py", "training/two_stage.py",
)]  # fmt: skip


@dataclass(frozen=True)
class TextRow:
    """What a row is, and the one thing in which it differs from `two_stage`, or from `zero_shot` where untrained."""

    changed: str
    start: str = "pretrained"  # pretrained | backbone | one of STARTS
    texts: str = "own"  # own | shuffled: each item gets some item's text
    finetuned: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


STARTS: dict[str, Callable[[RecFormer, int], Any]] = {
    "random": lambda start, seed: RecFormer(start.config),
    "random_words": lambda start, seed: with_random(start, "word_table", seed),
    "random_blocks": lambda start, seed: with_random(start, "blocks", seed),
    "permuted_words": with_permuted_words,
    "uniform_attention": lambda start, seed: with_uniform_attention(start),
    "bag_of_words": lambda start, seed: BagOfWords.of(start),
}
TABLES = ("item_position_table", "type_table")
QUERIES = ("blocks.*.attention.query", "blocks.*.attention.query_global")
ENCODER = (  # all but words and norms
    "position_table", *TABLES, *(f"blocks.*.{part}" for part in ("attention", "attention_output", "enter", "leave")),
)  # fmt: skip
TEXT_ROWS = {
    "zero_shot": TextRow("reference of the untrained rows", finetuned=False),
    "bag_of_words": TextRow("mean word vector, no encoder", start="bag_of_words", finetuned=False),
    "permuted_words": TextRow("word vectors exchanged", start="permuted_words", finetuned=False),
    "shuffled_texts": TextRow("texts exchanged between items", texts="shuffled", finetuned=False),
    "random_encoder": TextRow("no pretraining", start="random", finetuned=False),
    "random_words": TextRow("word vectors drawn anew", start="random_words", finetuned=False),
    "random_blocks": TextRow("attention and feed-forward drawn anew", start="random_blocks", finetuned=False),
    "uniform_attention": TextRow("a mean for attention", start="uniform_attention", finetuned=False),
    "language_model": TextRow("no pretraining on histories", start="backbone", finetuned=False),
    "two_stage": TextRow("reference"),
    "two_stage_faithful": TextRow("the published code's habits", settings=FAITHFUL),
    "no_two_stage": TextRow("items of the pretrained model, frozen", settings={"stages": (2,)}),
    "no_two_stage_frozen_words": TextRow(
        "items of the pretrained model and word table, frozen", settings={"stages": (2,), "freeze": ("word_table",)}
    ),
    "no_two_stage_trained_items": TextRow(
        "items of the pretrained model, trained on as vectors", settings={"stages": (2,), "train_items": True}
    ),
    "no_two_stage_trained_items_frozen_words": TextRow(
        "items of the pretrained model, trained on as vectors; word table frozen",
        settings={"stages": (2,), "train_items": True, "freeze": ("word_table",)},
    ),
    "stage_one_alone": TextRow("no second stage", settings={"stages": (1,)}),
    "frozen_words": TextRow("word table frozen", settings={"freeze": ("word_table",)}),
    "frozen_encoder": TextRow("words and norms trained alone", settings={"freeze": ENCODER}),
    "random_words_two_stage": TextRow("word vectors drawn anew", start="random_words"),
    "random_blocks_two_stage": TextRow("attention and feed-forward drawn anew", start="random_blocks"),
    **{
        f"random_{part}_frozen_{kept}": TextRow(
            f"{part} drawn anew, {trained} trained alone", f"random_{part}", settings={"freeze": frozen}
        )
        for part in ("words", "blocks")
        for kept, trained, frozen in (("words", "encoder", ("word_table",)), ("encoder", "words and norms", ENCODER))
    },
    "permuted_words_two_stage": TextRow("word vectors exchanged", start="permuted_words"),
    "uniform_attention_two_stage": TextRow(
        "a mean for attention", start="uniform_attention", settings={"freeze": QUERIES}
    ),
    "bag_of_words_two_stage": TextRow("mean word vector, no encoder", start="bag_of_words"),
    "lora_all": TextRow("adapters alone", settings={"adapters": {}}),
    "lora_attn_local": TextRow("adapters of the window's attention", settings={"adapters": {"targets": "attn_local"}}),
    "lora_attn_global": TextRow(
        "adapters of the start token's attention", settings={"adapters": {"targets": "attn_global"}}
    ),
    "lora_attn": TextRow("adapters of attention", settings={"adapters": {"targets": "attn"}}),
    "lora_ffn": TextRow("adapters of the feed-forward net", settings={"adapters": {"targets": "ffn"}}),
    "lora_rank2": TextRow("adapters of rank 2", settings={"adapters": {"rank": 2, "alpha": 4.0}}),
    "lora_rank32": TextRow("adapters of rank 32", settings={"adapters": {"rank": 32, "alpha": 64.0}}),
    "lora_words": TextRow("adapters and word table", settings={"adapters": {"train_also": ("word_table",)}}),
    "lora_dora": TextRow("adapters of direction and length", settings={"adapters": {"dora": True}}),
    "lora_rslora": TextRow("adapters times alpha / sqrt(rank)", settings={"adapters": {"rslora": True}}),
    "no_item_positions_and_types": TextRow("two tables switched off", settings={"switched_off": TABLES}),
    "no_pretraining": TextRow("random weights", start="random"),
    "language_model_two_stage": TextRow("no pretraining on histories", start="backbone"),
}


def run_text_rows(
    rows: Sequence[str], texts: TextSet, start: RecFormer, *, seed: int, run_dir: Path, device: str = "cpu",
    devices: int = 1, overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skipped: Mapping[str, str] | None = None, progress: bool = False, backbone: RecFormer | None = None,
    test_precision: str = "32",
) -> list[RowResult]:  # fmt: skip
    """Run the named rows of `TEXT_ROWS` on one set, one pretrained encoder and one seed; finished ones are read back.

    `overrides` maps a row, or "all", to settings of `TwoStageConfig`; `skipped` maps a row that is not to be run to the
    reason. `backbone` is the language model as it was before pretraining, which the rows `language_model*` start from.
    `test_precision` "bf16" encodes what the test ranks under autocast, see `HalfPrecision`; validation never. A row
    that breaks becomes a result with its reason. Raises `InputError` for an unknown row or setting, and for a row
    that lacks its backbone.
    """
    overrides, skipped = overrides or {}, skipped or {}
    if test_precision not in ("32", "bf16"):
        raise InputError(f"test_precision is {test_precision!r}; expected '32' or 'bf16'")
    for row in [*rows, *(set(overrides) - {"all"}), *skipped]:
        if row not in TEXT_ROWS or row not in rows:
            raise InputError(f"row {row!r} is unknown{closest(row, rows)}; expected one of {sorted(TEXT_ROWS)}")
        if TEXT_ROWS[row].start == "backbone" and backbone is None and row not in skipped:
            raise InputError(f"row {row!r} needs backbone=..., the language model as it was before pretraining")
    plans = {row: _config(row, overrides) for row in rows}
    digests, results = {id(each): weights_digest(each) for each in (start, backbone) if each is not None}, []
    for row, training in plans.items():
        preset = TEXT_ROWS[row]
        model = backbone if preset.start == "backbone" and backbone is not None else start
        settings = {"start": preset.start, "texts": preset.texts, "encoder": asdict(model.config)}
        settings |= {} if test_precision == "32" else {"test_precision": test_precision}
        parameters = json.loads(json.dumps(settings | (asdict(training) if training else {})))
        if row in skipped:
            results.append(RowResult(row, preset.changed, parameters, "not_attempted", skipped[row]))
            continue
        key = {"seed": seed, "weights": digests[id(model)]} | texts.identity
        folder = Path(run_dir) / "rows" / row
        tested = HalfPrecision if test_precision == "bf16" else lambda encoder: encoder
        run = partial(_ranked, row, training, texts, model, seed, folder, device, devices, progress, tested)
        stages = ("stage1", "stage2")
        results.append(cached_row(row, preset.changed, parameters, key, folder, _CODE, run, parts=stages))
    return results


def _config(row: str, overrides: Mapping) -> TwoStageConfig | None:
    settings, known = dict(TEXT_ROWS[row].settings), {each.name for each in fields(TwoStageConfig)}
    for group in ("all", row):
        for name, value in overrides.get(group, {}).items():
            if name not in known:
                hint = closest(name, known)
                raise InputError(f"overrides[{group!r}] sets {name!r}, which row {row!r} does not have{hint}")
            settings[name] = {**(settings.get(name) or {}), **value} if isinstance(value, Mapping) else value
    return configured(TwoStageConfig, settings, f"setting of row {row!r}") if TEXT_ROWS[row].finetuned else None


def trained_parameters(row: str, start: RecFormer, overrides: Mapping[str, Mapping[str, Any]] | None = None) -> int:
    """Return how many numbers of the encoder the training of a row changes; 0 for an untrained one."""
    training, place = _config(row, overrides or {}), TEXT_ROWS[row].start
    if training is None:
        return 0
    model = trainable(STARTS[place](start, 0) if place in STARTS else start, training)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _ranked(row, training, texts: TextSet, start: RecFormer, seed, folder, device, devices, progress, tested):
    """Return the test ranks, the curve, and what other processes and earlier runs spent on it: tokens, seconds."""
    preset = TEXT_ROWS[row]
    if preset.texts == "shuffled":
        attributes = shuffled_texts(item_attributes(texts.prepared.catalogue), seed)
        texts = TextSet.of(texts.prepared, texts.tokenizer, attributes=attributes, faithful=texts.faithful)
    if preset.start == "random":
        seed_everything(seed)
    model = STARTS[preset.start](start, seed) if preset.start in STARTS else start
    if training is None:
        return text_ranks(tested(model.to(device)), texts, "test"), [], (0, 0.0)
    if devices > 1:
        found = two_stage_in_processes(model, texts, training, seed=seed, folder=folder, device=device, devices=devices)
        found.model.to(device)
    else:
        found = two_stage(model, texts, training, seed=seed, folder=folder, device=device, progress=progress)
    ranks = text_ranks(tested(found.model), texts, "test", items_ID=found.items_ID.to(device))
    return ranks, found.curve, (found.tokens, found.cpu_s - found.here_cpu_s)
