"""AdamW's groups and the schedule of the text models."""

import pytest
import torch

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.training.module import SequenceModule, TrainingConfig
from textrec.training.optimizers import adamw_with_linear_decay
from textrec.training.pretraining import PretrainingConfig


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay():
    module = SequenceModule(SASRec(SASRecConfig(num_items=30)), TrainingConfig(weight_decay=0.1), seed=0)
    groups = module.configure_optimizers().param_groups
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(p.numel() for p in module.parameters())
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.dim() >= 2 for p in groups[0]["params"]) and all(p.dim() < 2 for p in groups[1]["params"])


def test_the_rate_falls_to_zero_without_a_jump():
    training = PretrainingConfig(max_steps=500, warmup_steps=2)
    schedule = adamw_with_linear_decay(torch.nn.Linear(2, 2), training, 8)["lr_scheduler"]["scheduler"]
    factors = [schedule.lr_lambdas[0](step) for step in range(10)]
    assert factors == pytest.approx([1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0, 0])
