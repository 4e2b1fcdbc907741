"""Power-function EMA: reference numbers, the defining integral, and use in any loop."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from diffusers_edm2.ema import (
    PowerFunctionEMA,
    ema_beta,
    gamma_to_sigma_rel,
    parse_sigma_rel,
    parse_snapshot_name,
    posthoc_coefficients,
    posthoc_profiles,
    profile_density,
    sigma_rel_to_gamma,
    snapshot_name,
)
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


# ---- Post-hoc EMA --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(4))
def test_posthoc_coefficients_equal_reference(case):
    """The largest condition number of the four systems is 6e3, that of their scaled matrices 7e2: 1e-12 is rounding."""
    golden = SCHEDULES["posthoc"][case]
    snapshots = list(zip(golden["in_std"], golden["in_images"], strict=True))
    targets = [(std, golden["out_images"]) for std in golden["out_std"]]
    coefficients, _ = posthoc_coefficients(snapshots, targets)
    assert coefficients.shape == (len(snapshots), len(targets)) and len(targets) >= 2
    np.testing.assert_allclose(coefficients, golden["coefficients"], rtol=0, atol=1e-12)


SNAPSHOTS = [(std, nimg) for nimg in (100, 200, 300, 400) for std in (0.05, 0.10)]


def test_profile_error_is_the_distance_of_the_profiles():
    """The closed form against Gauss-Legendre quadrature between the snapshots, which is exact to 1e-9 for these."""
    targets = [(0.02, 400), (0.07, 400), (0.20, 400), (0.07, 300)]
    coefficients, errors = posthoc_coefficients(SNAPSHOTS, targets)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    times = np.concatenate([50 * (nodes + 1) + 100 * i for i in range(4)])
    weights = np.tile(50 * weights, 4)
    built = coefficients.T @ np.stack([profile_density(*snapshot, times) for snapshot in SNAPSHOTS])
    wanted = np.stack([profile_density(*target, times) for target in targets])
    np.testing.assert_allclose(wanted @ weights, 1, rtol=1e-9)
    np.testing.assert_allclose(built @ weights, 1, rtol=1e-9)
    distances = np.sqrt((built - wanted) ** 2 @ weights / (wanted**2 @ weights))
    np.testing.assert_allclose(errors, distances, rtol=1e-8)
    assert 0.2 < errors[0] < 0.4 and 0.01 < errors[1] < 0.05


def test_profiles_for_a_plot():
    targets = [(0.02, 400), (0.07, 300)]
    times, wanted, built = posthoc_profiles(SNAPSHOTS, targets, points=40_001)
    assert wanted.shape == built.shape == (2, 40_001) and (times[0], times[-1]) == (0, 400)
    _, errors = posthoc_coefficients(SNAPSHOTS, targets)
    distances = np.sqrt(((built - wanted) ** 2).sum(1) / (wanted**2).sum(1))
    np.testing.assert_allclose(distances, errors, rtol=2e-3)  # a sum over 40 000 points for an integral
    assert not wanted[1, times > 300].any() and not built[1, times > 300].any()


def test_coefficients_of_what_is_there_and_of_what_comes_later():
    coefficients, errors = posthoc_coefficients(SNAPSHOTS, [(0.10, 300), (0.07, 300), (0.07, 100)])
    assert coefficients[:, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0] and errors[0] == 0
    assert not coefficients[6:, 1].any() and not coefficients[2:, 2].any()
    alone, _ = posthoc_coefficients(SNAPSHOTS[:6], [(0.07, 300)])
    assert np.array_equal(coefficients[:6, 1:2], alone)
    with pytest.raises(ValueError, match="nimg=99: the first snapshot comes after it, at 100 images"):
        posthoc_coefficients(SNAPSHOTS, [(0.07, 99)])


def test_nearly_dependent_profiles_keep_small_coefficients():
    """Four tracks, 256 times: float64 cannot tell all profiles apart (a plain solution has sums of 100 and more)."""
    snapshots = [(std, nimg) for nimg in range(1, 257) for std in (0.02, 0.05, 0.10, 0.20)]
    coefficients, errors = posthoc_coefficients(snapshots, [(0.03, 256), (0.07, 256), (0.15, 256)])
    assert (np.abs(coefficients).sum(0) < 10).all()
    assert (errors < 1e-5).all()


def test_a_decay_for_one_step_used_every_hundred_forgets_too_little():
    """The trap that measuring from call to call avoids: 0.15 of the run in place of 0.95."""
    gamma, batch, interval, total = sigma_rel_to_gamma(0.05), 4, 400, 400_000
    naive = 0.0
    for nimg in range(interval, total + 1, interval):
        naive += (1 - ema_beta(gamma, nimg, batch)) * (nimg / total - naive)
    assert naive == pytest.approx(0.15, abs=0.005)
    assert centre_of_mass(0.05, total, interval) == pytest.approx(0.95, abs=0.005)


# ---- Names and lists -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nimg", "sigma_rel", "name"),
    [
        (524288, 0.05, "unet-000524288-0.050"),
        (2**31, 0.1, "unet-2147483648-0.100"),
        (8, 0.0525, "unet-000000008-0.0525"),
        (8, 0.00001, "unet-000000008-0.00001"),
        (8, 0.1 + 0.2 - 0.15, "unet-000000008-0.15000000000000005"),
    ],
)
def test_snapshot_names_are_exact(nimg, sigma_rel, name):
    assert snapshot_name(nimg, sigma_rel) == name
    assert parse_snapshot_name(name) == (nimg, sigma_rel)


@pytest.mark.parametrize(
    "name", ["unet-524288-0.050", "unet-000524288", ".tmp-1-unet-000524288-0.050", "unet-000524288-0.050-float16"]
)
def test_other_names_are_no_snapshots(name):
    assert parse_snapshot_name(name) is None


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("0.05", (0.05,)),
        ("0.10, 0.05", (0.10, 0.05)),
        ("0.03,0.05,...,0.11", (0.03, 0.05, 0.07, 0.09, 0.11)),
        ("0.03,0.05,...,0.19", tuple(i / 100 for i in range(3, 20, 2))),
        ("0.03,0.05,...,0.20", (*(i / 100 for i in range(3, 20, 2)), 0.20)),
        ("0.01,0.02,0.05,...,0.09,0.2", (0.01, 0.02, 0.05, 0.08, 0.09, 0.2)),
        ("0.1,0.1001,...,0.1003", (0.1, 0.1001, 0.1002, 0.1003)),
    ],
)
def test_lists_of_lengths(text, lengths):
    assert parse_sigma_rel(text) == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.05,x", r'"0.05,x" is not a list of lengths; write numbers with commas'),
        ("", '"" is not a list of lengths'),
        ("0.05,...,0.2", "is not a list of lengths"),
        ("0.1,0.05,...,0.2", "is not a list of lengths"),
        ("0.05,0.1,...", "is not a list of lengths"),
        ("0.05,0.1,...,0.1", "is not a list of lengths"),
        ("0.05,nan,...,0.1", "is not a list of lengths"),
        ("0.05,0.1,0.050", '"0.05,0.1,0.050" has a length twice'),
        ("0.05,0.3", r"sigma_rel=0.3 is not in \(0, 0.2886\]"),
        ("nan", r"sigma_rel=nan is not in \(0, 0.2886\]"),
        ("0.05,0.1,...,inf", "is not a list of lengths"),
    ],
)
def test_lists_of_lengths_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sigma_rel(text)


def test_a_module_that_does_not_train_and_one_with_extra_state():
    class WithExtraState(nn.Linear):
        def get_extra_state(self):
            return {"version": 3}

        def set_extra_state(self, state):
            assert state == {"version": 3}

    frozen = nn.Linear(2, 2).requires_grad_(False)
    ema = PowerFunctionEMA(frozen)
    frozen.weight.fill_(7)
    ema.update(16)
    assert torch.equal(ema.averaged(0.05)["weight"], frozen.weight)
    module, copy = WithExtraState(2, 2), WithExtraState(2, 2)
    ema = PowerFunctionEMA(module)
    ema.update(16)
    ema.copy_to(copy, 0.05)
    assert torch.equal(copy.weight, ema.averaged(0.05)["weight"]) and ema.averaged(0.05).keys() == {"weight", "bias"}
