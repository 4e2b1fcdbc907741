"""The scheduler: closed forms, reference samples, and Diffusers' contract."""

import copy
import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from golden_files import load_golden

OPTIONS = {"S_churn": "s_churn", "S_min": "s_tmin", "S_max": "s_tmax", "S_noise": "s_noise"}
CASES = ["one_step", "heun18", "heun32", "rho5", "guided", "churn", "churn_guided"]


def network_output(D, x, sigma: float, sd: float = 0.5):
    """The F that a network has to return for the denoised D: the preconditioning of EDM Table 1, solved for F."""
    return (D - sd**2 / (sigma**2 + sd**2) * x) / (sigma * sd / math.sqrt(sigma**2 + sd**2))


def sample(scheduler, x, denoise, steps: int, churn_noise=None):
    """A sampling loop as pipelines write it; `denoise(x, sigma)` is the closed-form denoiser."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    used = 0
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.call_sigmas[i]) if hasattr(scheduler, "call_sigmas") else math.exp(4 * t.item())
        if i % 2 == 0 and churn_noise is not None and sigma > float(scheduler.sigmas[i // 2]):
            x = scheduler.churn(x, t, noise=churn_noise[used])
            used += 1
        scheduler.scale_model_input(x, t)
        x = scheduler.step(network_output(denoise(x, sigma), x, sigma), t, x).prev_sample
    assert churn_noise is None or used == len(churn_noise) > 0
    return x


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("case", CASES)
def test_samples_equal_reference(case, precision):
    tensors, metadata = load_golden("sampler.safetensors")
    settings = dict(metadata[case])
    steps, weight = settings.pop("num_steps"), settings.pop("guidance", 1)
    scheduler = EDM2HeunScheduler(**{OPTIONS.get(k, k): v for k, v in settings.items()})

    def denoise(x, sigma):
        main = 0.1 + (x - 0.1) * 0.25 / (0.25 + sigma**2)
        guide = -0.2 + (x + 0.2) * 0.49 / (0.49 + sigma**2)
        return torch.lerp(guide, main, weight) if weight != 1 else main

    expected = tensors[f"{case}/{precision}/result"]
    noise, churn_noise = tensors["noise"].to(expected.dtype), tensors.get(f"{case}/{precision}/churn_noise")
    found = sample(scheduler, noise, denoise, steps, churn_noise)
    assert found.dtype == expected.dtype
    # Rounding only, 2**-23 or 2**-52 times a few operations. `one_step` amplifies it: x - D, with |x| < 1, is divided
    # by sigma 0.002 and multiplied by half the step of 80.
    epsilon = 2e-6 if precision == "f32" else 1e-14
    torch.testing.assert_close(found, expected, rtol=epsilon, atol=epsilon * (100 if case == "one_step" else 1))


def gaussian(x, sigma):
    """The optimal denoiser of N(0, 0.5²): c_skip x."""
    return x * 0.25 / (0.25 + sigma**2)


def test_gaussian_data_are_sampled_at_second_order():
    """The exact solution of the flow from sigma = 80 is noise * 80 * 0.5 / sqrt(80² + 0.5²)."""
    noise = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    exact = noise * 80 * 0.5 / math.hypot(80, 0.5)
    error = [(sample(EDM2HeunScheduler(), noise, gaussian, n) / exact - 1).abs().max() for n in (32, 64)]
    assert error[0] < 0.02
    assert error[0] / error[1] > 3.5


def test_churn_keeps_the_variance_of_gaussian_data():
    """Churn adds noise that the following step removes: the result still has variance 0.5²."""
    torch.manual_seed(0)
    scheduler = EDM2HeunScheduler(s_churn=40, s_tmin=0.05, s_tmax=50)
    scheduler.set_timesteps(64)
    first = 80 * torch.randn(1, 1, 300, 300, dtype=torch.float64)
    x = first
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.churn(x, t)
        sigma = float(scheduler.call_sigmas[i])
        x = scheduler.step(network_output(gaussian(x, sigma), x, sigma), t, x).prev_sample
    assert x.std().item() == pytest.approx(0.5, rel=0.02)
    # the end no longer depends on the start
    assert abs(torch.corrcoef(torch.stack([x.flatten(), first.flatten()]))[0, 1].item()) < 0.1


def test_ramp_and_network_calls():
    scheduler = EDM2HeunScheduler()
    scheduler.set_timesteps(18)
    assert len(scheduler.timesteps) == 35 and len(scheduler.sigmas) == 19
    assert scheduler.sigmas[0] == pytest.approx(80, rel=1e-12) and scheduler.sigmas[17] == pytest.approx(
        0.002, rel=1e-12
    )
    assert scheduler.sigmas[18] == 0 and scheduler.init_noise_sigma == 80 and scheduler.order == 2
    assert scheduler.timesteps[0].item() == pytest.approx(math.log(80) / 4, rel=1e-7)


@pytest.mark.parametrize("cls, tolerance", [(EDMEulerScheduler, 0.02), (EDMDPMSolverMultistepScheduler, 2e-3)])
def test_other_schedulers_drop_in(cls, tolerance):
    """Same contract, same network, same result as far as their order allows (200 steps)."""
    ours = EDM2HeunScheduler(sigma_max=50.0, sigma_min=0.01, sigma_data=0.5, rho=6.0)
    theirs = cls.from_config(ours.config)
    assert cls in ours.compatibles
    assert (theirs.config.sigma_max, theirs.config.sigma_min, theirs.config.rho) == (50.0, 0.01, 6.0)
    back = EDM2HeunScheduler.from_config(theirs.config)
    assert (back.config.sigma_max, back.config.sigma_min, back.config.rho) == (50.0, 0.01, 6.0)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    denoise = lambda x, sigma: 0.1 + (x - 0.1) * 0.09 / (0.09 + sigma**2)  # noqa: E731
    expected, found = (sample(s, noise, denoise, 200) for s in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# --- Diffusers' contract ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.002), (torch.bfloat16, 0.02)])
def test_state_stays_float32_whatever_the_network_returns(dtype, tolerance):
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    scheduler = EDM2HeunScheduler()
    scheduler.set_timesteps(8)
    x = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.call_sigmas[i])
        assert scheduler.scale_model_input(x, t).dtype == torch.float32
        F_x = network_output(gaussian(x.float(), sigma), x.float(), sigma) + 0.5
        output = scheduler.step(F_x.to(dtype), t, x)
        x = output.prev_sample
        assert x.dtype == output.pred_original_sample.dtype == torch.float32
    denoise = lambda x, s: gaussian(x, s) + 0.5 * s * 0.5 / math.sqrt(s**2 + 0.25)  # noqa: E731
    exact = sample(EDM2HeunScheduler(), noise.float(), denoise, 8)
    assert ((x - exact).norm() / exact.norm()) < tolerance


def test_preconditioning_takes_one_sigma_per_sample():
    scheduler = EDM2HeunScheduler(sigma_data=0.7)
    x, F_x, sigma = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.01, 1.0, 30.0])
    D, c_in_x = scheduler.precondition_outputs(x, F_x, sigma), scheduler.precondition_inputs(x, sigma)
    for i, s in enumerate(sigma.tolist()):
        c_skip, c_out = 0.49 / (s**2 + 0.49), s * 0.7 / math.sqrt(s**2 + 0.49)
        torch.testing.assert_close(D[i], c_skip * x[i] + c_out * F_x[i])
        torch.testing.assert_close(c_in_x[i], x[i] / math.sqrt(s**2 + 0.49))
        torch.testing.assert_close(scheduler.precondition_outputs(x, F_x, s)[i], D[i])
    torch.testing.assert_close(scheduler.precondition_noise(sigma), sigma.log() / 4)
    assert scheduler.precondition_noise(2.0).item() == pytest.approx(math.log(2) / 4, rel=1e-6)


def test_add_noise_at_any_level():
    scheduler = EDM2HeunScheduler()
    scheduler.set_timesteps(10)
    x, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    on_ramp = scheduler.add_noise(x, noise, scheduler.timesteps[5][None])
    torch.testing.assert_close(on_ramp, x + float(scheduler.call_sigmas[5]) * noise, rtol=1e-5, atol=1e-5)
    sigma = torch.tensor([0.1234, 3.0])
    off_ramp = scheduler.add_noise(x, noise, sigma.log() / 4)
    torch.testing.assert_close(off_ramp, x + sigma[:, None, None, None] * noise, rtol=1e-5, atol=1e-5)


def test_timestep_lookup_survives_half_precision_and_starting_midway():
    noise = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    scheduler = EDM2HeunScheduler()
    scheduler.set_timesteps(64)
    for index in (0, 2, 126):
        assert scheduler.index_for_timestep(scheduler.timesteps[index].half()) == index
    assert scheduler.scale_model_input(noise, 0.0).isfinite().all() and scheduler.step_index is None
    start = 40  # image to image: noise to the level of step 20 and go on from there
    x = math.sqrt(0.25 + float(scheduler.call_sigmas[start]) ** 2) * noise
    for begin in (None, start):
        scheduler.set_timesteps(64)
        if begin is not None:
            scheduler.set_begin_index(begin)
        y = x
        for i, t in list(enumerate(scheduler.timesteps))[start:]:
            sigma = float(scheduler.call_sigmas[i])
            y = scheduler.step(network_output(gaussian(y, sigma), y, sigma), t, y).prev_sample
        assert scheduler.step_index == 127
        torch.testing.assert_close(y, 0.5 * noise, rtol=0.03, atol=0)


def test_churn_starts_midway_from_the_raised_level():
    """add_noise(timesteps[i]) noises to the level after churn, which churn must not raise again."""
    scheduler = EDM2HeunScheduler(s_churn=40)
    scheduler.set_timesteps(32)
    scheduler.set_begin_index(20)
    image, noise = torch.zeros(1, 1, 200, 200), torch.randn(1, 1, 200, 200)
    t = scheduler.timesteps[20]
    x = scheduler.add_noise(image, noise, t)
    assert torch.equal(scheduler.churn(x, t), x)
    assert x.std().item() == pytest.approx(float(scheduler.call_sigmas[20]), rel=0.02)
    scheduler.step(x, t, x)
    x = scheduler.step(x, scheduler.timesteps[21], x).prev_sample
    assert not torch.equal(scheduler.churn(x, scheduler.timesteps[22]), x)


def test_own_noise_levels():
    scheduler = EDM2HeunScheduler()
    scheduler.set_timesteps(sigmas=[10.0, 1.0, 0.1])
    assert scheduler.sigmas.tolist() == [10.0, 1.0, 0.1, 0.0] and len(scheduler.timesteps) == 5
    with pytest.raises(ValueError, match=r"sigmas=\[1.0, 2.0\] must be a decreasing list of positive noise levels"):
        scheduler.set_timesteps(sigmas=[1.0, 2.0])


def test_config_round_trip_and_deepcopy(tmp_path):
    scheduler = EDM2HeunScheduler(s_churn=10, s_tmax=50.0)
    scheduler.save_pretrained(tmp_path)
    assert "Infinity" not in (tmp_path / "scheduler_config.json").read_text()
    loaded = EDM2HeunScheduler.from_pretrained(tmp_path)
    noise = torch.randn(1, 3, 4, 4)
    results = []
    for s in (scheduler, loaded, copy.deepcopy(scheduler)):
        s.set_timesteps(4)
        results.append(sample(s, noise, gaussian, 4, churn_noise=[noise] * 3))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# --- Errors --------------------------------------------------------------------------------------------------------


def test_churn_that_was_left_out_is_an_error():
    scheduler = EDM2HeunScheduler(s_churn=10)
    scheduler.set_timesteps(4)
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=r"s_churn=10 adds noise at sigma=80, but churn\(\) was not called"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_integer_timesteps_are_an_error():
    scheduler, x = EDM2HeunScheduler(), torch.zeros(1, 3, 4, 4)
    for timestep in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match="is an integer; pass one of scheduler.timesteps, not its index"):
            scheduler.step(x, timestep, x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sigma_min": 90.0}, "sigma_min=90.0 and sigma_max=80.0 must satisfy 0 < sigma_min < sigma_max"),
        ({"sigma_data": 0.0}, "sigma_data=0.0 and rho=7.0 must be positive"),
        ({"s_churn": -1.0}, "s_churn=-1.0 and s_noise=1.0 must not be negative"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        EDM2HeunScheduler(**options)


def test_step_errors():
    scheduler, x = EDM2HeunScheduler(), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="num_inference_steps=0 must be a whole number from 1"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match=r"num_inference_steps=2.5 must be a whole number from 1"):
        scheduler.set_timesteps(2.5)
    with pytest.raises(ValueError, match="begin_index=3 does not start a Heun step; use an even number below 1999"):
        scheduler.set_begin_index(3)
    scheduler.set_timesteps(4)
    scheduler._step_index = 1
    with pytest.raises(ValueError, match="second half of a Heun step whose first half was not run"):
        scheduler.step(x, scheduler.timesteps[1], x)
