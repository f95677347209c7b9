"""Rows of text models: one change each, read back once finished, a broken row is a row, mistakes are named."""

import pytest
import torch
from safetensors.torch import load_file
from training.text_sets import SMALL, brand_set

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.models.recformer import RecFormer
from textrec.schema import InputError
from textrec.training import text_rows
from textrec.training.text_ranking import HalfPrecision, TextSet, item_table, text_ranks
from textrec.training.text_recommending import text_recommender
from textrec.training.text_rows import TEXT_ROWS, _config, run_text_rows, trained_parameters
from textrec.training.two_stage import TwoStageConfig

BRIEF = {"all": {"max_epochs": 1, "batch_size": 12, "warmup_steps": 0}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> TextSet:
    prepared = brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0, num_users=24)
    return TextSet.of(prepared, train_tokenizer(item_attributes(prepared.catalogue), 400))


@pytest.fixture(scope="module")
def start() -> RecFormer:
    torch.manual_seed(7)  # another than the row without pretraining draws
    return RecFormer(SMALL).eval()


def test_rows_are_run_once_and_read_back(texts, start, tmp_path, monkeypatch):
    rows = ["zero_shot", "bag_of_words", "shuffled_texts", "random_encoder", "no_two_stage", "frozen_words"]

    def run(**more):
        return run_text_rows(rows, texts, start, seed=0, run_dir=tmp_path, overrides=BRIEF,
                             skipped={"frozen_words": "too dear"}, **more)  # fmt: skip

    results = {each.row: each for each in run()}
    assert [results[row].status for row in rows] == ["ok"] * 5 + ["not_attempted"]
    own = text_ranks(start, texts, "test").kept.higher_U
    assert (results["zero_shot"].ranks.kept.higher_U == own).all()
    for row in rows[1:5]:
        assert (results[row].ranks.kept.higher_U != own).any()
    trained = results["no_two_stage"]
    assert trained.parameters["stages"] == [2] and trained.parameters["learning_rate"] == TwoStageConfig.learning_rate
    assert trained.cost["tokens"] > 0 and trained.curve[0]["stage"] == 2
    monkeypatch.setattr(text_rows, "_ranked", lambda *given: 1 / 0)  # nothing is run again
    again = {each.row: each for each in run()}
    assert again["no_two_stage"].curve == trained.curve and again["zero_shot"].cost == results["zero_shot"].cost


def test_a_test_in_half_precision_changes_the_test_alone_and_tells_of_it(texts, start, tmp_path):
    rows, given = ["zero_shot", "no_two_stage"], {"seed": 0, "overrides": BRIEF}
    whole = run_text_rows(rows, texts, start, run_dir=tmp_path / "whole", **given)
    half = run_text_rows(rows, texts, start, run_dir=tmp_path / "half", test_precision="bf16", **given)
    for one, other in zip(whole, half, strict=True):
        assert other.parameters == one.parameters | {"test_precision": "bf16"}
        losses = [[entry.get("ndcg@10"), entry["train_loss"]] for entry in one.curve]
        assert losses == [[entry.get("ndcg@10"), entry["train_loss"]] for entry in other.curve]
        moved = one.ranks.kept.higher_U - other.ranks.kept.higher_U
        assert moved.any() and abs(moved).mean() < 0.05 * texts.prepared.num_items
    assert not start.training  # as it was before
    coarse, exact = (item_table(encoder, texts) for encoder in (HalfPrecision(start), start))
    assert coarse.dtype == torch.float32 and 0 < (1 - (coarse * exact).sum(1)[1:]).max() < 1e-3
    with pytest.raises(InputError, match="test_precision is 'bf17'; expected '32' or 'bf16'"):
        run_text_rows(rows, texts, start, run_dir=tmp_path, test_precision="bf17", **given)


def test_a_language_model_is_tested_as_it_was_before_pretraining(texts, start, tmp_path, monkeypatch):
    torch.manual_seed(8)
    rows, before, other = ["language_model", "language_model_two_stage"], RecFormer(SMALL).eval(), RecFormer(SMALL)
    brief = {"all": BRIEF["all"] | {"stages": (2,)}}

    def run(backbone, pretrained=start, **more):
        given = {"seed": 0, "run_dir": tmp_path, "overrides": brief, "backbone": backbone} | more
        return [each.ranks.kept.higher_U for each in run_text_rows(rows, texts, pretrained, **given)]

    untrained, trained = run(before)
    own = text_ranks(before, texts, "test").kept.higher_U
    assert (untrained == own).all() and (trained != own).any()
    assert (own != text_ranks(start, texts, "test").kept.higher_U).any()
    items_ID = load_file(tmp_path / "rows" / rows[1] / "stage2" / "best.safetensors")["items_ID"]
    assert torch.equal(items_ID, item_table(before, texts))  # what it was finetuned from
    ranked = text_rows._ranked
    monkeypatch.setattr(text_rows, "_ranked", lambda *given: 1 / 0)
    assert (run(before, pretrained=other)[1] == trained).all()  # the pretrained model is no part of it
    monkeypatch.setattr(text_rows, "_ranked", ranked)
    assert (run(other)[0] != own).any()
    with pytest.raises(InputError, match="row 'language_model' needs backbone="):
        run(None)
    skipped = run_text_rows(rows[:1], texts, start, seed=0, run_dir=tmp_path, skipped={rows[0]: "no such model"})
    assert (skipped[0].status, skipped[0].reason) == ("not_attempted", "no such model")


