"""What every sequence model must do, as assertions that take a freshly built model; shared by all model tests."""

from collections.abc import Callable
from pathlib import Path

import torch

from textrec.models.bert4rec import BERT4Rec
from textrec.models.sequence_model import SequenceModel
from textrec.training import losses

Build = Callable[[], SequenceModel]


def random_histories(num_items: int, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return full rows of random item ids."""
    return torch.randint(1, num_items + 1, shape, generator=torch.Generator().manual_seed(seed))


def training_pairs(model: SequenceModel, items_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets: each next item, or for BERT4Rec the newest item behind its mask."""
    if not isinstance(model, BERT4Rec):
        return items_BL[:, :-1], items_BL[:, 1:]
    inputs_BL, targets_BL = items_BL.clone(), torch.zeros_like(items_BL)
    targets_BL[:, -1], inputs_BL[:, -1] = items_BL[:, -1], model.config.mask_id
    return inputs_BL, targets_BL


def batch_loss(model: SequenceModel, items_BL: torch.Tensor) -> torch.Tensor:
    """Return the mean full-softmax loss of one batch of histories."""
    inputs_BL, targets_BL = training_pairs(model, items_BL)
    targets_T = targets_BL[inputs_BL != 0]
    chosen_T = targets_T != 0
    return losses.full_softmax(model(inputs_BL)[chosen_T], model.item_vectors(), targets_T[chosen_T]) / chosen_T.sum()


def fit(model: SequenceModel, items_BL: torch.Tensor, steps: int, learning_rate: float, weight_decay: float = 0.0):
    """Take AdamW steps on one batch; the losses before each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    measured = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = batch_loss(model, items_BL)
        loss.backward()
        optimizer.step()
        measured.append(loss.item())
    return measured


@torch.no_grad()
def later_items_move_earlier_states(model: SequenceModel, items_BL: torch.Tensor, position: int) -> bool:
    """Whether any state before `position` changes when the item there does."""
    changed = items_BL.clone()
    changed[:, position] = changed[:, position] % model.config.num_items + 1
    before, after = (model(each).view(*items_BL.shape, -1) for each in (items_BL, changed))
    assert not torch.equal(before[:, position], after[:, position])  # the change itself is seen
    return not torch.equal(before[:, :position], after[:, :position])


def assert_causal(build: Build) -> None:
    """No state depends on a later item, bit for bit, in evaluation and (dropout 0) in training mode."""
    model = build()
    items_BL = random_histories(model.config.num_items, (3, 9))
    for mode in (True, False):
        model.train(mode)
        for position in (1, 4, 8):
            assert not later_items_move_earlier_states(model, items_BL, position)


@torch.no_grad()
def assert_padding_is_invisible(build: Build) -> None:
    """The user vector does not depend on the amount or side of padding, nor on the other rows of the batch."""
    model = build().eval()
    rows = [random_histories(model.config.num_items, (1, length), seed=length)[0] for length in (1, 4, 9)]
    alone_BD = torch.cat([model.encode(row[None]) for row in rows])
    tolerance = 1e-6 * max(1.0, alone_BD.abs().max().item())  # a temperature scales the vectors
    for pads in (0, 5, 50):
        for left in (True, False):
            block = torch.zeros(len(rows), 9 + pads, dtype=torch.long)
            for line, row in zip(block, rows, strict=True):
                line[slice(-len(row), None) if left else slice(len(row))] = row
            torch.testing.assert_close(model.encode(block), alone_BD, rtol=0, atol=tolerance)


@torch.no_grad()
def assert_long_histories_keep_the_newest(build: Build) -> None:
    """Items older than the model reads change nothing; the newest one does."""
    model = build().eval()
    length = model.config.max_sequence_length
    newest_BL = random_histories(model.config.num_items, (2, length))
    longer_BL = torch.cat([random_histories(model.config.num_items, (2, 7), seed=1), newest_BL], 1)
    torch.testing.assert_close(model.encode(longer_BL), model.encode(newest_BL), rtol=0, atol=1e-6)
    newest_BL[:, -1] = newest_BL[:, -1] % model.config.num_items + 1
    assert (model.encode(longer_BL) - model.encode(newest_BL)).abs().max() > 1e-3


def assert_overfits_one_batch(build: Build, steps: int = 120, learning_rate: float = 1e-2) -> None:
    """Eight histories can be learnt by heart: a twentieth of the first loss, and every newest item ranked first."""
    model = build()
    items_BL = random_histories(model.config.num_items, (8, 6))
    measured = fit(model, items_BL, steps, learning_rate)
    assert measured[-1] < measured[0] / 20
    model.eval()
    with torch.no_grad():
        scores_BI = model.scores(model.encode(items_BL[:, :-1]), model.item_vectors())
    assert torch.equal(scores_BI[:, 1:].argmax(1) + 1, items_BL[:, -1])


def assert_save_load_identical(build: Build, folder: Path) -> None:
    """A saved model comes back with its configuration, its weights and its outputs, by its own class or the base."""
    model = build()
    fit(model, random_histories(model.config.num_items, (4, 6)), steps=2, learning_rate=1e-2)
    model.eval().save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    items_BL = random_histories(model.config.num_items, (3, 9), seed=1)
    for cls in (type(model), SequenceModel):
        loaded = cls.from_pretrained(folder)
        assert type(loaded) is type(model) and loaded.config == model.config and not loaded.training
        assert torch.equal(loaded.encode(items_BL), model.encode(items_BL))
        assert torch.equal(loaded.item_vectors(), model.item_vectors())


def assert_refit_is_fresh(build: Build) -> None:
    """Training a second model with the same seed repeats the first bit for bit, whatever was trained in between."""

    def trained() -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(3)
        model = build()
        measured = fit(model, random_histories(model.config.num_items, (4, 6)), steps=3, learning_rate=1e-2)
        return measured, model.state_dict()

    (losses_a, state_a), (losses_b, state_b) = trained(), trained()
    assert losses_a == losses_b
    assert all(torch.equal(state_a[name], state_b[name]) for name in state_a)


def assert_padding_rows_stay_zero(build: Build) -> None:
    """Row 0 of the item tables is exactly zero after 20 AdamW steps with weight decay, while other rows move."""
    model = build()
    before = model.item_table.weight.detach().clone()
    fit(model, random_histories(model.config.num_items, (4, 6)), steps=20, learning_rate=1e-2, weight_decay=0.1)
    tables = [model.item_table] + ([model.output_table] if model.output_table is not None else [])
    for table in tables:
        assert (table.weight[0] == 0).all() and (table.weight[1] != 0).any()
    assert not torch.equal(before, model.item_table.weight)


def assert_recommends(build: Build) -> None:
    """`recommend` gives k distinct items in falling order of the scores, without the seen ones unless asked to."""
    model = build()
    history, num_items = [3, 1, 4, 1, 5], model.config.num_items
    assert model.training
    every = model.recommend(history, num_items, filter_seen=False)
    assert model.training  # the mode is given back
    model.eval()
    with torch.no_grad():
        scores_I = model.scores(model.encode(torch.tensor([history])), model.item_vectors())[0]
    assert sorted(item for item, _ in every) == list(range(1, num_items + 1))
    assert [score for _, score in every] == sorted((score for _, score in every), reverse=True)
    assert all(abs(scores_I[item].item() - score) < 1e-6 for item, score in every)
    unseen = model.recommend(history, num_items)
    assert unseen == [pair for pair in every if pair[0] not in history]
    assert model.recommend(history, 3) == unseen[:3]
    assert len(model.recommend([], 2)) == 2
