"""Every parameter file is loaded against the notebook that it claims to configure."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from textrec.data.preparing import find_recipe
from textrec.models.language_servers import KINDS
from textrec.models.recformer import PRESETS as RECFORMERS
from textrec.paths import NOTEBOOKS, PARAMETERS
from textrec.study.claims import load_claims
from textrec.study.parameters import (
    HEADER,
    SCALES,
    notebook_path,
    read_header,
    read_values,
    resolve_parameters,
    variants,
)
from textrec.study.table_figures import SEEN_RARELY
from textrec.training import rows, text_rows
from textrec.training.embedder_rows import EMBEDDER_ROWS
from textrec.training.embedder_rows import plan as plan_embedder
from textrec.training.presets import PRESETS
from textrec.training.pretraining import PretrainingConfig
from textrec.training.prompt_rows import PROMPT_ROWS, PromptConfig
from textrec.training.strategies import STRATEGIES
from textrec.training.table_rows import BASES, TABLE_ROWS, plan
from textrec.training.text_rows import TEXT_ROWS

NUMBERS = [path.name[:2] for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))]
FILES = sorted(path for scale in SCALES for path in (PARAMETERS / scale).glob("[0-9]*.yaml"))
RUNS = [
    (scale, number, variant) for scale in SCALES for number in NUMBERS for variant in variants(number, scale) or [None]
]


def shown(value):
    return "/".join(value.parts[-2:]) if hasattr(value, "parts") else str(value)


@pytest.mark.parametrize(("scale", "number", "variant"), RUNS)
def test_the_parameters_of_a_run_fit_its_notebook(scale, number, variant):
    values = resolve_parameters(number, scale, variant)
    assert values["scale"] == scale
    for name in {values["dataset"], *(name for key in values if key.endswith("datasets") for name in values[key])}:
        assert find_recipe(name), f"{name} is in no line of sets.yaml"
    for row in (*values.get("rows", []), *values.get("overrides", {})):
        assert row in {*EMBEDDER_ROWS, *PRESETS, *TEXT_ROWS, *TABLE_ROWS, *PROMPT_ROWS, *BASES, "all"}, (
            f"{row} is no row"
        )
    if number in ("01", "08"):  # every setting has a name that its row knows and a value that its configuration accepts
        assert set(values["overrides"]) <= {"all", values["reference"], *values["rows"]}
        for row in (values["reference"], *values["rows"]):
            rows._plan(row, SimpleNamespace(num_items=100), values["overrides"])
    if number == "08":
        order = [values["reference"], *values["rows"]]
        assert values["varied"] in order and values["skipped"].keys() <= set(values["rows"])
        assert {row for pair in values["gates"] for row in pair} <= set(order)
        assert set(values["tie_rows"]) <= PRESETS.keys() and set(values["strategies"]) <= set(STRATEGIES) - {"auto"}
    if number == "02":
        training, changes = PretrainingConfig(**values["pretraining"]), dict(values["encoder"])
        start = RECFORMERS[changes.pop("preset")] if values["backbone"] == "random" else RECFORMERS["base"]
        config = replace(start, **changes)
        assert training.max_steps > training.warmup_steps and config.max_tokens <= start.max_tokens
        assert len(values["held_out_datasets"]) == 1 and values["skipped"].keys() <= set(values["rows"])
    if number == "03":
        PretrainingConfig(**values["pretraining"])
        order, ids = [values["reference"], *values["rows"]], values["id_rows"]
        assert {*values["overrides"], *values["skipped"]} <= {"all", *order} and "zero_shot" in order
        for row in order:
            text_rows._config(row, values["overrides"])
        for row in ids:
            rows._plan(row, SimpleNamespace(num_items=100), values["id_overrides"])
        gates = {name.removesuffix("_cold_items") for gate in values["gates"] for name in gate}
        assert gates <= {*order, *ids} and {len(gate) for gate in values["gates"]} == {2}
    if number == "04":
        PretrainingConfig(**values["pretraining"])
        (full, *others), adapters = values["arms"].values(), values["adapters"]
        order = {row for arm in values["arms"].values() for row in arm[1:] if row} | {*adapters}
        assert full[1:] == ["zero_shot", "two_stage"] and all(len(arm) == 3 for arm in others)
        assert {*values["overrides"], *values["skipped"]} <= {"all", *order}
        for row in order:
            training = text_rows._config(row, values["overrides"])
            assert bool(training and training.adapters) == (row in adapters)
        assert {row for pair in values["gates"] for row in pair} <= order
        assert values["reductions"].keys() == {"dropped", "pruned"}
    if number == "06":
        PromptConfig(**values["prompting"])
        order, ids, kinds = values["rows"], values["id_rows"], [values["language_model"], *values["twins"]]
        assert order[0] == "first_stage" and values["skipped"].keys() <= set(order) <= PROMPT_ROWS.keys()
        for row in ids:
            rows._plan(row, SimpleNamespace(num_items=100), values["id_overrides"])
        assert {row for pair in values["gates"] for row in pair} <= {*order, *ids} and values["replays"] > 1
        assert {kind.get("kind", "transformers") for kind in kinds} <= KINDS.keys()
    if number == "05":
        order, tables, ids = values["rows"], values["table_rows"], values["id_rows"]
        assert values["overrides"].keys() <= {"all", *order} and values["skipped"].keys() <= {*order, *tables}
        for row in order:
            plan_embedder(row, 100, 8, values["overrides"])
        for row in tables:
            plan(row, 100, {}, values["table_overrides"])
        for row in ids:
            rows._plan(row, SimpleNamespace(num_items=100), values["id_overrides"])
        gates = {name.removesuffix("_cold_items") for pair in values["gates"] for name in pair}
        assert gates <= {*order, *tables, *ids} and {*values["compared"]} <= {*order, *tables, *ids}
        assert {"zero_shot_concatenated", "zero_shot_recency"} <= {*order} and "sasrec_random" in tables
    if number == "07":
        PretrainingConfig(**values["pretraining"])
        text_rows._config("stage_one_alone", {"all": values["finetuning"]})
        order, ids = values["rows"], values["id_rows"]
        assert values["overrides"].keys() <= {"all", *BASES, *order} and values["skipped"].keys() <= {*order, *ids}
        for row in order:
            plan(row, 100, {}, values["overrides"], values["evaluation"])
        for row in ids:
            rows._plan(row, SimpleNamespace(num_items=100), values["id_overrides"])
        judged = [c for c in load_claims().values() if (c.notebook, c.dataset) == ("07", values["dataset"])]
        judged = {name.removesuffix(SEEN_RARELY) for claim in judged for name in (claim.row, claim.over)}
        texts = {"stage_one_alone", "two_stage"}  # trained there, or given: the row of notebook 03
        assert {row for pair in values["gates"] for row in pair} | judged <= {*order, *ids, *texts}
        assert any(TABLE_ROWS[row].source == "embedder" for row in order) <= bool(values["embedder"])
        assert {f"{TABLE_ROWS[row].base}_random" for row in order} <= set(order), "what a row is paired with"
        assert values["reductions"].keys() == {"tuned", "dropped", "pruned"}


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_parameter_file_belongs_to_a_notebook(path):
    assert notebook_path(path.stem[:2])


@pytest.mark.parametrize("scale", SCALES)
def test_every_notebook_has_its_file_at_every_scale(scale):
    assert (PARAMETERS / scale / "common.yaml").is_file()
    assert [number for number in NUMBERS if not (PARAMETERS / scale / f"{number}.yaml").is_file()] == []


@pytest.mark.parametrize(("scale", "number", "variant"), RUNS)
def test_the_header_says_command_hardware_time_and_what_to_expect(scale, number, variant):
    path = PARAMETERS / scale / (f"{number}-{variant}.yaml" if variant else f"{number}.yaml")
    header = read_header(path)
    assert tuple(header) == HEADER and all(header.values())
    wanted = f"textrec run {number}" + (f" --scale {scale}" if scale != "smoke" else "")
    wanted += f" --variant {variant}" if variant else ""
    assert re.fullmatch(re.escape(wanted) + r"( --seeds( \d)+)?", header["command"])
    for group in re.findall(r"([\w-]+)/\*", header["expects"]):
        claims = [claim for claim in load_claims().values() if claim.id.startswith(f"{group}/")]
        assert claims, f"{group} is no group of claims"
        assert {claim.dataset for claim in claims} == {resolve_parameters(number, scale, variant)["dataset"]}


def test_a_file_gives_no_value_that_is_not_looked_at():
    """The runner sets scale and seed by itself; a second place for them would be silently overridden."""
    for path in FILES:
        assert not {"scale", "seed", "run_dir"} & set(read_values(path)), path
