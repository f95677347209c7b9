"""HSTU on a CUDA device: the CPU's states and gradients with all its biases, half precision near them, and its speed.

Skipped, with the reason, where there is no CUDA device. `pytest tests/gpu/test_hstu.py -s` prints the times.
"""

import time

import pytest
import torch

from textrec.models.hstu import HSTU, HSTUConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def case(rows: int, columns: int):
    """Right-padded histories of all lengths, their times and the times of request."""
    source = torch.Generator().manual_seed(0)
    lengths_B = torch.randint(1, columns + 1, (rows,), generator=source)
    real_BL = torch.arange(columns) < lengths_B[:, None]
    items_BL = torch.randint(1, 501, (rows, columns), generator=source)
    waits_BL = torch.rand(rows, columns, generator=source).mul(13).exp().long()
    times_BL = 900_000_000 + waits_BL.cumsum(1)
    return items_BL * real_BL, times_BL * real_BL, times_BL[:, -1] + 100


def outcome(model, given, precision=None):
    """The states and all gradients of one pass, on the CPU."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype=precision or torch.bfloat16, enabled=precision is not None):
        states_TD = model(*(each.to(device) for each in given)).float()
    weights_TD = torch.linspace(-1, 1, states_TD.numel(), device=device).view_as(states_TD)
    gradients = torch.autograd.grad((states_TD * weights_TD).sum(), list(model.parameters()))
    return [each.detach().float().cpu() for each in (states_TD, *gradients)]


@pytest.mark.parametrize("num_heads", [1, 2])
def test_states_and_gradients_agree_with_the_cpu(num_heads):
    torch.manual_seed(0)
    model = HSTU(HSTUConfig(num_items=500, num_heads=num_heads, dropout=0.0))
    given = case(16, 200)
    expected, measured = outcome(model, given), outcome(model.cuda(), given)
    for one, other in zip(measured, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(1.0, other.abs().max().item()))


def test_half_precision_stays_near():
    torch.manual_seed(0)
    model, given = HSTU(HSTUConfig(num_items=500, dropout=0.0)).cuda(), case(16, 200)
    one, other = outcome(model, given, torch.bfloat16)[0], outcome(model, given)[0]
    assert (one - other).norm() < 0.02 * other.norm()


def test_speed():
    model, given = HSTU(HSTUConfig(num_items=3706)).cuda(), [each.cuda() for each in case(128, 200)]
    for round_ in range(13):
        if round_ == 3:
            torch.cuda.synchronize()
            started = time.perf_counter()
        model(*given).sum().backward()
    torch.cuda.synchronize()
    spent = (time.perf_counter() - started) / 10
    print(f"{spent * 1e3:.1f} ms a step, {int((given[0] != 0).sum()) / spent:,.0f} positions/s")
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
