"""The cloze task of BERT4Rec, where it reads the next item, and how many parameters the published settings have."""

import numpy as np
import pytest
import torch

from textrec.models.bert4rec import BERT4Rec, BERT4RecConfig, mask_histories

NUM_ITEMS, ROWS = 1000, 100_000
MASK = NUM_ITEMS + 1


@pytest.fixture(scope="module")
def drawn():
    """A hundred thousand rows of 50, masked; they are of two lengths and padded behind."""
    rng = np.random.default_rng(0)
    items_BL = rng.integers(1, NUM_ITEMS + 1, (ROWS, 50))
    items_BL[::5, 30:] = 0
    inputs_BL, targets_BL = mask_histories(items_BL, NUM_ITEMS, rng, mask_probability=0.15, last_probability=0.09)
    newest_B = np.where(np.arange(ROWS) % 5 == 0, 29, 49)
    hidden_alone_B = (targets_BL != 0).sum(1) == 1
    last_only_B = hidden_alone_B & (targets_BL[np.arange(ROWS), newest_B] != 0)
    return items_BL, inputs_BL, targets_BL, last_only_B


def test_targets_are_the_items_and_nothing_else_changes(drawn):
    items_BL, inputs_BL, targets_BL, _ = drawn
    asked_BL = targets_BL != 0
    assert (targets_BL[asked_BL] == items_BL[asked_BL]).all()
    assert (inputs_BL[~asked_BL] == items_BL[~asked_BL]).all()  # padding included
    assert asked_BL.any(1).all()  # no row is read for nothing


def test_shares_of_masked_positions(drawn):
    items_BL, inputs_BL, targets_BL, last_only_B = drawn
    empty = 0.2 * 0.85**30 + 0.8 * 0.85**50  # rows of which the draws choose nothing
    assert last_only_B.mean() == pytest.approx(0.09 + 0.91 * empty, abs=0.005)
    # never swapped, never left as it was, but for the few rows of whose items a draw chose the newest alone
    assert (inputs_BL[last_only_B].max(1) == MASK).mean() > 0.99
    cloze_B = ~last_only_B
    real_BL, asked_BL = items_BL[cloze_B] != 0, targets_BL[cloze_B] != 0
    assert asked_BL.sum() / real_BL.sum() == pytest.approx(0.15, abs=0.002)
    shown, truth = inputs_BL[cloze_B][asked_BL], targets_BL[cloze_B][asked_BL]
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=0.002)
    assert (shown == truth).mean() == pytest.approx(0.1, abs=0.002)
    swapped = shown[(shown != MASK) & (shown != truth)]
    assert swapped.min() >= 1 and swapped.max() <= NUM_ITEMS
    assert np.unique(swapped).size == NUM_ITEMS


def test_masking_is_a_function_of_the_generator():
    items_BL = np.arange(1, 41).reshape(4, 10)
    first, again, other = (mask_histories(items_BL, 40, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert any((a != b).any() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("history", [[5, 0, 0], [0, 0, 5], [0, 0, 0]])
def test_a_row_of_at_most_one_item_asks_for_nothing(history):
    inputs_BL, targets_BL = mask_histories(np.array([history]), 9, np.random.default_rng(0), mask_probability=1.0)
    assert (inputs_BL == [history]).all() and not targets_BL.any()


def test_the_newest_item_is_found_behind_either_padding():
    items_BL = np.array([[0, 0, 3, 4], [3, 4, 0, 0]])
    inputs_BL, targets_BL = mask_histories(items_BL, 9, np.random.default_rng(0), last_probability=1.0)
    assert inputs_BL.tolist() == [[0, 0, 3, 10], [3, 10, 0, 0]]
    assert targets_BL.tolist() == [[0, 0, 0, 4], [0, 4, 0, 0]]


def test_encode_is_the_state_of_a_mask_behind_the_history():
    model = BERT4Rec(BERT4RecConfig(num_items=9, max_sequence_length=5, embedding_dim=8)).eval()
    by_hand = model(torch.tensor([[3, 1, 4, 10]]))[-1:]
    for padded in ([3, 1, 4], [0, 0, 3, 1, 4], [3, 1, 4, 0]):
        torch.testing.assert_close(model.encode(torch.tensor([padded])), by_hand)
    full = model.encode(torch.tensor([[9, 8, 3, 1, 4]]))  # the mask takes the place of the oldest item
    torch.testing.assert_close(full, model(torch.tensor([[8, 3, 1, 4, 10]]))[-1:])


def test_scores_carry_the_bias():
    model = BERT4Rec(BERT4RecConfig(num_items=9, embedding_dim=8))
    torch.nn.init.normal_(model.output_bias)
    states_BD = model.encode(torch.tensor([[1, 2, 3]]))
    by_hand = states_BD[:, :-1] @ model.item_table.weight[:10].T + model.output_bias
    torch.testing.assert_close(model.scores(states_BD, model.item_vectors()), by_hand)


def test_parameters_of_the_elephant_paper():
    """Pantry, 8,249 items: 26,895,162 in its code, its own output layer included."""
    config = BERT4RecConfig(
        num_items=8249,
        max_sequence_length=50,
        embedding_dim=768,
        num_heads=4,
        tie_item_table=False,
        norm_embedding=False,
    )
    with torch.device("meta"):
        model = BERT4Rec(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 26_895_162
