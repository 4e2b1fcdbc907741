"""The training objective of EDM2 (arXiv 2312.02696 Section 2.2 and Appendix B; EDM, arXiv 2206.00364, Section 5)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass
class EDM2LossOutput:
    """What a training step needs, and what a log wants to know.

    Args:
        loss (scalar, float32): sum over channels and pixels, mean over the batch; to be differentiated.
        loss_per_sample ([B], float32, detached): the same loss, mean over channels and pixels.
        logvar ([B], float32, detached): u(σ).
        sigma ([B], float32): the noise levels that were drawn.
    """

    loss: Tensor
    loss_per_sample: Tensor
    logvar: Tensor
    sigma: Tensor


def stream_seed(seed: int, number: int, use: int) -> int:
    """Seed of one of the random streams of training image `number`, in [0, 2^63): a pure function of its arguments.

    Args:
        seed: of the whole run.
        number: of the image, counted from the start of the run.
        use: which of the image's streams.
    """
    return int(np.random.SeedSequence((seed, number, use)).generate_state(1, np.uint64)[0] >> 1)


def noise_generators(seed: int, numbers: Sequence[int], device: torch.device | str = "cpu") -> list[torch.Generator]:
    """One generator per training image, for `EDM2Loss.draw`: noise that does not depend on how a batch is divided."""
    return [torch.Generator(device).manual_seed(stream_seed(seed, number, use=0)) for number in numbers]


def drop_labels(labels: Tensor, probability: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Class labels (long [B]), each replaced by -1, no class, with `probability` (arXiv 2207.12598, Algorithm 1).

    The generators, one per image, are drawn from only if the probability is not 0.
    """
    if probability == 0:
        return labels
    draws = torch.cat([torch.rand(1, generator=g, device=labels.device) for g in generators])
    return labels.where(draws >= probability, -1)


class EDM2Loss:
    """Denoising loss weighted by a learned uncertainty (EDM2 eq. 14, 15, 21).

        ln σ ~ N(P_mean, P_std²),  n ~ N(0, σ² I),  λ(σ) = (σ² + σ_data²) / (σ σ_data)²
        loss = λ(σ) / exp(u) * (D(y + n; σ) - y)² + u

    Args:
        P_mean, P_std (`float`): mean and standard deviation of ln σ (EDM2 Table 6); P_std > 0.
    """

    def __init__(self, P_mean: float = -0.4, P_std: float = 1.0):
        if P_std <= 0:
            raise ValueError(f"P_std={P_std} must be positive: it is the standard deviation of ln(sigma).")
        self.P_mean = P_mean
        self.P_std = P_std

    def draw(
        self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Noise levels σ [B] and unit noise of the images' shape, float32.

        With one generator per image, an image's draws do not depend on the batch or the process that it is in.
        """
        shape, kwargs = images.shape[1:], {"device": images.device, "dtype": torch.float32}
        if not isinstance(generator, Sequence):
            rnd_normal = torch.randn(len(images), generator=generator, **kwargs)
            noise = torch.randn(images.shape, generator=generator, **kwargs)
        elif len(generator) != len(images):
            raise ValueError(f"{len(generator)} generators for {len(images)} images; pass one per image, or just one.")
        else:
            rnd_normal = torch.cat([torch.randn(1, generator=g, **kwargs) for g in generator])
            noise = torch.stack([torch.randn(shape, generator=g, **kwargs) for g in generator])
        return (self.P_mean + self.P_std * rnd_normal).exp(), noise

    def __call__(
        self, unet, scheduler, images: Tensor, class_labels: Tensor | None, sigma: Tensor, noise: Tensor
    ) -> EDM2LossOutput:
        """One forward pass.

        Args:
            unet: the network, or a wrapper of it, called as `unet(x, c_noise, labels, return_logvar=True)`.
            scheduler: gives the preconditioning and its `config.sigma_data`.
            images (`Tensor` [B,C,H,W]): clean samples with standard deviation σ_data.
            class_labels (`Tensor`, *optional*): long [B] or float [B,N].
            sigma (`Tensor` [B]), noise (`Tensor` [B,C,H,W]): from `draw`.
        """
        y = images.float()
        x = y + sigma[:, None, None, None] * noise
        F_x, u = unet(
            scheduler.precondition_inputs(x, sigma),
            scheduler.precondition_noise(sigma),
            class_labels,
            return_dict=False,
            return_logvar=True,
        )
        D_x = scheduler.precondition_outputs(x, F_x, sigma)
        sd = scheduler.config.sigma_data
        weight = (sigma**2 + sd**2) / (sigma * sd) ** 2
        squared_error = ((D_x - y) ** 2).flatten(1)
        # u is one number per sample, and so counts once per channel and pixel in the sum.
        per_sample = weight / u.exp() * squared_error.mean(1) + u
        loss = squared_error.shape[1] * per_sample.mean()
        return EDM2LossOutput(loss, per_sample.detach(), u.detach(), sigma)
