"""Shards that two processes wrote become the model they trained, frozen parameters included."""

import shutil
from pathlib import Path

import pytest
import torch
from training.conftest import write_ring
from training.distributed_script import CONFIG, train
from training.text_sets import SMALL, brand_set

from textrec.data.item_text import item_attributes
from textrec.data.tokenizing import train_tokenizer
from textrec.models.recformer import RecFormer, RecFormerForPretraining
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.models.sequence_model import SequenceModel
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.consolidation import consolidate, convert, read_zero
from textrec.training.launch import launch
from textrec.training.pretraining import PretrainingConfig, pretrain
from textrec.training.text_ranking import TextSet, text_ranks
from textrec.training.two_stage import TwoStageConfig, two_stage

STAGES = ["deepspeed_stage_2", "deepspeed_stage_3"]


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    """One epoch of two processes with a frozen item table, so that the best model is the last one."""
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("zero")
    prepared = write_ring(folder / "ring")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        arguments = {"prepared": str(prepared.folder), "folder": str(folder), "names": STAGES, "frozen": True}
        launch("training.distributed_script:train", arguments | {"max_epochs": 1}, folder, 2)
    return folder


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_shards_of_two_processes_become_one_model(zero, stage, tmp_path):
    checkpoint = zero / stage / "last.ckpt"
    assert len(list(checkpoint.glob("*/*_optim_states.pt"))) == 2
    best, weights = SASRec.from_pretrained(zero / stage / "model"), consolidate(checkpoint)
    assert weights.keys() == best.state_dict().keys()
    for name, value in best.state_dict().items():
        assert torch.equal(value, weights[name]), name
    seed_everything(0)
    first = SASRec(CONFIG)
    assert torch.equal(weights["item_table.weight"], first.item_table.weight)  # frozen, and there
    assert not torch.equal(weights["blocks.0.feed_forward.enter.weight"], first.blocks[0].feed_forward.enter.weight)
    convert(checkpoint, tmp_path / "converted")
    model = SequenceModel.from_pretrained(tmp_path / "converted")
    assert isinstance(model, SASRec) and model.recommend([3, 4, 5], k=5) == best.recommend([3, 4, 5], k=5)


@pytest.mark.distributed
@pytest.mark.slow
def test_what_the_conversion_drops_is_put_back(zero, monkeypatch):
    """A checkpoint without the record of frozen parameters, as older versions wrote it, still holds their values."""
    from deepspeed.utils import zero_to_fp32

    checkpoint = zero / "deepspeed_stage_2" / "last.ckpt"
    whole = consolidate(checkpoint)
    monkeypatch.setattr(zero_to_fp32, "_zero2_merge_frozen_params", lambda *args: None)
    assert "model.item_table.weight" not in zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    assert torch.equal(consolidate(checkpoint)["item_table.weight"], whole["item_table.weight"])


@pytest.mark.distributed
@pytest.mark.slow
def test_moments_are_joined_as_weights_are(zero):
    found = [read_zero(zero / stage / "last.ckpt") for stage in STAGES]
    assert [each.steps.item() for each in found] == [3, 3]
    for key in ("exp_avg", "exp_avg_sq"):
        two, three = (each.moments[key] for each in found)
        assert two.keys() == three.keys() and "model.item_table.weight" not in two
        for name in two:
            torch.testing.assert_close(two[name], three[name], rtol=1e-3, atol=1e-7)
        assert max(value.abs().max() for value in two.values()) > 1e-5


@pytest.mark.distributed
@pytest.mark.slow
def test_a_missing_shard_is_one_sentence(zero, tmp_path):
    checkpoint = shutil.copytree(zero / "deepspeed_stage_2" / "last.ckpt", tmp_path / "last.ckpt")
    next(checkpoint.glob("*/*rank_1*_optim_states.pt")).unlink()
    with pytest.raises(InputError, match="is not whole: Expected 2"):
        consolidate(checkpoint)


def test_a_single_file_is_converted_too(ring, tmp_path):
    train(str(ring.folder), str(tmp_path), ["auto"], max_epochs=1)
    convert(tmp_path / "auto" / "last.ckpt", tmp_path / "converted")
    best, converted = (
        SASRec.from_pretrained(folder) for folder in (tmp_path / "auto" / "model", tmp_path / "converted")
    )
    assert all(torch.equal(value, converted.state_dict()[name]) for name, value in best.state_dict().items())


