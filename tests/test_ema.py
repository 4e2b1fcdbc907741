"""Power-function EMA: reference numbers, the defining integral, and use in any loop."""

import copy
import json

import pytest
import torch
from torch import nn

from diffusers_edm2.ema import PowerFunctionEMA, ema_beta, gamma_to_sigma_rel, sigma_rel_to_gamma
from golden_files import GOLDEN

SCHEDULES = json.loads((GOLDEN / "schedules.json").read_text())


def test_exponents_equal_reference():
    assert len(SCHEDULES["std_to_exp"]) == 10 and len(SCHEDULES["exp_to_std"]) == 6
    for std, exponent in SCHEDULES["std_to_exp"]:
        assert sigma_rel_to_gamma(std) == pytest.approx(exponent, rel=1e-9)
        assert gamma_to_sigma_rel(exponent) == pytest.approx(std, rel=1e-9)
    for exponent, std in SCHEDULES["exp_to_std"]:
        assert gamma_to_sigma_rel(exponent) == pytest.approx(std, rel=1e-12)


def test_decays_equal_reference():
    assert len(SCHEDULES["beta"]) == 15
    for std, nimg, batch, value in SCHEDULES["beta"]:
        assert ema_beta(sigma_rel_to_gamma(std), nimg, batch) == pytest.approx(value, rel=1e-9, abs=1e-15)


class Clock(nn.Module):
    """A weight that equals the time, so that its average is the centre of mass of the EMA's profile."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def centre_of_mass(sigma_rel: float, total: int, interval: int) -> float:
    clock = Clock()
    ema = PowerFunctionEMA(clock, [sigma_rel])
    for nimg in range(interval, total + 1, interval):
        torch.nn.init.constant_(clock.weight, nimg / total)
        ema.update(nimg)
    return ema.averaged(sigma_rel)["weight"][0].item()


@pytest.mark.parametrize("sigma_rel", [0.05, 0.10, 0.20])
@pytest.mark.parametrize("interval", [4, 64, 400])
def test_profile_is_the_power_function_at_any_interval(sigma_rel, interval):
    """The profile t^gamma has its centre of mass at (gamma+1)/(gamma+2).

    A decay meant for one step, used every hundred, would put it at 0.15 of the run instead of 0.95.
    """
    gamma = sigma_rel_to_gamma(sigma_rel)
    # an interval of 1 % of the run shifts the weight of each interval to its end
    assert centre_of_mass(sigma_rel, 40_000, interval) == pytest.approx(
        (gamma + 1) / (gamma + 2), abs=interval / 40_000 + 1e-3
    )


def test_buffers_and_frozen_parameters_are_copied():
    clock = Clock().to(torch.float64)
    ema = PowerFunctionEMA(clock, [0.05, 0.1])
    for nimg in (10, 20):
        with torch.no_grad():
            clock.weight.add_(1)
            clock.frozen.add_(1)
            clock.count.add_(3)
        ema.update(nimg)
    for sigma_rel in (0.05, 0.1):
        average = ema.averaged(sigma_rel)
        assert average["count"].item() == 6 and average["count"].dtype == torch.int64
        assert average["frozen"].item() == 3
        assert 1 < average["weight"][0] < 2 and average["weight"].dtype == torch.float64


def test_half_precision_weights_are_averaged_in_float32():
    linear = nn.Linear(2, 2).to(torch.bfloat16)
    ema = PowerFunctionEMA(linear, [0.05])
    for nimg in (1000, 1001):
        with torch.no_grad():
            linear.weight.fill_(1.0 if nimg == 1000 else 2.0)
        ema.update(nimg)
    average = ema.averaged(0.05)["weight"]
    assert average.dtype == torch.float32
    assert average[0, 0].item() == pytest.approx(2 - ema_beta(sigma_rel_to_gamma(0.05), 1001, 1), rel=1e-6)
    fresh = nn.Linear(2, 2).to(torch.bfloat16)
    ema.copy_to(fresh, 0.05)
    assert torch.equal(fresh.weight, average.to(torch.bfloat16))


def test_state_dict_continues_bitwise():
    torch.manual_seed(0)
    linear = nn.Linear(3, 3)
    steps = [torch.randn(3, 3) for _ in range(6)]

    def run(ema, first, last):
        for i in range(first, last):
            linear.weight.data.copy_(steps[i])
            ema.update((i + 1) * 8)

    straight = PowerFunctionEMA(linear)
    run(straight, 0, 6)
    first_half = PowerFunctionEMA(linear)
    run(first_half, 0, 3)
    state = copy.deepcopy(first_half.state_dict())
    resumed = PowerFunctionEMA(nn.Linear(3, 3))
    resumed.module = linear
    resumed.load_state_dict(state)
    run(resumed, 3, 6)
    assert not torch.equal(state["tracks"][0.05]["weight"], resumed.averaged(0.05)["weight"])  # copied, not shared
    assert resumed.nimg == 48
    for sigma_rel in (0.05, 0.10):
        assert torch.equal(resumed.averaged(sigma_rel)["weight"], straight.averaged(sigma_rel)["weight"])


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0])
def test_sigma_rel_range(sigma_rel):
    with pytest.raises(ValueError, match=rf"sigma_rel={sigma_rel} is not in \(0, 0.2886\]"):
        sigma_rel_to_gamma(sigma_rel)


def test_errors():
    linear = nn.Linear(2, 2)
    ema = PowerFunctionEMA(linear)
    ema.update(8)
    with pytest.raises(ValueError, match=r"update\(nimg=8\) after nimg=8: the number of images seen has to grow"):
        ema.update(8)
    with pytest.raises(ValueError, match=r"sigma_rel=0.07 is not tracked; the tracks are \[0.05, 0.1\]"):
        ema.averaged(0.07)
    with pytest.raises(ValueError, match=r"sigma_rel=\[0.1, 0.1\] must be one or more different lengths"):
        PowerFunctionEMA(linear, [0.1, 0.1])
    with pytest.raises(ValueError, match=r"the state tracks sigma_rel \[0.05, 0.1\], this EMA \[0.05\]"):
        PowerFunctionEMA(linear, [0.05]).load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match="the state belongs to another network: bias and 1 others differ"):
        PowerFunctionEMA(nn.Linear(3, 2, bias=False)).load_state_dict(ema.state_dict())