def test_arms_take_words_or_attention_away_and_adapters_are_read_by_whatever_reads_finetuned_rows(
    texts, start, tmp_path
):
    rows = ["zero_shot", "random_words", "random_blocks", "uniform_attention", "random_words_two_stage",
            "uniform_attention_two_stage", "bag_of_words_two_stage", "frozen_encoder", "random_blocks_frozen_words",
            "lora_ffn"]  # fmt: skip
    brief = {"all": BRIEF["all"] | {"stages": (1,), "learning_rate": 1e-2}, "lora_ffn": {"adapters": {"rank": 2}}}
    given = {"seed": 0, "run_dir": tmp_path, "overrides": brief}
    results = {each.row: each for each in run_text_rows(rows, texts, start, **given)}
    assert [each.status for each in results.values()] == ["ok"] * len(rows)
    ranks = [tuple(each.ranks.kept.higher_U) for each in results.values()]
    assert len(set(ranks)) == len(rows)
    weights = {row: load_file(tmp_path / "rows" / row / "model" / "model.safetensors") for row in rows[4:]}
    queries = [name for name in weights["lora_ffn"] if ".query" in name]
    assert queries and not any(weights["uniform_attention_two_stage"][name].any() for name in queries)
    before = start.state_dict()
    for row, parts in (("frozen_encoder", ("word_table", "norm")), ("lora_ffn", ("enter.weight", "leave.weight"))):
        changed = {name for name in before if not torch.equal(weights[row][name], before[name])}
        assert changed and all(any(part in name for part in parts) for name in changed)
    kept = {name for name in before if torch.equal(weights["random_blocks_frozen_words"][name], before[name])}
    assert "word_table.weight" in kept and not any("attention.key.weight" in name for name in kept)
    assert weights["bag_of_words_two_stage"].keys() == {"word_table.weight"}
    assert (
        results["lora_ffn"].parameters["adapters"] | {"rank": 2, "targets": "ffn"}
        == results["lora_ffn"].parameters["adapters"]
    )
    found = text_recommender(tmp_path / "rows" / "lora_ffn", texts.prepared.catalogue, texts.prepared.fingerprint)
    assert found.items_ID is not None and torch.equal(
        found.encoder.blocks[0].enter.weight, weights["lora_ffn"]["blocks.0.enter.weight"]
    )


def test_trained_parameters_are_counted(start):
    whole = sum(weight.numel() for weight in start.parameters())
    of_ffn = 2 * 2 * 2 * (16 + 32)  # layers, maps, rank
    counted = {row: trained_parameters(row, start, {"lora_ffn": {"adapters": {"rank": 2}}})
               for row in ("zero_shot", "two_stage", "frozen_words", "bag_of_words_two_stage", "lora_ffn")}  # fmt: skip
    for part in ("words", "blocks"):
        assert text_rows.TEXT_ROWS[f"random_{part}_frozen_encoder"].start == f"random_{part}"
        for frozen in ("frozen_words", "frozen_encoder"):
            assert trained_parameters(f"random_{part}_{frozen}", start) == trained_parameters(frozen, start) < whole
    assert counted == {"zero_shot": 0, "two_stage": whole, "frozen_words": whole - 400 * 16,
                       "bag_of_words_two_stage": 400 * 16, "lora_ffn": of_ffn}  # fmt: skip


def test_a_broken_row_is_a_row_with_its_reason(texts, start, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA out of memory\nmore")

    monkeypatch.setattr(text_rows, "text_ranks", broken)
    result = run_text_rows(["zero_shot"], texts, start, seed=0, run_dir=tmp_path)[0]
    assert (result.status, result.reason) == ("out_of_memory", "RuntimeError: CUDA out of memory")


def test_unknown_rows_and_settings_are_named(texts, start, tmp_path):
    for rows, overrides, message in (
        (["two_stages"], None, "row 'two_stages' is unknown"),
        (["two_stage"], {"two_stages": {}}, r"'two_stages' is unknown \(did you mean 'two_stage'\?\)"),
        (["two_stage"], {"all": {"patiense": 3}}, r"did you mean 'patience'\?"),
        (["two_stage"], {"all": {"train_share": 2.0}}, "row 'two_stage': train_share=2.0"),
    ):
        with pytest.raises(InputError, match=message):
            run_text_rows(rows, texts, start, seed=0, run_dir=tmp_path, overrides=overrides)


def test_every_row_has_a_configuration_of_its_own():
    trained = [_config(row, {}) for row, preset in TEXT_ROWS.items() if preset.finetuned]
    assert trained[0] == TwoStageConfig() and all(trained)
    told = {(str(_config(row, {})), preset.start, preset.texts) for row, preset in TEXT_ROWS.items()}
    assert len(told) == len(TEXT_ROWS)
