"""Two-stage finetuning: the order of Algorithm 1 under scripted validation, resumption, shares, faithful habits."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training.text_sets import SMALL, brand_set

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.models.adapters import load_adapters
from textrec.models.recformer import RecFormer
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training import two_stage as module
from textrec.training.consolidation import convert
from textrec.training.text_ranking import TextSet, item_table, text_ranks
from textrec.training.two_stage import FAITHFUL, Stage, TwoStageConfig, load_pair, training_ends, two_stage

TRAINING = TwoStageConfig(max_epochs=4, batch_size=16, accumulate=2, learning_rate=1e-3, warmup_steps=2)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> TextSet:
    prepared = brand_set(tmp_path_factory.mktemp("sets") / "brands", seed=0, num_users=24)
    return TextSet.of(prepared, train_tokenizer(item_attributes(prepared.catalogue), 400))


def start() -> RecFormer:
    seed_everything(0)
    return RecFormer(SMALL)


def run(texts, folder, training=TRAINING):
    return two_stage(start(), texts, training, seed=0, folder=folder)


class Watched:
    """What happened in which order: (what, stage, epoch), and the rates of learning by stage."""

    def __init__(self, monkeypatch, values: list[float]):
        self.events, self.rates, self.tables, scripted = [], {1: [], 2: []}, {}, iter(values)
        plain_encode, plain_save = module.encode_items, module.save_pair
        plain_step = module.TwoStageModule.training_step

        def encode(model, texts, trainer):
            assert not self.events or trainer.lightning_module.stage == 1
            self.events.append(("encode", trainer.current_epoch))
            return plain_encode(model, texts, trainer)

        def validate(model, texts, items_ID, training, users, trainer):
            stage = trainer.lightning_module.stage
            assert items_ID is trainer.lightning_module.items_ID  # the table that was trained against
            self.events.append((f"validate {stage}", trainer.current_epoch))
            self.tables[stage, trainer.current_epoch] = items_ID.clone()
            return next(scripted)

        def save(path, model, items_ID):
            self.events.append(("save", path.parent.name))
            plain_save(path, model, items_ID)

        def step(network, batch, batch_idx):
            self.rates[network.stage].append(network.trainer.optimizers[0].param_groups[0]["lr"])
            return plain_step(network, batch, batch_idx)

        for name, replaced in (("encode_items", encode), ("validate", validate), ("save_pair", save)):
            monkeypatch.setattr(module, name, replaced)
        monkeypatch.setattr(module.TwoStageModule, "training_step", step)


def test_items_are_encoded_in_stage_one_alone_and_the_best_pair_goes_on(texts, tmp_path, monkeypatch):
    watched = Watched(monkeypatch, [0.1, 0.3, 0.2, 0.2, 0.25, 0.4, 0.1, 0.1])
    result = run(texts, tmp_path, replace(TRAINING, patience=(5, 2)))
    assert watched.events == [
        ("encode", 0), ("validate 1", 0), ("save", "stage1"),
        ("encode", 1), ("validate 1", 1), ("save", "stage1"),
        ("encode", 2), ("validate 1", 2),
        ("encode", 3), ("validate 1", 3),  # the last epoch of a full-length stage 1
        ("validate 2", 0),  # 0.25 beats what stage 2 begins with nowhere: 0.3 is carried over
        ("validate 2", 1), ("save", "stage2"),
        ("validate 2", 2), ("validate 2", 3),
    ]  # fmt: skip
    assert result.best == 0.4 and [entry["stage"] for entry in result.curve] == [1] * 4 + [2] * 4
    pairs = [load_file(tmp_path / stage / "best.safetensors") for stage in ("stage1", "stage2")]
    frozen = watched.tables[1, 1]
    for pair in pairs:
        assert torch.equal(pair["items_ID"], frozen)
    assert not torch.equal(frozen, watched.tables[1, 0])
    assert all(torch.equal(watched.tables[2, epoch], frozen) for epoch in range(4))
    assert torch.equal(result.items_ID, frozen) and not result.model.training
    for name, weight in result.model.state_dict().items():
        assert torch.equal(weight, pairs[1][f"model.{name}"])
    assert not torch.equal(pairs[0]["model.word_table.weight"], pairs[1]["model.word_table.weight"])
    assert watched.rates[2][0] == 5e-4 and max(watched.rates[2]) == 1e-3  # after stage 1 had come down to zero
    assert 0 < watched.rates[1][-1] < 3e-4
    loaded = RecFormer.from_pretrained(tmp_path / "model")
    ranks = [text_ranks(each, texts, "test", items_ID=result.items_ID) for each in (loaded, result.model)]
    assert (ranks[0].kept.higher_U == ranks[1].kept.higher_U).all()


def test_one_schedule_for_both_stages_leaves_nothing_for_the_second(texts, tmp_path, monkeypatch):
    watched = Watched(monkeypatch, [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5])
    result = run(texts, tmp_path, replace(TRAINING, shared_schedule=True))
    assert set(watched.rates[2]) == {0.0}  # the published code's habit
    before, after = (load_file(tmp_path / stage / "best.safetensors") for stage in ("stage1", "stage2"))
    assert all(torch.equal(before[name], after[name]) for name in before) and result.best == 0.5


@pytest.mark.parametrize(
    ("values", "patience", "every", "evaluated", "saved"),
    [
        ([0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.9], 5, 1, [0, 1, 2, 3, 4, 5], [0]),
        ([0.5, 0.5, 0.6, 0.1, 0.1, 0.1], 3, 1, [0, 1, 2, 3, 4, 5], [0, 2]),  # an equal value is no better one
        ([0.5, 0.6, 0.7], 5, 3, [2, 5, 6], [2, 5, 6]),  # the last epoch is always evaluated
    ],
)
def test_patience_counts_evaluations(values, patience, every, evaluated, saved):
    stage, scripted, seen, kept = Stage(1, patience, 7, every), iter(values), [], []
    for epoch in range(7):
        if stage.evaluates(epoch):
            seen.append(epoch)
            kept += [epoch] if stage.observe(epoch, next(scripted)) else []
        if stage.is_over:
            break
    assert (seen, kept) == (evaluated, saved)
    second = Stage(2, 3, 7, every, best=stage.best)
    assert not second.observe(0, stage.best) and second.observe(1, stage.best + 0.1) and second.best_epoch == 1


@pytest.mark.parametrize("adapters", [None, {"rank": 2}])
def test_a_killed_run_equals_the_uninterrupted_one(texts, tmp_path, monkeypatch, adapters):
    training = replace(TRAINING, max_epochs=2, adapters=adapters)
    whole = run(texts, tmp_path / "whole", training)
    saves, real_save = [], module.SaveLast.on_train_epoch_end

    def killed_before_the(number):
        def save(self, trainer, network):
            if len(saves) == number:
                raise KeyboardInterrupt
            saves.append(self.path)
            real_save(self, trainer, network)

        return save

    for number in (1, 3):  # within stage 1, within stage 2
        monkeypatch.setattr(module.SaveLast, "on_train_epoch_end", killed_before_the(number))
        with pytest.raises(BaseException):  # noqa: B017
            run(texts, tmp_path / "killed", training)
    monkeypatch.undo()
    resumed = run(texts, tmp_path / "killed", training)
    assert (resumed.best, resumed.tokens) == (whole.best, whole.tokens)
    for name in ("stage", "epoch", "train_loss", "ndcg@10"):
        assert [entry[name] for entry in resumed.curve] == [entry[name] for entry in whole.curve]
    assert torch.equal(resumed.items_ID, whole.items_ID)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    again = run(texts, tmp_path / "killed", training)
    assert again.curve == resumed.curve
    with pytest.raises(InputError, match="was written for training="):
        run(texts, tmp_path / "killed", replace(training, num_negatives=5))


def test_without_two_stages_the_table_is_that_of_the_start(texts, tmp_path):
    settings = {"stages": (2,), "max_epochs": 1, "freeze": ("word_table",), "switched_off": ("type_table",)}
    result = run(texts, tmp_path, replace(TRAINING, num_negatives=20, learning_rate=1e-2, **settings))
    model = start()
    assert torch.equal(result.model.word_table.weight, model.word_table.weight)
    assert not result.model.type_table.weight.any()
    assert not torch.equal(result.model.position_table.weight, model.position_table.weight)
    torch.nn.init.zeros_(model.type_table.weight)
    assert torch.equal(result.items_ID, item_table(model, texts))
    with pytest.raises(InputError, match="freeze or switched_off names 'words'"):
        run(texts, tmp_path, replace(TRAINING, freeze=("words",)))


@pytest.mark.parametrize("num_negatives", [0, 20])
def test_item_vectors_may_be_trained_on_and_are_unit_vectors(texts, tmp_path, monkeypatch, num_negatives):
    settings = {"stages": (2,), "freeze": ("word_table",), "train_items": True, "num_negatives": num_negatives}
    training = replace(TRAINING, max_epochs=2, learning_rate=1e-2, **settings)
    result, before = run(texts, tmp_path / "whole", training), item_table(start(), texts)
    assert (result.items_ID[1:] - before[1:]).norm(dim=1).max() > 1e-2  # more than rounding: trained
    torch.testing.assert_close(result.items_ID[1:].norm(dim=1), torch.ones(len(before) - 1))
    assert not result.items_ID[0].any() and not torch.equal(result.items_ID, item_table(result.model, texts))
    convert(tmp_path / "whole" / "stage2" / "last.ckpt", tmp_path / "converted")  # the encoder alone
    assert RecFormer.from_pretrained(tmp_path / "converted").state_dict().keys() == result.model.state_dict().keys()
    fixed = run(texts, tmp_path / "fixed", replace(training, train_items=False))
    assert torch.equal(fixed.items_ID, before)
    last = [each.curve[1]["train_loss"] for each in (result, fixed)]
    assert last[0] < last[1] if num_negatives == 0 else last[0] != last[1]  # sampled losses are too noisy to compare

    saves, real_save = [], module.SaveLast.on_train_epoch_end

    def save_once(self, trainer, network):
        if saves:
            raise KeyboardInterrupt
        saves.append(self.path)
        real_save(self, trainer, network)

    monkeypatch.setattr(module.SaveLast, "on_train_epoch_end", save_once)
    with pytest.raises(BaseException):  # noqa: B017
        run(texts, tmp_path / "killed", training)
    monkeypatch.undo()
    assert torch.equal(run(texts, tmp_path / "killed", training).items_ID, result.items_ID)


def test_adapters_go_on_in_stage_two_and_the_model_found_is_a_plain_one(texts, tmp_path, monkeypatch):
    Watched(monkeypatch, [0.1, 0.2, 0.3, 0.4])
    adapters = {"targets": "attn_global", "rank": 2, "train_also": ["type_table"]}
    training = replace(TRAINING, max_epochs=2, learning_rate=1e-2, adapters=adapters)
    result, before = run(texts, tmp_path, training), start().eval().state_dict()
    plain = RecFormer.from_pretrained(tmp_path / "model")
    changed = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, before[name])}
    adapted = {
        f"blocks.{layer}.attention.{part}_global.weight" for layer in range(2) for part in ("query", "key", "value")
    }
    assert {"type_table.weight"} < changed <= {"type_table.weight", *adapted}
    for name in changed - {"type_table.weight"}:
        assert torch.linalg.matrix_rank(plain.state_dict()[name] - before[name], rtol=1e-4) <= 2
    for number in (1, 2):  # what others load is merged
        items_ID = load_pair(tmp_path / f"stage{number}" / "best.safetensors", loaded := RecFormer(SMALL))
        same = all(torch.equal(weight, plain.state_dict()[name]) for name, weight in loaded.state_dict().items())
        assert same == (number == 2) and torch.equal(items_ID, result.items_ID)
    again = load_adapters(start(), tmp_path / "model" / "adapters.safetensors")
    tables = [item_table(each, texts) for each in (again, plain, result.model)]
    torch.testing.assert_close(tables[0], tables[1], atol=1e-5, rtol=0)
    assert torch.equal(tables[1], tables[2]) and (tables[0] - item_table(start(), texts)).abs().max() > 1e-2


def test_parts_are_frozen_by_patterns_and_found_or_refused():
    model = start()
    frozen = module.trainable(model, replace(TRAINING, freeze=("blocks.*.attention.query", "word_table")))
    fixed = {name.removesuffix(".weight").removesuffix(".bias")
             for name, weight in frozen.named_parameters() if not weight.requires_grad}  # fmt: skip
    assert fixed == {"word_table", "blocks.0.attention.query", "blocks.1.attention.query"}
    assert all(weight.requires_grad for weight in model.parameters())
    with pytest.raises(InputError, match=r"names 'blocks.\*.queries'"):
        module.trainable(model, replace(TRAINING, freeze=("blocks.*.queries",)))
    with pytest.raises(ValueError, match="targets='attention'"):
        replace(TRAINING, adapters={"targets": "attention"})


def test_a_share_of_the_users_is_part_of_every_larger_share(texts):
    def chosen(share, seed=0, **settings):
        return set(np.flatnonzero(training_ends(texts, replace(TRAINING, train_share=share, **settings), seed)))

    assert [len(chosen(share)) for share in (0.01, 0.25, 0.5, 1.0)] == [1, 6, 12, 24]
    assert chosen(0.01) < chosen(0.25) < chosen(0.5) < chosen(1.0) and chosen(0.5) != chosen(0.5, seed=1)


def test_the_faithful_rules_change_the_validation_value(texts, monkeypatch):
    class Alone:
        global_rank, world_size = 0, 1

    model, (users, _) = start().eval(), texts.prepared.split.targets("validation")
    items_ID = item_table(model, texts)
    items_ID[1:200] = items_ID[1]  # ties
    training = replace(TRAINING, batch_size=14)
    values = [
        module.validate(model, texts, items_ID, replace(training, **settings), users, Alone)
        for settings in ({}, {"optimistic_ties": True}, {"batch_means": True})
    ]
    gains = module.per_user_metrics(text_ranks(model, texts, "validation", items_ID=items_ID).kept, ks=(10,))["ndcg@10"]
    by_batch = np.mean([gains[:7].mean(), gains[7:14].mean(), gains[14:21].mean(), gains[21:].mean()])
    assert values[0] == pytest.approx(gains.mean()) and values[2] == pytest.approx(by_batch)
    assert values[1] > 2 * values[0] and abs(values[2] - values[0]) > 1e-9
    assert replace(TRAINING, **FAITHFUL).empty_histories


@pytest.mark.parametrize("num_negatives", [0, 20])
def test_mixed_precision_is_close_to_fp32_and_its_loss_is_fp32(texts, tmp_path, num_negatives):
    training = replace(TRAINING, stages=(2,), max_epochs=1, num_negatives=num_negatives)
    curves = [run(texts, tmp_path / each, replace(training, precision=each)).curve for each in ("32", "bf16-mixed")]
    losses = [curve[0]["train_loss"] for curve in curves]
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-3)
    vectors_BD, found = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), []
    network = torch.nn.Module()
    network.encode, network.config = lambda *_: vectors_BD, SMALL
    step = module.TwoStageModule(network, training, 0, 2, 1, (0, None))
    step._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, current_epoch=0, global_rank=0)
    step.items_ID = torch.nn.functional.normalize(torch.randn(31, 16, generator=torch.Generator().manual_seed(1)))
    batch = {"step": 0, "part": 0, "rows_in_step": 4, "targets_B": torch.arange(1, 5),
             "history": dict.fromkeys(module.PACKED, torch.ones(4, dtype=torch.long))}  # fmt: skip
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found.append(step.training_step(batch, 0))
    assert torch.equal(*found)


@pytest.mark.parametrize("settings", [{"train_share": 0.0}, {"stages": (2, 1)}, {"evaluate_every": 0},
                                      {"shared_schedule": True, "strategy": "fsdp"}, {"train_items": True},
                                      {"train_items": True, "stages": (2,), "strategy": "fsdp"}])  # fmt: skip
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(ValueError, match="expected"):
        replace(TRAINING, **settings)
