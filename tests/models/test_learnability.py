"""Every encoder learns an order-2 Markov chain, which neither item frequencies nor other users' histories predict.

The twin exchanges histories between users. Shuffling each history would be no twin: successors betray the order, and a
recurrent net trained on shuffled histories still finds the next item about every second time.
"""

import numpy as np
import pytest
import torch

from textrec.models.bert4rec import BERT4Rec, BERT4RecConfig, mask_histories
from textrec.models.gru4rec import GRU4Rec, GRU4RecConfig
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.training import losses

NUM_ITEMS, LENGTH, FOLLOWS = 50, 8, 0.9
SIZE = {"num_items": NUM_ITEMS, "max_sequence_length": LENGTH, "embedding_dim": 32, "dropout": 0.0}
SASREC = SIZE | {"attention_dropout": 0.0, "hidden_multiplier": 4}
ENCODERS = {
    "sasrec original": (lambda: SASRec(SASRecConfig(**SASREC, norm="original")), 250),
    "sasrec pre": (lambda: SASRec(SASRecConfig(**SASREC, norm="pre")), 250),
    "sasrec post": (lambda: SASRec(SASRecConfig(**SASREC, norm="post")), 250),
    "esasrec": (lambda: SASRec(SASRecConfig(**SASREC, block="ligr")), 250),
    "gru4rec": (lambda: GRU4Rec(GRU4RecConfig(**SIZE)), 200),
    "bert4rec": (lambda: BERT4Rec(BERT4RecConfig(**SIZE, attention_dropout=0.0)), 450),
}


def histories(num_rows: int, seed: int) -> np.ndarray:
    """Rows whose next item is mostly the last's successor, in a table chosen by the parity of the item before it."""
    rng = np.random.default_rng(seed)
    successors = np.random.default_rng(99).permuted(np.tile(np.arange(1, NUM_ITEMS + 1), (2, 1)), axis=1)
    items_BL = rng.integers(1, NUM_ITEMS + 1, (num_rows, LENGTH))
    for t in range(2, LENGTH):
        named_B = successors[items_BL[:, t - 2] % 2, items_BL[:, t - 1] - 1]
        items_BL[:, t] = np.where(rng.random(num_rows) < FOLLOWS, named_B, items_BL[:, t])
    return items_BL


def pairs(model, items_BL: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(model, BERT4Rec):
        masked = mask_histories(items_BL, NUM_ITEMS, rng, last_probability=0.9)
        return torch.from_numpy(masked[0]), torch.from_numpy(masked[1])
    return torch.from_numpy(items_BL[:, :-1]), torch.from_numpy(items_BL[:, 1:])


def train(model, steps: int, exchange: bool = False) -> None:
    """Take AdamW steps under a one-cycle rate; every batch is new, so nothing can be learnt by heart."""
    masked = isinstance(model, BERT4Rec)
    peak, batch_size = (1e-2, 256) if masked else (2e-2, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(0)
    for step in range(steps):
        items_BL = histories(batch_size, seed=1000 + step)[:, 3 if masked else 0 :]
        inputs_BL, targets_BL = pairs(model, items_BL, rng)
        targets_BL = targets_BL.roll(1, 0) if exchange else targets_BL
        targets_T = targets_BL[inputs_BL != 0]
        chosen_T = targets_T != 0
        total = losses.full_softmax(model(inputs_BL)[chosen_T], model.item_vectors(), targets_T[chosen_T])
        optimizer.zero_grad()
        (total / chosen_T.sum()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def recall_at_1(model, exchange: bool = False) -> float:
    model.eval()
    test_BL = histories(2000, seed=7)[:, 3 if isinstance(model, BERT4Rec) else 0 :]
    known_BL = torch.from_numpy(np.roll(test_BL, 1, axis=0) if exchange else test_BL)[:, :-1]
    scores_BI = model.scores(model.encode(known_BL), model.item_vectors())
    return float((scores_BI[:, 1:].argmax(1).numpy() + 1 == test_BL[:, -1]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_learns_the_chain(name):
    torch.manual_seed(0)
    build, steps = ENCODERS[name]
    model = build()
    untrained = recall_at_1(model)
    train(model, steps)
    assert recall_at_1(model) >= 0.85  # the best possible is 0.9 + 0.1 / 50
    assert untrained <= 0.1
    assert recall_at_1(model, exchange=True) <= 0.1


def test_frequencies_know_nothing():
    newest = histories(2000, seed=7)[:, -1]
    most_frequent = np.bincount(histories(2000, seed=1).ravel()).argmax()
    assert (newest == most_frequent).mean() <= 0.1


@pytest.mark.slow
def test_another_users_history_teaches_nothing():
    torch.manual_seed(0)
    model = ENCODERS["gru4rec"][0]()
    train(model, steps=200, exchange=True)
    assert recall_at_1(model) <= 0.15
