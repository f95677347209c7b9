"""Pretraining and finetuning in two processes give what one process gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.text_sets import SMALL, brand_set

from textrec.data.item_text import item_attributes, shuffled_texts
from textrec.data.tokenizing import train_tokenizer
from textrec.models.recformer import RecFormer, RecFormerForPretraining
from textrec.schema import InputError
from textrec.training import text_launch
from textrec.training.consolidation import consolidate, convert
from textrec.training.launch import launch
from textrec.training.pretraining import PretrainingConfig, pretrain
from textrec.training.text_launch import _told, _written, pretrain_in_processes, two_stage_here, two_stage_in_processes
from textrec.training.text_ranking import TextSet
from textrec.training.two_stage import TwoStageConfig, two_stage

STILL = replace(SMALL, dropout=0.0, attention_dropout=0.0)
PRETRAINING = PretrainingConfig(
    max_steps=4, batch_size=16, accumulate=2, learning_rate=1e-3, validate_every_steps=2, validation_batch=8
)
FINETUNING = TwoStageConfig(max_epochs=2, batch_size=16, accumulate=2, learning_rate=1e-3, warmup_steps=0)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> list[TextSet]:
    folder = tmp_path_factory.mktemp("sets")
    prepared = [brand_set(folder / str(seed), seed, num_users=25) for seed in range(3)]
    tokenizer = train_tokenizer(item_attributes(prepared[0].catalogue), 400)
    return [TextSet.of(each, tokenizer) for each in prepared]


def close(one: list[dict], two: list[dict], names: tuple[str, ...]) -> None:
    """Losses agree closely; ranks of a hardly trained model are near-ties, which rounding may turn."""
    assert len(one) == len(two)
    for name in names:
        within = 1e-4 if "loss" in name or "contrast" in name or "mlm" in name else 0.05
        values = [[entry.get(name, 0.0) for entry in curve] for curve in (one, two)]  # not every epoch is validated
        assert values[0] == pytest.approx(values[1], rel=1e-4, abs=within), name


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_what_one_does(sets, tmp_path):
    torch.manual_seed(0)
    start = RecFormerForPretraining(STILL)
    encoder = RecFormer(STILL)
    encoder.load_state_dict(start.encoder.state_dict())
    given = {"seed": 0, "held_out": sets[1], "zero_shot": sets[2]}
    two = pretrain_in_processes(start, sets[:1], PRETRAINING, folder=tmp_path / "two", devices=2, **given)
    one = pretrain(start, sets[:1], PRETRAINING, folder=tmp_path / "one", **given)
    close(one.curve[1:], two.curve[1:], ("train_contrast", "train_mlm", "train_in_batch"))
    close(one.curve[::2], two.curve[::2], ("in_batch", "validation_contrast", "ndcg@10"))
    assert one.tokens == two.tokens
    once = replace(FINETUNING, evaluate_every=2)  # no choice between epochs that are near-ties
    two = two_stage_in_processes(encoder, sets[0], once, seed=0, folder=tmp_path / "both", devices=2)
    one = two_stage(encoder, sets[0], once, seed=0, folder=tmp_path / "alone")
    close(one.curve, two.curve, ("train_loss", "ndcg@10"))
    torch.testing.assert_close(one.items_ID, two.items_ID, rtol=0, atol=1e-4)
    trained = replace(FINETUNING, stages=(2,), max_epochs=1, train_items=True)
    two = two_stage_in_processes(encoder, sets[0], trained, seed=0, folder=tmp_path / "both_items", devices=2)
    one = two_stage(encoder, sets[0], trained, seed=0, folder=tmp_path / "own_items")
    close(one.curve, two.curve, ("train_loss", "ndcg@10"))
    torch.testing.assert_close(one.items_ID, two.items_ID, rtol=0, atol=1e-4)


SHARES = ["fsdp", *(f"deepspeed_stage_{stage}" for stage in (1, 2, 3))]
FEW = replace(PRETRAINING, max_steps=2, learning_rate=5e-5)
ONCE = replace(FINETUNING, stages=(1,), max_epochs=1)


@pytest.fixture(scope="module")
def single(sets, tmp_path_factory):
    """Where training starts, and what one process makes of it in a pretraining and in a finetuning."""
    torch.manual_seed(0)
    start, folder = RecFormerForPretraining(STILL), tmp_path_factory.mktemp("single")
    start.save_pretrained(folder / "start")
    few = pretrain(start, sets[:1], FEW, seed=0, folder=folder / "pretrained", held_out=sets[1])
    once = two_stage(_start(folder).encoder, sets[0], ONCE, seed=0, folder=folder / "finetuned")
    return folder, few, once


@pytest.fixture
def all_cut(monkeypatch):
    """Launch `text_here`, where ZeRO 3 leaves no parameter whole, however small."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    def launch_cut(target: str, arguments: dict, *place):
        name = target.split(":")[1]
        return launch("training.distributed_script:text_here", arguments | {"target": name}, *place)

    monkeypatch.setattr(text_launch, "launch", launch_cut)


