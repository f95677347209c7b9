"""Given vectors in every model: bit for bit at the start, padding untouched, frozen means frozen, and saved as one."""

import math

import pytest
import torch
import torch.nn.functional as F
from models.behaviours import random_histories

from textrec.models.bert4rec import BERT4Rec, BERT4RecConfig
from textrec.models.item_table import MODELS, Experts, WithItemTable, attach, transformed
from textrec.models.sasrec import SASRec, SASRecConfig
from textrec.models.sequence_model import SequenceModel
from textrec.schema import InputError
from textrec.training import losses
from textrec.training.module import SequenceModule, TrainingConfig

ITEMS, WIDTH = 12, 8
CHOICES = {
    "trained": {}, "frozen": {"freeze": True}, "linear": {"adaptor": "linear", "freeze": True},
    "mlp": {"adaptor": "mlp"}, "experts": {"adaptor": "experts", "freeze": True},
    "sum": {"add_ids": True, "freeze": True},
}  # fmt: skip


def table(width=WIDTH, num_items=ITEMS, seed=0) -> torch.Tensor:
    rows = torch.randn(num_items, width, generator=torch.Generator().manual_seed(seed))
    return F.pad(rows, (0, 0, 1, 0))


def build(name, width=WIDTH, **settings) -> SequenceModel:
    torch.manual_seed(0)
    config = {"num_items": ITEMS, "max_sequence_length": 6, "embedding_dim": width, "dropout": 0.0} | settings
    return MODELS[name](MODELS[name].config_class(**config))


def train(model, steps=3, rate=0.05, loss=losses.full_softmax) -> torch.optim.Optimizer:
    """Take a few steps towards item 5 from everywhere, padded rows among them, with the optimizer of the trainings."""
    optimizer = SequenceModule(model, TrainingConfig(learning_rate=rate), seed=0).configure_optimizers()
    items_BL = random_histories(ITEMS, (4, 5))
    items_BL[0, :3] = 0
    for _ in range(steps):
        states_TD = model(items_BL)
        targets_T = torch.full((len(states_TD),), 5)
        loss(states_TD, model.item_vectors(), targets_T).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_starts_from_the_vectors_learns_and_comes_back(name, choice, tmp_path):
    given = table()
    model = attach(build(name), given, **CHOICES[choice])
    rows = (model.model if isinstance(model, WithItemTable) else model).item_table
    assert isinstance(model, WithItemTable) == (choice != "trained")
    if choice in ("trained", "frozen"):
        assert torch.equal(rows.weight[: ITEMS + 1], given)
    before = rows.weight.detach().clone()
    train(model)
    changed = (rows.weight.detach() != before).any(1)
    assert not rows.weight[0].any() and changed[1 : ITEMS + 1].tolist() == [choice != "frozen"] * ITEMS
    if choice not in ("trained", "mlp"):
        assert torch.equal(rows.vectors, given)
    model.save_pretrained(tmp_path / "model")
    loaded = SequenceModel.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model) and loaded.config == model.config
    histories, model = random_histories(ITEMS, (3, 6)), model.eval()
    for one in (model, loaded):
        assert all(math.isfinite(score) for _, score in one.recommend([1, 2, 3], 4))
    assert torch.equal(loaded.encode(histories), model.encode(histories))
    assert torch.equal(loaded.item_vectors(), model.item_vectors())


@pytest.mark.parametrize("choice", CHOICES)
def test_rows_looked_up_are_those_of_the_whole_table(choice):
    model = attach(build("BERT4Rec"), table(), **(CHOICES[choice] | {"train_mask": True}))
    rows = (model.model if choice != "trained" else model).eval().item_table
    torch.testing.assert_close(rows(torch.arange(ITEMS + 2)), rows.weight)
    assert rows.weight[-1].any() and rows.weight.shape == (ITEMS + 2, WIDTH)


