"""The pretraining losses: values worked out by hand, copies of a target, no masked word, and processes' gradients."""

import math
import multiprocessing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training.text_sets import SMALL

from textrec.models.recformer import RecFormerForPretraining
from textrec.training import contrastive
from textrec.training.contrastive import item_contrast, pretraining_sums

DIFFERENT = torch.tensor([1, 2])


def test_two_rows_by_hand():
    users_BD, items_BD = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    loss, correct = item_contrast(users_BD, items_BD, DIFFERENT, 0.05)
    assert loss.item() / 2 == pytest.approx(0.0014269931, abs=1e-7) and correct == 2  # scores 20, 14.14; 0, 14.14
    loss, correct = item_contrast(users_BD, users_BD.flip(0), DIFFERENT, 0.05)
    assert loss.item() / 2 == pytest.approx(20.0000000021, abs=1e-5) and correct == 0


def test_a_copy_of_ones_own_target_is_no_negative_unless_it_is_to_be():
    users_BD = items_BD = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    same = torch.tensor([7, 7, 8])
    masked, correct = item_contrast(users_BD, items_BD, same, 1.0)
    kept, _ = item_contrast(users_BD, items_BD, same, 1.0, mask_duplicates=False)
    one_other, two_others = math.log(1 + math.exp(-1)), math.log(2 + math.exp(-1))
    assert masked.item() == pytest.approx(2 * one_other + math.log(1 + 2 * math.exp(-1))) and correct == 3
    assert kept.item() == pytest.approx(2 * two_others + math.log(1 + 2 * math.exp(-1)))


def batch(labels: list[int]) -> dict:
    view = {
        "token_ids_T": torch.tensor([0, 5, 6, 0, 7]), "type_ids_T": torch.tensor([0, 1, 2, 0, 1]),
        "item_positions_T": torch.tensor([0, 1, 1, 0, 1]), "lengths_B": torch.tensor([3, 2]),
        "masked_ids_T": torch.tensor([0, 5, 9, 0, 7]), "labels_T": torch.tensor(labels),
    }  # fmt: skip
    return {"history": view, "item": view, "targets_B": DIFFERENT}


def test_uniform_guesses_cost_the_logarithm_of_the_vocabulary_and_no_mask_costs_nothing():
    torch.manual_seed(0)
    model = RecFormerForPretraining(replace(SMALL, vocabulary_size=50_265)).eval()
    torch.nn.init.zeros_(model.head.decoder.weight)
    sums = pretraining_sums(model, batch([-100, -100, 6, -100, 7]))
    assert sums["masked_history"] == sums["masked_item"] == 2 and sums["tokens"] == 10 and sums["rows"] == 2
    assert sums["mlm_history"].item() / 2 == pytest.approx(10.8250643, abs=1e-5)
    nothing = pretraining_sums(model, batch([-100] * 5))
    loss = nothing["mlm_history"] + nothing["mlm_item"]
    loss.backward()
    assert loss == 0 and nothing["masked_item"] == 0
    assert torch.equal(model.head.dense.weight.grad, torch.zeros_like(model.head.dense.weight))
    skipped = pretraining_sums(model, batch([-100, -100, 6, -100, 7]), masked_words=False)
    assert skipped["masked_history"] == 0 and skipped["contrast"].item() == sums["contrast"].item()


def test_the_contrast_is_that_of_fp32_under_mixed_precision():
    vectors = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    model = SimpleNamespace(encoder=SimpleNamespace(encode=lambda *_: vectors), config=SMALL)
    plain = pretraining_sums(model, batch([-100] * 5), masked_words=False)["contrast"]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = pretraining_sums(model, batch([-100] * 5), masked_words=False)["contrast"]
        rounded, _ = item_contrast(vectors[:2], vectors[2:], DIFFERENT, SMALL.temperature)
    assert torch.equal(mixed, plain) and not torch.equal(rounded, plain)


ROWS, WIDTH, PROCESSES = 8, 5, 4


def weight_gradient(weight: torch.Tensor, rows: slice) -> torch.Tensor:
    """The gradient of the mean over all rows, as a process computes it that has some of them."""
    source = torch.Generator().manual_seed(1)
    users, items = torch.randn(2, ROWS, WIDTH, generator=source)
    weight = weight.clone().requires_grad_()
    targets = torch.tensor([1, 2, 3, 1, 5, 6, 7, 8])
    loss, _ = item_contrast(users[rows] @ weight, items[rows] @ weight, targets[rows], 0.2)
    (loss / ROWS).backward()
    return weight.grad


def process(rank: int, store: str, weight: torch.Tensor, corrected: bool) -> None:
    torch.set_num_threads(1)
    where = {"rank": rank, "world_size": PROCESSES}
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", **where)
    if not corrected:  # what the published code does: the own rows alone carry a gradient
        contrastive._Gathered.backward = lambda ctx, grad_GD: grad_GD.chunk(PROCESSES)[rank]
    share = ROWS // PROCESSES
    gradient = weight_gradient(weight, slice(rank * share, (rank + 1) * share))
    torch.distributed.all_reduce(gradient)  # each loss is divided by all rows, so the processes' gradients add up
    if rank == 0:
        torch.save(gradient, f"{store}.gradient")
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.parametrize("corrected", [True, False])
def test_four_processes_have_the_gradient_of_one(tmp_path: Path, corrected):
    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    whole = weight_gradient(weight, slice(None))
    context = multiprocessing.get_context("fork")
    arguments = [(rank, str(tmp_path / "store"), weight, corrected) for rank in range(PROCESSES)]
    started = [context.Process(target=process, args=each) for each in arguments]
    for each in started:
        each.start()
    for each in started:
        each.join(60)
    assert [each.exitcode for each in started] == [0] * PROCESSES
    difference = (torch.load(tmp_path / "store.gradient") - whole).abs().max() / whole.abs().max()
    assert difference < 1e-5 if corrected else difference > 0.1