def _start(folder) -> RecFormerForPretraining:
    return RecFormerForPretraining.from_pretrained(folder / "start")


def apart(one: dict, two: dict) -> float:
    """Return the largest difference, but for numbers whose true gradient is nil, where Adam steps along the noise.

    Those are key biases and, by chance, a single number of a table; `furthest` bounds what Adam can make of it.
    """
    assert one.keys() == two.keys()
    names = [name for name in one if ".key" not in name or "bias" not in name]
    flat = [(one[name] - two[name]).abs().flatten().sort(descending=True).values for name in names]
    return max(each[int(len(each) > 50)].item() for each in flat)


def furthest(one: dict, two: dict) -> float:
    """Return the largest difference of all numbers: none moves by more than a rate a step, in either run."""
    return max((one[name] - two[name]).abs().max().item() for name in one)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", SHARES)
def test_shares_of_a_model_are_pretrained_as_the_whole(sets, single, all_cut, tmp_path, strategy):
    if strategy != "fsdp":
        pytest.importorskip("deepspeed")
    folder, one, _ = single
    training = replace(FEW, strategy=strategy)
    two = pretrain_in_processes(
        _start(folder), sets[:1], training, seed=0, folder=tmp_path, held_out=sets[1], devices=2
    )
    whole = consolidate(folder / "pretrained" / "last.ckpt")
    found = consolidate(tmp_path / "last.ckpt")
    assert apart(whole, found) < 1e-5 < 5e-5 < apart(whole, _start(folder).state_dict())
    assert furthest(whole, found) <= 2 * FEW.max_steps * FEW.learning_rate
    convert(tmp_path / "last.ckpt", tmp_path / "converted")  # from shards, the frozen word table among them
    converted = RecFormerForPretraining.from_pretrained(tmp_path / "converted")
    assert apart(whole, converted.state_dict()) < 1e-5
    assert torch.equal(converted.encoder.word_table.weight, _start(folder).encoder.word_table.weight)
    close(one.curve[1:], two.curve[1:], ("train_contrast", "train_mlm", "validation_contrast"))
    assert apart(two.model.state_dict(), one.model.state_dict()) < 1e-5 and one.tokens == two.tokens


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", SHARES)
def test_shares_of_a_model_are_finetuned_as_the_whole(sets, single, all_cut, tmp_path, strategy):
    if strategy != "fsdp":
        pytest.importorskip("deepspeed")
    folder, _, one = single
    training, encoder = replace(ONCE, strategy=strategy), _start(folder).encoder
    two = two_stage_in_processes(encoder, sets[0], training, seed=0, folder=tmp_path, devices=2)
    whole = consolidate(folder / "finetuned" / "stage1" / "last.ckpt")
    found = consolidate(tmp_path / "stage1" / "last.ckpt")
    assert apart(whole, found) < 1e-5 < 1e-3 < apart(whole, _start(folder).encoder.state_dict())
    assert furthest(whole, found) <= 2 * 2 * ONCE.learning_rate  # two steps
    close(one.curve, two.curve, ("train_loss", "ndcg@10"))
    torch.testing.assert_close(one.items_ID, two.items_ID, rtol=0, atol=1e-5)
    assert apart(two.model.state_dict(), one.model.state_dict()) < 1e-5


def test_other_texts_than_the_catalogues_are_refused(sets, tmp_path):
    attributes = shuffled_texts(item_attributes(sets[0].prepared.catalogue), 0)
    mixed = TextSet.of(sets[0].prepared, sets[0].tokenizer, attributes=attributes)
    arguments = _written(RecFormer(STILL), mixed, tmp_path, FINETUNING, 0, "cpu") | {"texts": _told(mixed)}
    with pytest.raises(InputError, match="was given other texts than its catalogue's"):
        two_stage_here(**arguments)