def test_the_mask_token_keeps_a_trained_vector_of_its_own_unless_told_otherwise():
    own = build("BERT4Rec").item_table.weight[-1].clone()
    for train_mask in (True, False):
        model = attach(build("BERT4Rec"), table(), freeze=True, train_mask=train_mask)
        mask = model.model.item_table.mask
        assert torch.equal(mask[0], own if train_mask else torch.zeros(WIDTH))
        items_BL = torch.tensor([[1, 2, ITEMS + 1], [3, 4, ITEMS + 1]])
        losses.full_softmax(model(items_BL), model.item_vectors(), torch.ones(6, dtype=torch.long)).backward()
        assert (mask.grad is not None) == train_mask
    filled = attach(build("BERT4Rec"), table())
    assert torch.equal(filled.item_table.weight[-1], own)


def test_a_table_of_its_own_is_in_the_optimizer_exactly_if_it_is_trained():
    for choice, settings in CHOICES.items():
        model = attach(build("SASRec"), table(), **settings)
        held = {id(p) for group in train(model, steps=1).param_groups for p in group["params"]}
        given = model.item_table.weight if choice == "trained" else model.model.item_table.vectors
        assert (id(given) in held) == (not settings.get("freeze", False))


@pytest.mark.parametrize("loss", ["full", "binary"])
def test_padding_is_never_trained_under_either_loss(loss):
    def binary(states_TD, items_ID, targets_T):
        return losses.gbce(states_TD, items_ID, targets_T, torch.full((len(targets_T), 1), 3))

    model = attach(build("SASRec"), table())
    train(model, loss=losses.full_softmax if loss == "full" else binary)
    assert not model.item_table.weight[0].any()


def published(name, rows_of_vectors: bool) -> int:
    with torch.device("meta"):
        if name == "SASRec":
            config = SASRecConfig(num_items=8249, max_sequence_length=50, embedding_dim=768, norm="original")
            model = SASRec(config)
        else:
            config = BERT4RecConfig(
                num_items=8249, max_sequence_length=50, embedding_dim=768, num_heads=4, tie_item_table=False,
                norm_embedding=False,
            )  # fmt: skip
            model = BERT4Rec(config)
    model = model.to_empty(device="cpu")
    if rows_of_vectors:
        model = attach(model, torch.zeros(8250, 768))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "count", "unused"), [("SASRec", 13_469_184, 768), ("BERT4Rec", 26_895_162, 0)])
def test_given_vectors_cost_no_parameter_and_the_published_counts_hold(name, count, unused):
    """Pantry, 8,249 items; our SASRec has one position row that is never read."""
    assert published(name, False) - unused == published(name, True) - unused == count


def test_trained_vectors_leave_the_model_what_it_is_so_that_they_cost_no_time():
    plain, given = build("SASRec"), attach(build("SASRec"), table())
    assert type(given.item_table) is type(plain.item_table) is torch.nn.Embedding
    assert given.state_dict().keys() == plain.state_dict().keys() and given.config == plain.config


def test_matched_vectors_have_the_norm_of_the_rows_they_replace_and_their_own_directions():
    own = build("GRU4Rec").item_table.weight[1:].square().sum(1).mean()
    model = attach(build("GRU4Rec"), 100 * table(), match_norm=True)
    rows = model.item_table.weight[1:].detach()
    assert rows.square().sum(1).mean().item() == pytest.approx(own.item(), rel=1e-5)
    torch.testing.assert_close(F.normalize(rows, dim=1), F.normalize(table()[1:], dim=1))


def test_vectors_of_another_width_need_an_adaptor():
    for adaptor in ("linear", "mlp", "experts"):
        model = attach(build("SASRec"), table(20), adaptor=adaptor, freeze=True)
        assert model.item_vectors().shape == (ITEMS + 1, WIDTH)
    assert attach(build("SASRec"), transformed(table(20), ["pca"], width=WIDTH)).item_vectors().shape[1] == WIDTH


def test_experts_by_hand():
    torch.manual_seed(0)
    experts = Experts(5, 3, 4, dropout=0.5).eval()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(6, 5)
    gates = F.linear(x, experts.gate.weight).softmax(1)
    each = [(x - shift) @ weight.T for shift, weight in zip(experts.shifts, experts.weights, strict=True)]
    by_hand = sum(gates[:, [k]] * each[k] for k in range(4))
    torch.testing.assert_close(experts(x), by_hand)
    assert (experts.train()(x) - by_hand).abs().max() > 1e-3  # noise and dropout while training


