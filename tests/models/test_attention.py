"""Banded attention against transformers' Longformer layer, its paths against each other, and its cost in gradients."""

import functools

import pytest
import torch
from torch import nn

from textrec.models import attention
from textrec.models.attention import BandedAttention, BandLayout, Dropout
from textrec.schema import InputError

WIDTH, HEADS = 32, 4
BATCHES = [[1], [13], [64], [65], [200], [1024], [5, 1, 90, 200, 33]]


@functools.cache
def pair(window: int) -> tuple[nn.Module, BandedAttention]:
    """The library's layer and ours with the same weights."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[window], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs, ours = LongformerSelfAttention(config, 0), BandedAttention(WIDTH, HEADS, dropout=0.0)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@functools.cache
def expected(window: int, lengths: tuple[int, ...]):
    """Random states, padded; which are real; the library's states there, and the gradients of a random functional."""
    theirs, _ = pair(window)
    torch.manual_seed(sum(lengths))
    lengths_B = torch.tensor(lengths)
    padded = -(-max(lengths) // window) * window
    real_BL = torch.arange(padded) < lengths_B[:, None]
    hidden_BLD = torch.randn(*real_BL.shape, WIDTH, requires_grad=True)
    mask_BL = torch.zeros(real_BL.shape).masked_fill(~real_BL, -10_000.0)
    mask_BL[:, 0] = 10_000.0
    mixed_TD = theirs(hidden_BLD, mask_BL, mask_BL < 0, mask_BL > 0, True)[0][real_BL]
    weights_TD = torch.randn_like(mixed_TD)
    gradients = torch.autograd.grad((mixed_TD * weights_TD).sum(), [hidden_BLD, *theirs.parameters()])
    return hidden_BLD, real_BL, lengths_B, mixed_TD.detach(), weights_TD, gradients


def worst(one, other) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
@pytest.mark.parametrize("path", ["dense", "blocked", "auto"])
def test_states_and_gradients_equal_the_librarys(window, lengths, path):
    hidden_BLD, real_BL, lengths_B, mixed_TD, weights_TD, gradients = expected(window, tuple(lengths))
    _, ours = pair(window)
    states_TD = ours(hidden_BLD[real_BL], BandLayout.of(lengths_B, window, HEADS, path))
    assert worst([states_TD], [mixed_TD]) < 1e-5
    measured = torch.autograd.grad((states_TD * weights_TD).sum(), [hidden_BLD, *ours.parameters()])
    scale = max(each.abs().max().item() for each in gradients)
    assert worst(measured, gradients) < 1e-5 * max(1.0, scale)  # a gradient summed over 1,024 tokens is not of order 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [8, 64])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_flex_attention_gives_the_same_states(window, lengths):
    """On the CPU it has no backward pass; `tests/gpu/test_attention.py` has the gradients."""
    hidden_BLD, real_BL, lengths_B, mixed_TD, *_ = expected(window, tuple(lengths))
    _, ours = pair(window)
    with torch.no_grad():
        states_TD = ours(hidden_BLD[real_BL], BandLayout.of(lengths_B, window, HEADS, "flex"))
    assert worst([states_TD], [mixed_TD]) < 1e-5


def test_flex_attention_visits_every_tile_it_must():
    """The tiles are named by hand, so that no mask over all pairs is ever built."""
    from torch.nn.attention.flex_attention import create_block_mask

    lengths_B = torch.tensor([300, 5, 1, 700, 40, 129])
    mask = BandLayout.of(lengths_B, 64, HEADS, "flex").flex_mask
    total = -(-int(lengths_B.sum()) // attention.FLEX_TILE) * attention.FLEX_TILE
    needed = create_block_mask(mask.mask_mod, None, None, total, total, device="cpu", BLOCK_SIZE=attention.FLEX_TILE)
    named, needed = mask.to_dense()[0, 0], needed.to_dense()[0, 0]
    assert ((needed == 1) <= (named == 1)).all()
    assert named.sum() < 0.7 * named.numel()


@pytest.mark.parametrize("lengths", [[200], [5, 1, 90, 200, 33]], ids=str)
def test_a_band_on_one_side_or_twice_as_wide_is_noticed(lengths, monkeypatch):
    hidden_BLD, real_BL, lengths_B, mixed_TD, *_ = expected(64, tuple(lengths))
    _, ours = pair(64)

    class OneSided(BandLayout):
        @functools.cached_property
        def bias_MSK(self):
            query = torch.arange(self.longest)[:, None]
            key = torch.arange(self.longest)
            seen = ((query - key >= 0) & (query - key <= 64)) | (key == 0)
            inside = key < self.lengths_B[:, None, None]
            return torch.zeros(len(lengths_B), *seen.shape).masked_fill(~(seen & inside), -torch.inf)

    for layout in (OneSided.of(lengths_B, 64, HEADS, "dense"), BandLayout.of(lengths_B, 128, HEADS, "dense")):
        with torch.no_grad():
            assert worst([ours(hidden_BLD[real_BL], layout)], [mixed_TD]) > 1e-3


def test_only_the_first_tokens_when_only_they_are_asked_for():
    hidden_BLD, real_BL, lengths_B, mixed_TD, *_ = expected(8, (5, 1, 90, 200, 33))
    _, ours = pair(8)
    layout = BandLayout.of(lengths_B, 8, HEADS)
    with torch.no_grad():
        first_BD = ours(hidden_BLD[real_BL], layout, first_only=True)
    assert worst([first_BD], [mixed_TD[layout.starts_B]]) < 1e-5


def test_the_path_follows_the_lengths():
    def path(*lengths):
        return BandLayout.of(torch.tensor(lengths), 64, HEADS).path

    assert path(1) == path(33) == path(*[40] * 20) == path(100, 90, 110) == "dense"
    assert path(1024) == path(*[20] * 30, 900) == "blocked"


@pytest.mark.parametrize("path", ["dense", "blocked"])
def test_dropout_has_its_share_and_its_gradient(path, monkeypatch):
    """In double precision, with the same draw at every call, the written-out gradient is the numerical one."""
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 4)
    layout = BandLayout.of(torch.tensor([9, 1, 6]), 4, 2, path)
    torch.manual_seed(0)
    inputs = [torch.randn(16, 4, dtype=torch.double, requires_grad=True) for _ in range(3)]

    def band(query, key, value):
        torch.manual_seed(1)
        return attention._Band.apply(torch.cat([query, key, value], 1), layout, 0.3)

    assert torch.autograd.gradcheck(band, inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_hidden_dropout_has_its_share_its_scale_and_its_gradient(dtype):
    torch.manual_seed(0)
    x, dropout = torch.randn(1000, 1001).to(dtype).requires_grad_(), Dropout(0.3)
    torch.manual_seed(1)
    dropped = dropout(x)
    kept = dropped != 0
    share = kept[x != 0].float().mean().item()
    assert share == pytest.approx(0.7, abs=3e-3)
    assert (kept[1:] == kept[:-1]).float().mean().item() == pytest.approx(0.58, abs=3e-3)  # rows are independent
    assert torch.equal(dropped, torch.where(kept, x * (1 / 0.7), 0.0)) and dropped.dtype == dtype
    towards = torch.randn(1001, 1000).to(dtype).T  # not contiguous
    (gradient,) = torch.autograd.grad(dropped, x, towards)
    assert torch.equal(gradient[x != 0], torch.where(kept, towards * (1 / 0.7), 0.0)[x != 0])
    again = dropout(x)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), dropped) and not torch.equal(again, dropped)


