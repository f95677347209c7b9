"""Banded attention on a CUDA device: the CPU's states and gradients on every path, half precision, and its speed.

Skipped, with the reason, where there is no CUDA device. `pytest tests/gpu/test_attention.py -s` prints the times.
"""

import pytest
import torch

from textrec.models.attention import BandedAttention, BandLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WINDOW, WIDTH, HEADS = 64, 768, 12
PATHS = ("dense", "blocked", "flex")


def outcome(module, hidden_TD, lengths_B, path, precision=None):
    """The states and all gradients of one pass, on the CPU."""
    device = next(module.parameters()).device
    hidden_TD = hidden_TD.detach().to(device).requires_grad_()
    with torch.autocast(device.type, dtype=precision or torch.bfloat16, enabled=precision is not None):
        states_TD = module(hidden_TD, BandLayout.of(lengths_B.to(device), WINDOW, HEADS, path)).float()
    gradients = torch.autograd.grad(states_TD.square().sum(), [hidden_TD, *module.parameters()])
    return [each.detach().float().cpu() for each in (states_TD, *gradients)]


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    lengths_B = torch.tensor([1, 13, 64, 65, 200, 700])
    return BandedAttention(WIDTH, HEADS, dropout=0.0), torch.randn(int(lengths_B.sum()), WIDTH), lengths_B


@pytest.mark.parametrize("path", PATHS)
def test_states_and_gradients_agree_with_the_cpu(case, path):
    module, hidden_TD, lengths_B = case
    expected = outcome(module.cpu(), hidden_TD, lengths_B, "dense")
    measured = outcome(module.cuda(), hidden_TD, lengths_B, path)
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_stays_near(case, path):
    module, hidden_TD, lengths_B = case
    expected = outcome(module.cuda(), hidden_TD, lengths_B, "dense")
    measured = outcome(module.cuda(), hidden_TD, lengths_B, path, torch.bfloat16)
    for one, other in zip(measured[:2], expected[:2], strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def milliseconds(run, rounds: int = 20) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / rounds


def test_it_is_faster_than_the_librarys_layer():
    """Forward and backward of 32 sequences of 1,024 tokens in bf16, without dropout (FlexAttention has none)."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[WINDOW], num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs, ours = LongformerSelfAttention(config, 0).cuda(), BandedAttention(WIDTH, HEADS, dropout=0.0).cuda()
    hidden_BLD = torch.randn(32, 1024, WIDTH, device="cuda", requires_grad=True)
    mask_BL = torch.zeros(32, 1024, device="cuda")
    mask_BL[:, 0] = 10_000
    lengths_B = torch.full((32,), 1024, device="cuda")

    def library():
        return theirs(hidden_BLD, mask_BL, mask_BL < 0, mask_BL > 0, True)[0]

    runs = {"transformers": library}
    for path in PATHS:
        layout = BandLayout.of(lengths_B, WINDOW, HEADS, path)
        runs[path] = lambda layout=layout: ours(hidden_BLD.flatten(0, 1), layout)
    times, peaks = {}, {}
    for name, run in runs.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()

        def step(run=run):
            with torch.autocast("cuda", dtype=torch.bfloat16):
                mixed = run()
            mixed.float().sum().backward()

        times[name] = milliseconds(step)
        peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
        print(f"{name}: {times[name]:.2f} ms, peak {peaks[name]:,.0f} MiB")
    best = min(PATHS, key=times.get)
    assert times["transformers"] / times[best] > 2
    assert peaks[best] <= peaks["transformers"]