# ---- transforms ------------------------------------------------------------------------------------------------------


def correlated(num_items=200, width=6) -> torch.Tensor:
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(1))
    rows = table(width, num_items)[1:] @ mixing + 3.0
    return F.pad(rows, (0, 0, 1, 0))


def test_a_permutation_keeps_the_vectors_and_takes_them_from_their_items():
    given = correlated()
    moved = transformed(given, ["permuted"], seed=1)
    assert torch.equal(moved[1:].sort(0).values, given[1:].sort(0).values) and not moved[0].any()
    assert (moved != given).any(1).sum() > 190
    assert torch.equal(moved, transformed(given, ["permuted"], seed=1))
    assert not torch.equal(moved, transformed(given, ["permuted"], seed=2))


def test_random_directions_have_the_mean_and_the_covariance_and_nothing_else():
    given = correlated()
    drawn = transformed(given, ["same_covariance"], seed=1)
    for statistic in (lambda t: t[1:].mean(0), lambda t: torch.cov(t[1:].T)):
        torch.testing.assert_close(statistic(drawn), statistic(given), rtol=1e-4, atol=1e-4)
    both = torch.corrcoef(torch.stack([(drawn[1:] - drawn[1:].mean(0)).flatten(),
                                       (given[1:] - given[1:].mean(0)).flatten()]))  # fmt: skip
    assert abs(both[0, 1]) < 0.3
    plain = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))  # a draw without the covariance is noticed
    assert (torch.cov(plain.T) - torch.cov(given[1:].T)).abs().max() > 1.0
    assert not drawn[0].any()


def test_whitened_vectors_have_equal_variance_everywhere_and_a_mean_squared_norm_of_one():
    white = transformed(correlated(), ["whitened"])
    torch.testing.assert_close(torch.cov(white[1:].T, correction=0), torch.eye(6) / 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(white[1:].mean(0), torch.zeros(6), rtol=0, atol=1e-5)


def test_principal_components_keep_the_distances_they_can():
    given = correlated()
    full, kept = (torch.pdist(each[1:].double()) for each in (transformed(given, ["pca"], width=6), given))
    torch.testing.assert_close(full, kept, rtol=1e-4, atol=1e-4)
    wide = transformed(given, ["pca"], width=9)  # no more than there are
    assert wide.shape[1] == 9 and not wide[:, 6:].any()
    few = transformed(correlated(num_items=4), ["whitened", "pca"], width=6)  # three directions among four items
    assert few.shape == (5, 6) and not few[:, 3:].any() and few.isfinite().all()


def test_mistakes_are_named():
    for given, settings, message in (
        (table()[1:], {}, r"are \(12, 8\): expected 13 rows"),
        (table() + 1, {}, "zeros in row 0"),
        (table() * torch.inf, {}, "finite numbers"),
        (table(5), {}, "have 5 numbers, the model 8"),
        (table(), {"adaptor": "lienar"}, "adaptor='lienar'"),
    ):
        with pytest.raises(InputError, match=message):
            attach(build("SASRec"), given, **settings)
    with pytest.raises(InputError, match="transform 'shuffled'"):
        transformed(table(), ["shuffled"])
    with pytest.raises(InputError, match="needs width"):
        transformed(table(), ["pca"])


def test_another_program_loads_it_as_any_sequence_model(tmp_path):
    """A fresh process has not imported the wrapper: the base class must find it by the name in the folder."""
    import subprocess
    import sys

    model = SASRec(SASRecConfig(num_items=5, embedding_dim=4))
    table = torch.cat([torch.zeros(1, 4), torch.randn(5, 4)])
    attach(model, table, freeze=True).save_pretrained(tmp_path)
    code = (
        "import sys; from textrec.models.sequence_model import SequenceModel\n"
        "print(len(SequenceModel.from_pretrained(sys.argv[1]).recommend([1, 2], k=3)))"
    )
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert told.stdout.strip() == "3", told.stderr
