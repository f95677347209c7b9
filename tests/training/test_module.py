"""The training step: global means, fresh negatives that repeat with the seed, decay on matrices alone."""

import pytest
import torch

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.training.module import SequenceModule, TrainingConfig

CONFIG = SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "hinge"}, "loss='hinge': expected one of"),
        ({"negatives": "in_batch"}, "needs loss='sampled_softmax'"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"objective": "previous_item"}, "objective='previous_item'"),
    ],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(**settings)


def negatives_of(seed: int, step: int, **settings) -> torch.Tensor:
    module = SequenceModule(SASRec(CONFIG), TrainingConfig(loss="gbce", num_negatives=5, **settings), seed)
    module._trainer = None
    items = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    return _drawn(module, torch.tensor([2, 3, 4, 9, 6, 7]), items, step)


def _drawn(module, targets, items, step):
    type(module).current_epoch = property(lambda self: 0)
    type(module).global_rank = property(lambda self: 0)
    try:
        return module._negatives(targets, items, 30, step)
    finally:
        del type(module).current_epoch, type(module).global_rank


def test_negatives_repeat_with_seed_and_step_and_never_are_padding():
    first = negatives_of(0, 0)
    assert first.shape == (6, 5) and first.min() >= 1 and first.max() <= 30
    assert (first == negatives_of(0, 0)).all()
    assert (first != negatives_of(0, 1)).any() and (first != negatives_of(1, 0)).any()


def test_rejected_negatives_avoid_the_rows_own_history():
    drawn = torch.stack([negatives_of(0, step, reject_history=True) for step in range(40)])
    assert not torch.isin(drawn[:, :4], torch.tensor([1, 2, 3, 4])).any()
    assert not torch.isin(drawn[:, 4:], torch.tensor([5, 6])).any()
    plain = torch.stack([negatives_of(0, step) for step in range(40)])
    assert torch.isin(plain[:, :4], torch.tensor([1, 2, 3, 4])).any()


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay():
    module = SequenceModule(SASRec(CONFIG), TrainingConfig(weight_decay=0.1), seed=0)
    groups = module.configure_optimizers().param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in module.parameters())
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() < 2 for p in groups[1]["params"])
