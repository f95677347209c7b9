"""The rows of "The Elephant in the Room" (Qu et al. 2024): SASRec and BERT4Rec whose item tables start from vectors.

A row is {sasrec, bert4rec} x a source of vectors, or a `*_finetuned*` or `*_embedder*` row changed in one thing. Each
is as wide as the vectors (768 in the paper), is ranked over all items, and is laid out on disk as by `rows.py`. The
training loss is a setting of its own; in `*_faithful` rows the protocol that is to be reported decides it, as
published. Not brought back: pads that are trained to predict row 0, which then competes in the ranking.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from textrec.data.choices import closest
from textrec.data.item_text import item_attributes, item_texts
from textrec.data.prepared import PreparedSet
from textrec.evaluation.ranking import Ranks
from textrec.models.item_table import attach, transformed
from textrec.models.recformer import RecFormer
from textrec.models.text_encoder import TextEncoder
from textrec.paths import ROOT
from textrec.schema import InputError
from textrec.seeding import derive_seed, seed_everything
from textrec.training.embedder_rows import encoded
from textrec.training.rows import RowResult, cached_row, code_files, configurations, model_class
from textrec.training.text_ranking import TextSet, item_table, weights_digest
from textrec.training.two_stage import load_pair

SOURCES = {
    "random": "reference: items start at random",
    "language_model": "items start from the language model",
    "pretrained": "items start from the pretrained text model",
    "finetuned": "items start from the text model finetuned on this set",
    "embedder": "items start from a general text embedder",
}
STALE = "finetuned_stale"  # the finetuned table as published, an epoch older than the weights beside it
_SASREC = {
    "num_blocks": 2, "num_heads": 1, "norm": "original", "dropout": 0.5, "attention_dropout": 0.5,
    "max_sequence_length": 50,
}  # fmt: skip
_BERT4REC = {
    "num_blocks": 2, "num_heads": 4, "dropout": 0.1, "attention_dropout": 0.1, "max_sequence_length": 50,
    "tie_item_table": False, "norm_embedding": False,
}  # fmt: skip
_TRAINING = {"learning_rate": 1e-4, "max_epochs": 200, "patience": 10}
_MASKING = {"objective": "masked_item", "mask_probability": 0.15, "mask_last_probability": 0.09, "batch_size": 256}
BASES = {  # model, its settings, its training: the published scripts
    "sasrec": ("SASRec", _SASREC, _TRAINING | {"batch_size": 128, "adam_betas": (0.9, 0.98)}),
    "bert4rec": ("BERT4Rec", _BERT4REC, _TRAINING | _MASKING),
}
COUPLED = {  # what the published SASRec is trained with if this is to be reported
    "full": {"loss": "full_softmax"},
    "sampled": {"loss": "gbce", "num_negatives": 1, "reject_history": True},
}


@dataclass(frozen=True)
class TableRow:
    """One row: a source of vectors, what is done to them once, and how the model holds them."""

    base: str  # sasrec | bert4rec
    changed: str
    source: str = "finetuned"  # one of SOURCES, or STALE
    transforms: tuple[str, ...] = ()  # of `transformed`, in order
    table: Mapping[str, Any] = field(default_factory=dict)  # of `attach`
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the model
    faithful: bool = False


def _variants(base: str) -> dict[str, TableRow]:
    habits = {"settings": {"attend_padding": True}} if base == "sasrec" else {}
    habits |= {"table": {"freeze": True, "train_mask": False}} if base == "bert4rec" else {}
    frozen, norm = {"freeze": True}, {"match_norm": True}
    layer = frozen | {"adaptor": "linear"}
    return {
        "finetuned_permuted": TableRow(base, "control: vectors exchanged between items", transforms=("permuted",)),
        "finetuned_random_directions": TableRow(base, "control: random vectors of the same mean and covariance",
                                                transforms=("same_covariance",)),
        "finetuned_frozen": TableRow(base, "vectors frozen", table=frozen),
        "finetuned_matched": TableRow(base, "vectors as long as random ones", table=norm),
        "finetuned_whitened": TableRow(base, "vectors whitened", transforms=("whitened",)),
        "finetuned_faithful": TableRow(base, "the published code's habits", STALE, faithful=True, **habits),
        "finetuned_projected": TableRow(base, "vectors frozen, through a layer", table=layer),
        "language_model_permuted": TableRow(base, "control: the language model's vectors exchanged",
                                            "language_model", ("permuted",)),
        "embedder_permuted": TableRow(base, "control: the embedder's vectors exchanged", "embedder", ("permuted",)),
        "embedder_projected": TableRow(base, "embedder's vectors frozen, through a layer", "embedder", table=layer),
        "embedder_whitened": TableRow(base, "embedder's vectors, whitened", "embedder", ("whitened",)),
        "embedder_experts": TableRow(base, "embedder's vectors frozen, whitening and experts above (UniSRec)",
                                     "embedder", table=frozen | {"adaptor": "experts"}),
        "embedder_plus_ids": TableRow(base, "embedder's vectors frozen, through a layer, beside ids", "embedder",
                                      table=layer | {"add_ids": True}),
        "narrow": TableRow(base, "64 wide, items start at random", "random", settings={"embedding_dim": 64}),
        "narrow_pca": TableRow(base, "64 wide, principal components", transforms=("pca",),
                               settings={"embedding_dim": 64}),
        "narrow_projected": TableRow(base, "64 wide, vectors frozen, through a layer", table=layer,
                                     settings={"embedding_dim": 64}),
    }  # fmt: skip


TABLE_ROWS: dict[str, TableRow] = {
    f"{base}_{name}": row
    for base in BASES
    for name, row in ({s: TableRow(base, changed, s) for s, changed in SOURCES.items()} | _variants(base)).items()
}


def run_table_rows(
    rows: Sequence[str], prepared: PreparedSet, tables: Mapping[str, Tensor], *, seed: int, run_dir: Path,
    device: str = "cpu", overrides: Mapping[str, Mapping[str, Any]] | None = None,
    skipped: Mapping[str, str] | None = None, progress: bool = False, evaluation: str = "full",
) -> list[RowResult]:  # fmt: skip
    """Run the named rows of `TABLE_ROWS`; finished ones are read back, a broken one is a result with its reason.

    `tables` maps sources to item vectors (I + 1, E), row 0 zero, all of one width except the embedder's, of which a row
    without an adaptor then takes as many principal components. `overrides` maps "all", a base or a row to settings of
    its model or training; `skipped` maps a row to the reason why it is not run. `evaluation` (full | sampled) is what
    is to be reported: it changes the loss of faithful rows and nothing else. Raises `InputError` for an unknown row or
    setting, and for a row whose vectors are not among the tables.
    """
    overrides, skipped = overrides or {}, skipped or {}
    for row in (*rows, *(set(overrides) - {"all", *BASES}), *skipped):
        if row not in TABLE_ROWS or row not in rows:
            raise InputError(f"row {row!r} is unknown{closest(row, TABLE_ROWS)}; expected one of {sorted(TABLE_ROWS)}")
        if TABLE_ROWS[row].source not in ("random", *tables) and row not in skipped:
            raise InputError(f"row {row!r} needs the vectors {TABLE_ROWS[row].source!r} among {sorted(tables)}")
    results = []
    for row in rows:
        preset, (config, training) = TABLE_ROWS[row], plan(row, prepared.num_items, tables, overrides, evaluation)
        model, given = BASES[preset.base][0], tables.get(preset.source)
        fits = given is None or given.shape[1] == config.embedding_dim or "adaptor" in preset.table
        if not fits and "pca" not in preset.transforms:
            preset = replace(preset, transforms=("pca", *preset.transforms))
        told = {"model": model, "source": preset.source, "transforms": preset.transforms, "table": dict(preset.table)}
        if given is not None:
            told["vectors"] = hashlib.sha256(given.cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
        parameters = json.loads(json.dumps(told | asdict(config) | asdict(training)))
        if row in skipped:
            results.append(RowResult(row, preset.changed, parameters, "not_attempted", skipped[row]))
            continue
        folder = Path(run_dir) / "rows" / row
        key = {"fingerprint": prepared.fingerprint, "seed": seed}
        code = [*code_files(model), ROOT / "textrec" / "models" / "item_table.py"]
        run = partial(_ranked, preset, config, training, prepared, given, seed, folder, device, progress)
        results.append(cached_row(row, preset.changed, parameters, key, folder, code, run))
    return results


def plan(
    row: str, num_items: int, tables: Mapping[str, Tensor], overrides: Mapping[str, Mapping], evaluation: str = "full"
) -> tuple[Any, Any]:
    """Return the complete configurations of a row's model and training: as wide as the text model's vectors."""
    if evaluation not in COUPLED:
        raise InputError(f"evaluation={evaluation!r}: expected full or sampled")
    preset = TABLE_ROWS[row]
    model, model_settings, training_settings = BASES[preset.base]
    sources = ("finetuned", "pretrained", "language_model", preset.source, "embedder")
    width = next((tables[source].shape[1] for source in sources if source in tables), 768)
    model_settings = model_settings | {"num_items": num_items, "embedding_dim": width} | dict(preset.settings)
    coupled = COUPLED[evaluation] if preset.faithful and preset.base == "sasrec" else {}
    groups = ("all", preset.base)
    return configurations(
        row, model_class(model).config_class, model_settings, training_settings | coupled, overrides, groups
    )


def _ranked(preset: TableRow, config, training, prepared, given, seed, folder, device, progress):
    """Return the test ranks, the curve, and what earlier runs spent on it: tokens, seconds."""
    from textrec.training.trainer import evaluate, fit

    seed_everything(seed)
    model = model_class(BASES[preset.base][0])(config)
    if given is not None:
        seeded = {"seed": derive_seed(seed, *preset.transforms), "width": config.embedding_dim}
        model = attach(model, transformed(given.cpu(), preset.transforms, **seeded), **preset.table)
    fitted = fit(model, prepared, training, seed=seed, folder=folder, device=device, progress=progress)
    return evaluate(fitted.model, prepared, "test"), fitted.curve, (fitted.tokens, fitted.cpu_s - fitted.here_cpu_s)


def given_pair(
    folder: Path, start: RecFormer, texts: TextSet, seed: int, rows: Path
) -> tuple[Path, list[RowResult], list[str]]:
    """Return the file of M' and I' that the first stage of a row of notebook 03 left, the row, what a record tells.

    The row is given if it is of these users and this seed, its ranks kept in `rows`. Raises `InputError` if none fits.
    """
    row, ranks, pair = (folder / name for name in ("row.json", "ranks.parquet", "stage1/best.safetensors"))
    if not all(each.is_file() for each in (row, ranks, pair)):
        raise InputError(f"{folder} holds no finetuned row: expected all that `textrec run 03` leaves, also weights")
    stored = json.loads(row.read_text(encoding="utf-8"))
    key, result = stored["key"], stored["result"] | {"changed": "the text model itself, which reads each history"}
    for name, own in (("weights", weights_digest(start)), ("tokens", texts.identity["tokens"])):
        if key[name] != own:
            what = {"weights": "was finetuned from other weights", "tokens": "read other items"}[name]
            raise InputError(f"{folder} {what}: its {name} are {key[name]}, expected {own}")
    told = [f"the finetuned text model is the first stage of seed {key['seed']} of {folder.parent.parent.parent.name}"]
    others = key["fingerprint"] != texts.identity["fingerprint"]
    told += ["the users whom the text model was finetuned on are another choice of this set's"] * others
    if others or key["seed"] != seed:  # one training is one sample, not one a seed
        return pair, [], told
    (rows / folder.name).mkdir(parents=True, exist_ok=True)
    Ranks.load(ranks).save(rows / folder.name / ranks.name)
    return pair, [RowResult(**result, ranks=Ranks.load(ranks))], told


def text_encoders(
    language_model: RecFormer, pretrained: RecFormer, pair: Path, device: str = "cpu"
) -> dict[str, RecFormer]:
    """Return copies of the encoders of a text model's three tables; `pair` was saved by finetuning `pretrained`."""
    encoders = {"language_model": language_model, "pretrained": pretrained, "finetuned": pretrained}
    encoders = {name: copy.deepcopy(encoder).eval() for name, encoder in encoders.items()}
    load_pair(pair, encoders["finetuned"])
    return {name: encoder.to(device) for name, encoder in encoders.items()}


def text_tables(
    encoders: Mapping[str, RecFormer], texts: TextSet, *, folder: Path | None = None, stale: Path | None = None
) -> dict[str, Tensor]:
    """Return the item vectors (I + 1, E) that encoders make of a set: of unit norm, where the published ones are not.

    They are kept in `folder` under the hash of the weights and of the items' tokens, and encoded once. The finetuned
    ones are those of the saved weights M'; `stale` names the pair whose own I', an epoch older, is the table `STALE`.
    """
    tables = {name: item_table(encoder, texts, folder=folder).cpu() for name, encoder in encoders.items()}
    return tables | ({STALE: load_pair(stale, copy.deepcopy(encoders["finetuned"])).cpu()} if stale else {})


def embedder_table(name: str, prepared: PreparedSet, *, folder: Path, device: str = "cpu") -> Tensor:
    """Return the unit vectors (I + 1, E) that a text embedder (see `TextEncoder`) makes of the item texts."""
    texts = list(item_texts(item_attributes(prepared.catalogue)))
    return F.pad(encoded(TextEncoder(name, device=device), texts, "document", folder=folder).vectors, (0, 0, 1, 0))
