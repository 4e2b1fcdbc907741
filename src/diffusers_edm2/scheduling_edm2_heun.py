"""EDM's second-order sampler and preconditioning as one self-contained Diffusers scheduler file.

Paper: "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM, arXiv 2206.00364).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


@dataclass
class EDM2HeunSchedulerOutput(BaseOutput):
    """Output of [`EDM2HeunScheduler.step`].

    Args:
        prev_sample (`Tensor` [B,...]): the sample to continue with, float32 or better.
        pred_original_sample (`Tensor` [B,...]): the denoised D(x; σ) of this network call.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class EDM2HeunScheduler(SchedulerMixin, ConfigMixin):
    """Heun's method with optional churn along the Karras noise ramp (EDM Algorithm 2, eq. 5, Table 1).

    `N` inference steps make `2N - 1` network calls, one for each of `timesteps`: two per step, one for the last, which
    goes to σ = 0. Timesteps are c_noise = ln(σ)/4, as in Diffusers' own EDM schedulers, which can take its place
    through `from_config`. Samples are computed in float32, or in float64 where they come in float64, whatever type
    the network returns.

    Churn (`s_churn` > 0) adds noise *before* a step's first network call. A loop that uses it calls
    [`~EDM2HeunScheduler.churn`] before `scale_model_input`.

    `sigmas` [N+1] holds the levels of the steps and a final 0, `call_sigmas` [2N-1] those of the network calls, both
    in float64 on the CPU.

    Args:
        sigma_min, sigma_max (`float`): the ends of the ramp, 0 < sigma_min < sigma_max.
        sigma_data (`float`): standard deviation of the training data.
        rho (`float`): curvature of the ramp; greater values put more steps at low noise.
        s_churn (`float`): total amount of churn, spread over the steps; 0 is deterministic.
        s_tmin, s_tmax (`float`): the noise levels between which there is churn; None for no upper limit.
        s_noise (`float`): factor on the standard deviation of the churn noise.
        num_train_timesteps (`int`): length of the ramp before `set_timesteps` is called.
    """

    config: Any  # with the arguments as attributes; Diffusers annotates a dict
    _compatibles = ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"]
    order = 2

    @register_to_config
    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        num_train_timesteps: int = 1000,
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min={sigma_min} and sigma_max={sigma_max} must satisfy 0 < sigma_min < sigma_max.")
        if sigma_data <= 0 or rho <= 0:
            raise ValueError(f"sigma_data={sigma_data} and rho={rho} must be positive.")
        if s_churn < 0 or s_noise < 0:
            raise ValueError(f"s_churn={s_churn} and s_noise={s_noise} must not be negative; 0 means no churn.")
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first sample: σ_max (EDM Algorithm 1)."""
        return self.config.sigma_max

    @property
    def step_index(self) -> int | None:
        """Number of the next network call in `timesteps`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Number of the first network call in `timesteps`, if set by `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at `timesteps[begin_index]`, which saves the search for the first timestep and its device sync."""
        if begin_index % 2 or not 0 <= begin_index < len(self.timesteps):
            raise ValueError(
                f"begin_index={begin_index} does not start a Heun step; use an even number below {len(self.timesteps)}."
            )
        self._begin_index = begin_index

    # -----------------------------------------------------------------------------------------------------------------
    # Preconditioning (EDM Table 1). sigma: a float, a scalar tensor, or one value per sample [B].

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """c_in x = x / sqrt(σ² + σ_data²)."""
        sample, sigma = _broadcast(sample, sigma)
        return sample / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """c_noise = ln(σ) / 4, the timestep that the network takes; the shape of `sigma`, [1] for a float."""
        if not isinstance(sigma, Tensor):
            sigma = torch.tensor([sigma], dtype=torch.float64)
            return (0.25 * sigma.log()).float()
        return 0.25 * sigma.to(_state_dtype(sigma)).log()

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: float | Tensor) -> Tensor:
        """D(x; σ) = σ_data²/(σ²+σ_data²) x + σ σ_data/sqrt(σ²+σ_data²) F, where F is the network's output."""
        sample, sigma = _broadcast(sample, sigma)
        sd = self.config.sigma_data
        c_skip = sd**2 / (sigma**2 + sd**2)
        c_out = sigma * sd / (sigma**2 + sd**2) ** 0.5
        return c_skip * sample + c_out * model_output.to(sample.dtype)

    # -----------------------------------------------------------------------------------------------------------------
    # Sampling

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Lay out the noise levels σ_0 > ... > σ_{N-1} and 0 (EDM eq. 5), and the timesteps of the network calls.

        Args:
            num_inference_steps (`int`): N, at least 1.
            device: where the timesteps go.
            sigmas (*optional*): noise levels of your own instead of the ramp: decreasing, positive, without the 0.
        """
        if sigmas is None:
            n = num_inference_steps
            if not isinstance(n, int) or n < 1:
                raise ValueError(f"num_inference_steps={n} must be a whole number from 1, unless sigmas are given.")
            high, low = self.config.sigma_max ** (1 / self.config.rho), self.config.sigma_min ** (1 / self.config.rho)
            levels = (high + torch.arange(n, dtype=torch.float64) / max(n - 1, 1) * (low - high)) ** self.config.rho
        else:
            levels = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
            if levels.ndim != 1 or not len(levels) or levels[-1] <= 0 or (levels.diff() >= 0).any():
                raise ValueError(f"sigmas={levels.tolist()} must be a decreasing list of positive noise levels.")
        self.num_inference_steps = len(levels)
        # float64 on the CPU: reading a level is exact for every sample type and never waits for an accelerator.
        self.sigmas = torch.cat([levels, levels.new_zeros(1)])
        # Calls alternate: step 0, then at each further level the correction of the step before and the step itself,
        # which churn moves to a higher level.
        self.call_sigmas = torch.stack([levels, levels * (1 + self._gamma(levels))], dim=1).flatten()[1:]
        self.timesteps = self.precondition_noise(self.call_sigmas).float().to(device)
        self._step_index = None
        self._begin_index = None
        self._churned_index = None
        self._first_order = None

    def _gamma(self, sigmas: Tensor) -> Tensor:
        """Relative increase of the noise level by churn, per level (EDM Algorithm 2, line 5)."""
        top = math.inf if self.config.s_tmax is None else self.config.s_tmax
        churned = (sigmas >= self.config.s_tmin) & (sigmas <= top)
        return churned.to(sigmas) * min(self.config.s_churn / len(sigmas), math.sqrt(2) - 1)

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """Number of the network call in `timesteps` that starts the step nearest to `timestep`."""
        return 2 * int((self.timesteps[::2] - torch.as_tensor(timestep).to(self.timesteps)).abs().argmin())

    def _current_index(self, timestep: float | Tensor) -> int:
        if self._step_index is not None:
            return self._step_index
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def churn(
        self,
        sample: Tensor,
        timestep: float | Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Raise the noise level of `sample` from σ to σ(1 + γ) (EDM Algorithm 2, lines 4 to 6).

        To be called before `scale_model_input`; without churn at this level it returns `sample` as it is, and so it
        does where sampling starts midway, from a sample that `add_noise` brought to `timesteps[begin_index]`.

        Args:
            sample (`Tensor` [B,...]): the current sample.
            timestep: the current one of `timesteps`.
            generator (*optional*): source of the noise, one, or a list with one per image.
            noise (`Tensor`, *optional*): unit noise to use instead of drawing it.
        """
        index = self._current_index(timestep)
        sample = sample.to(_state_dtype(sample))
        # A start midway is noised to timesteps[index], which is the raised level already.
        if index % 2 or (index > 0 and self._step_index is None):
            self._churned_index = index
            return sample
        sigma, sigma_hat = float(self.sigmas[index // 2]), float(self.call_sigmas[index])
        if sigma_hat > sigma:
            if noise is None:
                noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            sample = sample + math.sqrt(sigma_hat**2 - sigma**2) * self.config.s_noise * noise
        self._churned_index = index
        return sample

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """c_in x at the noise level of the current network call."""
        return self.precondition_inputs(sample, float(self.call_sigmas[self._current_index(timestep)]))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
    ) -> EDM2HeunSchedulerOutput | tuple[Tensor, Tensor]:
        """One network call's share of a Heun step (EDM Algorithm 2, lines 7 to 11).

        Args:
            model_output (`Tensor` [B,...]): the raw network output F.
            timestep: the current one of `timesteps`.
            sample (`Tensor` [B,...]): the sample that the network was called with, before `scale_model_input`.
            return_dict (`bool`): return an [`EDM2HeunSchedulerOutput`] instead of a tuple.

        Raises:
            ValueError: an integer timestep, or a noise level with churn for which `churn` was not called.
        """
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"timestep={timestep} is an integer; pass one of scheduler.timesteps, not its index.")
        self._step_index = index = self._current_index(timestep)
        sigma = float(self.call_sigmas[index])
        churned = index % 2 == 0 and sigma > float(self.sigmas[index // 2])
        if churned and self._churned_index != index:
            raise ValueError(
                f"s_churn={self.config.s_churn} adds noise at sigma={float(self.sigmas[index // 2]):g}, but churn() "
                "was not called before this step; call sample = scheduler.churn(sample, t, generator) before "
                "scale_model_input, or set s_churn=0."
            )

        sample = sample.to(_state_dtype(sample))
        denoised = self.precondition_outputs(sample, model_output, sigma)
        derivative = (sample - denoised) / sigma
        if index % 2 == 0:
            sigma_next = float(self.sigmas[index // 2 + 1])
            prev_sample = sample + (sigma_next - sigma) * derivative
            self._first_order = (sample, derivative, sigma_next - sigma)
        else:
            if self._first_order is None:
                raise ValueError(f"timestep={timestep} is the second half of a Heun step whose first half was not run.")
            start, start_derivative, dt = self._first_order
            prev_sample = start + dt * 0.5 * (start_derivative + derivative)
            self._first_order = None
        self._step_index += 1

        if not return_dict:
            return prev_sample, denoised
        return EDM2HeunSchedulerOutput(prev_sample=prev_sample, pred_original_sample=denoised)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: float | Tensor) -> Tensor:
        """y + σ n with σ = exp(4 timestep): any noise level, on the ramp or not; timesteps a scalar or [B]."""
        timesteps = torch.as_tensor(timesteps, device=original_samples.device)
        original_samples, sigma = _broadcast(original_samples, (4 * timesteps.to(_state_dtype(timesteps))).exp())
        return original_samples + sigma * noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _state_dtype(x: Tensor) -> torch.dtype:
    """float32 or better: at sigma_min = 0.002, σ² = 4e-6 is subnormal in float16."""
    return torch.promote_types(x.dtype, torch.float32)


def _broadcast(sample: Tensor, sigma: float | Tensor) -> tuple[Tensor, float | Tensor]:
    """`sample` in float32 or better, and `sigma` ([B] or scalar) in a shape and type to multiply it with."""
    sample = sample.to(_state_dtype(sample))
    if isinstance(sigma, Tensor):
        sigma = sigma.to(sample)
        if sigma.ndim == 1:
            sigma = sigma.reshape(-1, *[1] * (sample.ndim - 1))
    return sample, sigma