def test_hidden_dropout_is_the_librarys_where_nothing_is_drawn():
    x, dropout = torch.randn(3, 5), Dropout(0.3)
    assert not dropout.state_dict()
    assert torch.equal(dropout.eval()(x), x) and torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()
    assert not Dropout(1 - 2**-20)(x).any()
    with torch.no_grad():
        assert dropout.train()(x.T).shape == (5, 3) and dropout(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("path", ["dense", "blocked"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_half_precision_rounds_the_gradients_of_the_band_no_more_than_its_numbers(path, dropout):
    """Each rounding to bf16 moves a number by 2^-9 / sqrt(3) in the mean, 1.1e-3; a few of them follow each other."""
    torch.manual_seed(0)
    layout = BandLayout.of(torch.tensor([100, 37, 128, 5]), 64, HEADS, path)
    inputs, towards = torch.randn(270, 3 * 128).bfloat16(), torch.randn(270 * HEADS, 32).bfloat16()
    outcomes = []
    for dtype in (torch.bfloat16, torch.double):
        torch.manual_seed(1)
        leaf = inputs.to(dtype).requires_grad_()
        mixed_TD = attention._Band.apply(leaf, layout, dropout)
        (gradient,) = torch.autograd.grad(mixed_TD, leaf, towards.to(dtype))
        outcomes.append([mixed_TD.double(), *gradient.double().chunk(3, 1)])
    errors = [((half - exact).norm() / exact.norm()).item() for half, exact in zip(*outcomes, strict=True)]
    assert max(errors) < 5.5e-3, errors


def test_dropout_leaves_the_expected_value():
    torch.manual_seed(0)
    module, layout = BandedAttention(WIDTH, HEADS, dropout=0.2), BandLayout.of(torch.tensor([70, 40]), 8, HEADS)
    hidden_TD = torch.randn(110, WIDTH)
    with torch.no_grad():
        drawn = torch.stack([module(hidden_TD, layout) for _ in range(400)])
        error_TD = (drawn.mean(0) - module.eval()(hidden_TD, layout)) / (drawn.std(0) / 20)
    assert drawn.std(0).min() > 0
    assert error_TD.abs().mean() < 1.0  # a standard normal has .8


@pytest.mark.parametrize("path", ["dense", "blocked"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_half_precision_stays_near(path, dropout):
    torch.manual_seed(0)
    module, hidden_TD = BandedAttention(WIDTH, HEADS, dropout), torch.randn(110, WIDTH, requires_grad=True)
    layout, outcomes = BandLayout.of(torch.tensor([70, 40]), 8, HEADS, path), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            states_TD = module(hidden_TD, layout).float()
        outcomes.append((states_TD, *torch.autograd.grad(states_TD.square().sum(), [hidden_TD, *module.parameters()])))
    total = sum(each.norm() for each in outcomes[0])  # the key bias alone has no gradient to be near to
    for exact, half in zip(*outcomes, strict=True):
        assert (exact - half).norm() < 0.02 * exact.norm() + 1e-4 * total


def test_every_parameter_stays_used_and_adapters_are_not_bypassed():
    _, ours = pair(8)
    hidden_BLD, real_BL, lengths_B, *_ = expected(8, (13,))
    layout = BandLayout.of(lengths_B, 8, HEADS)
    states_TD = ours(hidden_BLD.detach()[real_BL], layout)
    gradients = torch.autograd.grad(states_TD.square().sum(), list(ours.parameters()), allow_unused=True)
    assert all(gradient is not None for gradient in gradients)

    class Adapted(nn.Module):
        """An adapter as peft wraps it: a linear layer inside that looks untouched from outside."""

        def __init__(self, base):
            super().__init__()
            self.base_layer, self.more = base, nn.Linear(WIDTH, WIDTH, bias=False)
            self.in_features, self.weight, self.bias = WIDTH, base.weight, base.bias

        def forward(self, x):
            return self.base_layer(x) + self.more(x)

    for name in ("query", "key", "value", "query_global", "key_global", "value_global"):
        torch.manual_seed(0)
        adapted, merged = (BandedAttention(WIDTH, HEADS, dropout=0.0) for _ in range(2))
        adapted.load_state_dict(ours.state_dict())
        merged.load_state_dict(ours.state_dict())
        setattr(adapted, name, Adapted(getattr(adapted, name)))
        with torch.no_grad():
            getattr(merged, name).weight += getattr(adapted, name).more.weight
            wrapped, plain = (each(hidden_BLD[real_BL], layout) for each in (adapted, merged))
        assert worst([wrapped], [plain]) < 1e-5 < 1e-3 < worst([plain], [states_TD])


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ((torch.tensor([3, 0]), 8, HEADS), "empty sequence"),
        ((torch.tensor([], dtype=torch.long), 8, HEADS), "empty sequence"),
        ((torch.tensor([3]), 7, HEADS), "window=7"),
        ((torch.tensor([3]), 8, HEADS, "fast"), "path='fast'"),
    ],
)
def test_impossible_layouts_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        BandLayout.of(*settings)


def test_flex_attention_refuses_dropout():
    module, layout = BandedAttention(WIDTH, HEADS, dropout=0.1), BandLayout.of(torch.tensor([5]), 8, HEADS, "flex")
    with pytest.raises(InputError, match="no dropout"):
        module(torch.randn(5, WIDTH), layout)