def test_mistakes_are_one_sentence(ring, tmp_path):
    with pytest.raises(InputError, match="is no checkpoint: expected a training's file or ZeRO's folder"):
        consolidate(tmp_path)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="holds no state_dict"):
        consolidate(tmp_path / "other.pt")
    train(str(ring.folder), str(tmp_path), ["auto"], max_epochs=1)
    SASRec(SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16)).save_pretrained(tmp_path / "wider")
    with pytest.raises(InputError, match=r"last.ckpt does not fit SASRec: of another shape: .* \(15,\) for \(16,\)"):
        convert(tmp_path / "auto" / "last.ckpt", tmp_path / "converted", like=tmp_path / "wider")
    torch.save({"state_dict": {}, "callbacks": {}}, tmp_path / "foreign.ckpt")
    (tmp_path / "garbage.ckpt").write_bytes(b"no checkpoint")
    (tmp_path / "garbage.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "table.csv").write_text("brand,price\n")  # its first letter is an instruction of a pickle
    (tmp_path / "empty.ckpt").touch()
    whole = (tmp_path / "auto" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    for name, message in (
        *((f"garbage.{suffix}", "cannot be read") for suffix in ("ckpt", "safetensors")),
        *((name, "cannot be read") for name in ("table.csv", "empty.ckpt", "cut.ckpt")),
        ("other.pt", "holds no state_dict"), ("foreign.ckpt", "holds no saved model"), ("ring", "holds no weights"),
        ("neither/here/nor/there", "no pretrained model"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            convert(tmp_path / name, tmp_path / "converted")
    assert not list(tmp_path.glob("converted*"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="mine exists: expected the name of a new folder"):
        convert(tmp_path / "auto" / "last.ckpt", tmp_path / "mine")


def test_text_models_know_their_shape(tmp_path, monkeypatch):
    """With a model of another shape beside them, and without any: the last model, its tokenizer and its ranks."""
    prepared = [brand_set(tmp_path / str(seed), seed, num_users=12) for seed in range(2)]
    tokenizer = train_tokenizer(item_attributes(prepared[0].catalogue), 400)
    sets = [TextSet.of(each, tokenizer) for each in prepared]
    settings = {"max_steps": 2, "batch_size": 8, "validate_every_steps": 2, "validation_batch": 8, "select_by": "last"}
    seed_everything(0)
    start = RecFormerForPretraining(SMALL)
    pretrained = pretrain(start, sets[:1], PretrainingConfig(learning_rate=1e-2, **settings), seed=0,
                          folder=tmp_path / "pretrained", held_out=sets[1])  # fmt: skip
    convert(tmp_path / "pretrained" / "last.ckpt", tmp_path / "one")
    one = RecFormerForPretraining.from_pretrained(tmp_path / "one")
    assert (tmp_path / "one" / "tokenizer.json").is_file()
    training = TwoStageConfig(stages=(1,), max_epochs=1, batch_size=8, learning_rate=1e-2, warmup_steps=0)
    finetuned = two_stage(one.encoder, sets[0], training, seed=0, folder=tmp_path / "finetuned")
    convert(tmp_path / "finetuned" / "stage1" / "last.ckpt", tmp_path / "two")
    two = RecFormer.from_pretrained(tmp_path / "two")
    assert (tmp_path / "two" / "tokenizer.json").is_file()
    for converted, expected in ((one.encoder, pretrained.model.encoder), (two, finetuned.model)):
        assert all(torch.equal(value, converted.state_dict()[name]) for name, value in expected.state_dict().items())
        ranks = [text_ranks(each, sets[1], "test").kept.higher_U for each in (converted, expected)]
        assert (ranks[0] == ranks[1]).all() and ranks[0].any()
    assert torch.equal(one.head.decoder.weight, pretrained.model.head.decoder.weight)
    assert not torch.equal(two.blocks[0].enter.weight, one.encoder.blocks[0].enter.weight)
    assert not list(tmp_path.glob("*.partial-*"))

    def killed(self, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(RecFormer, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "finetuned" / "stage1" / "last.ckpt", tmp_path / "three")
    assert not list(tmp_path.glob("three*"))
