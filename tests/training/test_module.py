"""The training step: global means, fresh negatives that repeat with the seed, decay on matrices alone."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.seeding import seed_everything
from textrec.training.module import SequenceModule, TrainingConfig
from textrec.training.presets import CONTROLS, PRESETS
from textrec.training.trainer import fit

CONFIG = SASRecConfig(num_items=30, max_sequence_length=8, embedding_dim=16)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "hinge"}, "loss='hinge': expected one of"),
        ({"negatives": "in_batch"}, "needs loss='sampled_softmax'"),
        ({"negatives": "outside_history", "loss": "gbce"}, "'outside_history' needs loss='sampled_softmax'"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"objective": "previous_item"}, "objective='previous_item'"),
    ],
)
def test_settings_are_checked(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingConfig(**settings)


ITEMS, TARGETS = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]), torch.tensor([2, 3, 4, 9, 6, 7])


def negatives_of(seed: int, step: int, **settings) -> torch.Tensor:
    module = SequenceModule(SASRec(CONFIG), TrainingConfig(loss="gbce", num_negatives=5, **settings), seed)
    return outside_a_trainer(module, lambda: module._negatives(TARGETS, ITEMS, 30, step))


def outside_a_trainer(module, function):
    module._trainer = None
    type(module).current_epoch = property(lambda self: 0)
    type(module).global_rank = property(lambda self: 0)
    try:
        return function()
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


@pytest.mark.parametrize(("num_negatives", "drawn"), [(5, [5, 5]), (60, [25, 27])])
def test_negatives_outside_the_history_are_distinct_and_neither_read_nor_predicted(num_negatives, drawn):
    """A catalogue of 30: rows that hold 5 and 3 of it, what they predict last included; too many asked for are all."""
    training = TrainingConfig(loss="sampled_softmax", negatives="outside_history", num_negatives=num_negatives)
    module = SequenceModule(SASRec(CONFIG), training, 0)
    rows_T = torch.tensor([0, 0, 0, 0, 1, 1])
    masks = [outside_a_trainer(module, lambda s=step: module._drawn_outside(TARGETS, rows_T, ITEMS, 31, s, 0))
             for step in (0, 0, *range(1, 40))]  # fmt: skip
    assert (masks[0] == masks[1]).all() and all(mask.sum(1).tolist() == drawn for mask in masks)
    ever_BI = torch.stack(masks).any(0)
    allowed = [{*range(1, 31)} - {1, 2, 3, 4, 9}, {*range(1, 31)} - {5, 6, 7}]
    assert [set(row.nonzero().flatten().tolist()) for row in ever_BI] == allowed


TRAININGS = {  # every way in which a preset computes its loss, by the first row that does
    str(asdict(TrainingConfig(**preset.training_settings)) | {"max_epochs": 0, "patience": 0, "adam_betas": 0}): row
    for row, preset in reversed(PRESETS.items()) if preset.model not in CONTROLS
}  # fmt: skip


@pytest.mark.parametrize("row", sorted(TRAININGS.values()))
def test_mixed_precision_trains_every_loss_of_the_presets_close_to_fp32(ring, tmp_path, row):
    preset = PRESETS[row]
    settings = preset.training_settings | {"max_epochs": 1, "batch_size": 40}
    curves = []
    for precision in ("32", "bf16-mixed"):
        seed_everything(0)
        model = _model(preset.model)
        training = TrainingConfig(**settings | {"precision": precision})
        curves.append(fit(model, ring, training, seed=0, folder=tmp_path / precision).curve)
    losses = [curve[0]["train_loss"] for curve in curves]
    assert len(curves[1]) == 1 and losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=2e-3)


def _model(name: str):
    from textrec.training.rows import model_class

    kind = model_class(name)
    return kind(kind.config_class(num_items=30, max_sequence_length=8, embedding_dim=16))


class Fixed(torch.nn.Module):
    """States and items that are there already, in fp32: nothing is left to mixed precision but the loss."""

    similarity = None

    def __init__(self, num_positions: int):
        super().__init__()
        source = torch.Generator().manual_seed(0)
        self.hidden_TD = torch.nn.Parameter(torch.randn(num_positions, 16, generator=source))
        self.items_ID = torch.nn.Parameter(torch.randn(31, 16, generator=source))

    def forward(self, items_BL):
        return self.hidden_TD

    def item_vectors(self):
        return self.items_ID


@pytest.mark.parametrize("row", sorted(TRAININGS.values()))
def test_the_loss_itself_is_that_of_fp32_but_for_the_products_of_the_full_softmax(row):
    items_BL = torch.randint(1, 31, (6, 8), generator=torch.Generator().manual_seed(1))
    batch, found = {"step": 0, "items": items_BL, "targets": items_BL.roll(1)}, []
    for mixed in (False, True):
        network = Fixed(items_BL.numel())
        module = SequenceModule(network, TrainingConfig(**PRESETS[row].training_settings), 0, torch.arange(31))
        module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, current_epoch=0, global_rank=0)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = module.training_step(batch, 0)
        loss.backward()
        found.append((loss.detach(), network.hidden_TD.grad, network.items_ID.grad))
    exact, mixed = found
    if PRESETS[row].training_settings.get("loss", "full_softmax") == "full_softmax":
        for one, other in zip(exact, mixed, strict=True):  # of rounded products, summed up in fp32
            assert other.dtype == torch.float32 and 0 < (other - one).norm() < 1e-2 * one.norm()
    else:
        assert all(torch.equal(*pair) for pair in zip(exact, mixed, strict=True)) and exact[1].any()


def gradients(model, items_BL, targets_BL, objective) -> list[torch.Tensor]:
    module = SequenceModule(model.eval(), TrainingConfig(objective=objective), 0)
    module._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, current_epoch=0, global_rank=0)
    loss = module.training_step({"items": items_BL, "targets": targets_BL, "step": 0}, 0)
    return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]


@pytest.mark.parametrize(("name", "objective"), [("SASRec", "next_item"), ("BERT4Rec", "masked_item")])
def test_pads_have_no_part_in_loss_and_gradients(name, objective):
    model, next_item = _model(name), objective == "next_item"
    items = torch.tensor([[0, 0, 3, 4, 5], [7, 8, 9, 1, 2]])
    targets = torch.tensor([[0, 0, 4 * next_item, 6, 7], [8, 9, 1, 4 * next_item, 3]])
    expected = gradients(model, items, targets, objective)
    padded = [torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1) for x in (items, targets)]
    for found, wanted in zip(gradients(model, *padded, objective), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    padded[0][0, 0], padded[1][0, 0] = 1, 2  # a pad that counted would move both
    changed = gradients(model, *padded, objective)
    assert abs(changed[0] - expected[0]) > 1e-3
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(changed[1:], expected[1:], strict=True))
