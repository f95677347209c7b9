"""Two processes train what one trains: same histories, same gradient, same validation value."""

from dataclasses import replace

import pytest
from safetensors.torch import load_file

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.schema import InputError
from textrec.seeding import seed_everything
from textrec.training.launch import fit_in_processes, main
from textrec.training.module import TrainingConfig
from textrec.training.trainer import fit

CONFIG = SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16, dropout=0.0, attention_dropout=0.0)
TRAINING = TrainingConfig(batch_size=16, learning_rate=1e-2, max_epochs=2, patience=6)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["full_softmax", "sampled_softmax"])
def test_two_processes_equal_one(ring, tmp_path, monkeypatch, loss):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = replace(TRAINING, loss=loss, num_negatives=6)
    seed_everything(0)
    single = fit(SASRec(CONFIG), ring, training, seed=0, folder=tmp_path / "one")
    (tmp_path / "two").mkdir()
    double = fit_in_processes(
        "SASRec", CONFIG, training, ring, seed=0, folder=tmp_path / "two", device="cpu", devices=2
    )
    for one, two in zip(single.curve, double.curve, strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-5)
        assert two["ndcg@10"] == pytest.approx(one["ndcg@10"], abs=1e-9)
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two")]
    for name in weights[0]:
        if name.endswith("key.bias"):
            continue  # its true gradient is zero: Adam makes full steps of rounding noise
        assert (weights[0][name] - weights[1][name]).abs().max() < 1e-5, name
    assert (weights[0]["item_table.weight"] - SASRec(CONFIG).item_table.weight).abs().max() > 1e-3  # it did train


def test_a_missing_description_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match="expected the launch.json of a run"):
        main(tmp_path / "launch.json")
