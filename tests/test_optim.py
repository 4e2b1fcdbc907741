"""Learning rate and gradient guard."""

import json
import math

import pytest
import torch
from torch import nn

from diffusers_edm2.optim import guard_gradients, learning_rate
from golden_files import GOLDEN


def test_learning_rates_equal_reference():
    entries = json.loads((GOLDEN / "schedules.json").read_text())["learning_rate"]
    assert len(entries) == 9
    for e in entries:
        value = learning_rate(e["images_seen"], e["batch_size"], e["ref_lr"], e["ref_batches"], e["rampup_Mimg"] * 1e6)
        assert value == pytest.approx(e["value"], rel=1e-12)


def test_learning_rate_ramp_and_decay():
    assert learning_rate(0, 10, 1.0, 5, 100) == 0  # the very first step
    assert learning_rate(25, 10, 1.0, 5, 100) == 0.25
    assert learning_rate(200, 10, 1.0, 5, 100) == pytest.approx(1 / math.sqrt(200 / 50))
    assert learning_rate(0, 10, 0.7, 0, 0) == learning_rate(10**9, 10, 0.7, 0, 0) == 0.7


def test_guard_zeroes_non_finite_gradients_and_counts_them():
    a, b, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(5))
    a.grad = torch.tensor([3.0, math.nan, math.inf])
    b.grad = torch.tensor([[4.0, 0.0], [-math.inf, 12.0]])
    norm, bad = guard_gradients([a, b, frozen])
    assert a.grad.tolist() == [3.0, 0.0, 0.0] and b.grad.tolist() == [[4.0, 0.0], [0.0, 12.0]]
    assert norm.item() == 13 and bad.item() == 3
    norm, bad = guard_gradients([a, b])
    assert norm.item() == 13 and bad.item() == 0


def test_guard_needs_gradients():
    with pytest.raises(ValueError, match=r"no parameter has a gradient; call guard_gradients between backward\(\)"):
        guard_gradients([nn.Parameter(torch.zeros(1))])
