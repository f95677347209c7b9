"""Mixture of logits: a plain product in the simplest case, its formula by hand, and exact ranks from its scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from textrec.evaluation.ranking import rank_targets
from textrec.models import mixture_of_logits
from textrec.models.llama import Llama, LlamaConfig
from textrec.models.mixture_of_logits import MixtureOfLogits, MixtureOfLogitsConfig

SIZE = {"embedding_dim": 8, "group_dim": 8, "gate_dim": 6, "dropout": 0.0}
VARIANTS = {"first as given": {}, "gated": {"hidden_dim": 10, "group_dim": 5, "user_groups": 3, "item_groups": 2}}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def build(**settings) -> MixtureOfLogits:
    return MixtureOfLogits(MixtureOfLogitsConfig(**(SIZE | settings)))


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(5, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)


def test_one_group_is_a_plain_product(vectors):
    users_BD, items_ID = (F.normalize(each.detach(), dim=1) for each in vectors)
    one = build(user_groups=1, item_groups=1, temperature=1.0)
    torch.testing.assert_close(one(users_BD, one.items(items_ID)), users_BD @ items_ID.T)
    two = build(user_groups=2, item_groups=1, temperature=1.0)
    assert (two(users_BD, two.items(items_ID)) - users_BD @ items_ID.T).abs().max() > 1e-2


def score_by_hand(model, user_D, item_D):
    """One user and one item; the gate in its published steps."""
    groups = model.user_groups(user_D[None])[0], model.item_groups(item_D[None])[0]
    logits = torch.stack([(mine * other).sum() for mine in groups[0] for other in groups[1]]) / model.config.temperature
    gate = model.user_gate(user_D) * model.item_gate(item_D) + model.pair_gate(logits)
    weights = torch.exp(gate * torch.sigmoid(gate))
    return (weights / weights.sum() * logits).sum()


@every_variant
def test_scores_by_hand_and_gradients(vectors, name):
    (users_BD, items_ID), model = vectors, build(**VARIANTS[name])
    items = model.items(items_ID)
    pairs = model.config.user_groups * model.config.item_groups
    assert items[0].shape == (40, model.config.item_groups, model.config.group_dim) and items[1].shape == (40, pairs)
    torch.testing.assert_close(items[0].norm(dim=2), torch.ones(40, model.config.item_groups))
    scores_BI = model(users_BD, items)
    assert scores_BI.shape == (5, 40) and scores_BI.abs().max() <= 20.001
    for user, item in ((0, 0), (4, 39), (2, 17)):
        by_hand = score_by_hand(model, users_BD[user], items_ID[item])
        torch.testing.assert_close(scores_BI[user, item], by_hand, rtol=1e-4, atol=1e-4)
    F.cross_entropy(scores_BI, torch.arange(5)).backward()
    for parameter in (users_BD, items_ID, *model.parameters()):
        assert parameter.grad.isfinite().all() and parameter.grad.any()


def test_dropped_gates_are_weighted_anew(vectors):
    users_BD, items_ID = (each.detach() for each in vectors)
    model = build(dropout=0.5, temperature=1.0)
    same = items_ID[:1].expand(4, -1)
    for groups in (model.user_groups, model.item_groups):  # every group the given vector: all logits are the cosine
        groups.forward = lambda vectors_ND: F.normalize(vectors_ND, dim=1)[:, None].expand(-1, 4, -1)
    scores_BI = model(users_BD, model.items(same))
    cosine_B1 = F.cosine_similarity(users_BD, same[:1])[:, None]
    torch.testing.assert_close(scores_BI, cosine_B1.expand_as(scores_BI), rtol=1e-4, atol=1e-5)


def test_targets_are_ranked_by_the_mixture(monkeypatch):
    """In blocks of items, from the vectors of a sequence model; inner products of the same vectors rank otherwise."""
    torch.manual_seed(0)
    network = Llama(LlamaConfig(num_items=30, embedding_dim=8, initial_std=0.5)).eval()
    model, items_BL = build(dropout=0.3), torch.randint(1, 31, (20, 6))
    with torch.no_grad():
        users_BD, items_ID = network.encode(items_BL), network.item_vectors()[1:]
    targets_U = np.arange(20) + 1
    monkeypatch.setattr(mixture_of_logits, "BLOCK_NUMBERS", 20 * 16 * 7)
    scorer = model.scorer(lambda rows: users_BD[rows], items_ID)
    ranks = rank_targets(
        scorer, np.arange(20), targets_U, lambda rows: (np.zeros(0, int), np.zeros(len(users_BD[rows]) + 1, int)),
        num_items=30,
    )  # fmt: skip
    with torch.no_grad():
        whole_BI = model(users_BD, model.items(items_ID))
    torch.testing.assert_close(scorer(slice(None)), whole_BI, rtol=0, atol=1e-5)
    found = []
    for scores_BI in (whole_BI, users_BD @ items_ID.T):
        chosen_B1 = scores_BI.gather(1, torch.from_numpy(targets_U)[:, None] - 1)
        found.append((scores_BI > chosen_B1).sum(1).tolist())
    assert ranks.kept.higher_U.tolist() == found[0] != found[1]


def test_own_and_shared_items_have_the_scores_of_the_whole_table(vectors):
    users_TD, items_ID = (each.detach() for each in vectors)
    model, own_T, shared_N = build(), torch.tensor([3, 0, 39, 3, 8]), torch.tensor([5, 3, 21])
    contrasted = model.contrasted(users_TD, model.items(items_ID[own_T]), model.items(items_ID[shared_N]))
    whole_TI = model(users_TD, model.items(items_ID))
    torch.testing.assert_close(contrasted, torch.cat([whole_TI.gather(1, own_T[:, None]), whole_TI[:, shared_N]], 1))


@pytest.mark.parametrize(("wrong", "named"), [({"group_dim": 4}, "group_dim=4"), ({"item_groups": 0}, "item_groups=0")])
def test_configurations_refuse_what_cannot_be(wrong, named):
    with pytest.raises(ValueError, match=named):
        build(**wrong)
