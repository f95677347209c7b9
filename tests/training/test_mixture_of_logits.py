"""A model scored by a mixture of logits is trained, ranked, saved and asked as any other."""

import dataclasses

import pytest
import torch

from textrec.evaluation.metrics import mean_metrics
from textrec.models.hstu import HSTU, HSTUConfig
from textrec.models.item_table import attach
from textrec.models.sequence_model import SequenceModel
from textrec.seeding import seed_everything
from textrec.training.module import SequenceModule, TrainingConfig
from textrec.training.trainer import evaluate, fit

CONFIG = HSTUConfig(
    num_items=30, max_sequence_length=8, embedding_dim=16, linear_dim=8, attention_dim=8, dropout=0.1,
    time_bias=False, mixture_groups=(2, 2),
)  # fmt: skip
TRAINING = TrainingConfig(
    loss="sampled_softmax",
    num_negatives=16,
    batch_size=4,
    learning_rate=1e-2,
    max_epochs=15,
    patience=15,
    validate_every=5,
)


def quality(model, prepared) -> float:
    return mean_metrics(evaluate(model, prepared, "test").filtered, (5,))["ndcg@5"]


def test_it_learns_and_comes_back_from_disk(ring, tmp_path):
    seed_everything(0)
    model = HSTU(CONFIG)
    untrained = quality(model, ring)
    trained = fit(model, ring, TRAINING, seed=0, folder=tmp_path / "run").model
    assert quality(trained, ring) > max(2 * untrained, 0.6)
    trained.save_pretrained(tmp_path / "saved")
    loaded = SequenceModel.from_pretrained(tmp_path / "saved")
    history = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        scores_I = loaded.scores(loaded.encode(history), loaded.item_vectors())[0]
        products_I = loaded.encode(history)[0] @ loaded.item_vectors().T
    best = loaded.recommend([4, 5, 6], 3, filter_seen=False)
    assert [item for item, _ in best] == (scores_I[1:].topk(3).indices + 1).tolist()
    assert scores_I[1:].argsort().tolist() != products_I[1:].argsort().tolist()


def test_given_item_vectors_are_mixed_too(ring):
    given_IE = torch.randn(31, 16).index_fill(0, torch.tensor([0]), 0.0)
    wrapped = attach(HSTU(CONFIG), given_IE, adaptor="linear").eval()
    users_BD, items_ID = torch.randn(2, 16), wrapped.item_vectors()
    torch.testing.assert_close(wrapped.scores(users_BD, items_ID), wrapped.model.scores(users_BD, items_ID))
    assert (wrapped.scores(users_BD, items_ID) - users_BD @ items_ID.T).abs().max() > 1e-2


@pytest.mark.parametrize("wrong", [{"loss": "full_softmax"}, {"share_negatives": False}])
def test_a_loss_it_is_not_trained_with_is_refused(wrong):
    with pytest.raises(ValueError, match="a mixture of logits is trained with loss='sampled_softmax'"):
        SequenceModule(HSTU(CONFIG), dataclasses.replace(TRAINING, **wrong), seed=0)
