"""Between stored images and what the network sees: RGB in [-1, 1], and VAE latents whitened to sigma_data.

The latents of EDM2 are those of `stabilityai/sd-vae-ft-mse` fed images in [0, 1]. The constants below are the
mean and standard deviation of each raw channel over ImageNet-512 (EDM2, arXiv 2312.02696). Another VAE has others,
which `channel_moments` and `channel_statistics` find.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RAW_MEAN = (5.81, 3.25, 0.12, -2.15)
RAW_STD = (4.17, 4.62, 3.71, 3.28)
SIGMA_DATA = 0.5


def scale_rgb(images: Tensor) -> Tensor:
    """Stored images to what the network sees, `x / 127.5 - 1`: uint8 0..255, any shape, to float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def unscale_rgb(samples: Tensor) -> Tensor:
    """Network samples to display values, `(x + 1) / 2` clamped: float, any shape, to [0, 1] in the same dtype."""
    return (samples / 2 + 0.5).clamp(0, 1)


def quantize_rgb(samples: Tensor) -> Tensor:
    """Network samples to stored images: the nearest uint8, clamped to 0..255. Undoes `scale_rgb` exactly."""
    return ((samples.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def whiten(
    raw: Tensor,
    mean: Sequence[float] = RAW_MEAN,
    std: Sequence[float] = RAW_STD,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """Raw VAE latents to what the network sees: each channel to mean 0 and standard deviation `sigma_data`.

        x = (raw - mean) * sigma_data / std

    Args:
        raw: latents [B, C, H, W]; half precision is widened to float32, the result is at least that.
        mean, std: C numbers each, the statistics of the raw channels.

    Raises:
        ValueError: `mean` and `std` do not have one number per channel.
    """
    mean_c, std_c = _per_channel(raw, mean, std)
    return (raw - mean_c) * (sigma_data / std_c)


def unwhiten(
    latents: Tensor,
    mean: Sequence[float] = RAW_MEAN,
    std: Sequence[float] = RAW_STD,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """The inverse of `whiten`: raw latents [B, C, H, W] for the VAE decoder, `latents * std / sigma_data + mean`."""
    mean_c, std_c = _per_channel(latents, mean, std)
    return latents * (std_c / sigma_data) + mean_c


def sample_posterior(
    moments: Tensor,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    mean: Sequence[float] = RAW_MEAN,
    std: Sequence[float] = RAW_STD,
    sigma_data: float = SIGMA_DATA,
) -> Tensor:
    """Draw whitened latents [B, C, H, W] from stored posteriors, anew each time an image is read.

        x = whiten(m + s * eps),  eps ~ N(0, 1)

    Args:
        moments: [B, 2C, H, W], first the C means m, then the C standard deviations s, of the raw latents.
        generator: one for the batch, or one per image, which makes an image's draw independent of the batch it is
            in. The noise is drawn in float32 on the generator's device (without one, on that of `moments`).
        mean, std: C numbers each, the statistics of the raw channels.

    Raises:
        ValueError: an odd number of channels, a list of generators of another length than the batch, or
            statistics of another length than C.
    """
    batch, channels, *size = moments.shape
    if channels % 2:
        raise ValueError(
            f"Stored latents have {channels} channels; a mean and a standard deviation per latent channel "
            "make an even number. Prepare the data set again, or train on it as images."
        )
    shape = (channels // 2, *size)
    if generator is None or isinstance(generator, torch.Generator):
        device = moments.device if generator is None else generator.device
        noise = torch.randn(batch, *shape, generator=generator, device=device)
    elif len(generator) == batch:
        noise = torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generator])
    else:
        raise ValueError(f"{len(generator)} generators for {batch} images; pass one, or one per image.")
    m, s = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
    return whiten(m + s * noise.to(moments.device), mean, std, sigma_data)


def load_vae(name: str) -> Any:
    """The `AutoencoderKL` in a folder or on the Hub; of a whole pipeline, the one in its subfolder `vae`.

    Raises:
        ValueError: there is none, or it is of another class.
    """
    from diffusers import AutoencoderKL

    reasons = []
    for subfolder in (None, "vae"):
        try:
            config: Any = AutoencoderKL.load_config(name, subfolder=subfolder)
        except (OSError, ValueError) as error:  # not there; or a name that neither a folder nor the Hub can have
            reasons.append(str(error))
            continue
        if config.get("_class_name") != "AutoencoderKL":
            raise ValueError(
                f"--pretrained_vae_model_name_or_path {name} is of class {config.get('_class_name')}; latents are made "
                "and decoded by an AutoencoderKL, for example stabilityai/sd-vae-ft-mse."
            )
        return AutoencoderKL.from_pretrained(name, subfolder=subfolder)
    raise ValueError(
        f"--pretrained_vae_model_name_or_path {name} holds no AutoencoderKL, and no pipeline with one; name a folder "
        f"or a Hub id such as stabilityai/sd-vae-ft-mse ({reasons[0]})"
    )


@torch.no_grad()
def encode_moments(vae: Any, images: Tensor) -> Tensor:
    """The posteriors of images, as `sample_posterior` takes them: [B, 2C, h, w] float32, means, then deviations.

    Args:
        vae: an `AutoencoderKL`. Whatever its own habit, it is fed [0, 1], as EDM2's, so that it gives back [0, 1].
        images: uint8 [B, 1 or 3, H, W], on the device of the VAE.
    """
    posterior = vae.encode(images.to(torch.float32) / 255).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).to(torch.float32)


def channel_moments(moments: np.ndarray) -> np.ndarray:
    """First and second raw moment of each channel of the latents of one image: float64 [2, C].

        E[x] = E[m],  E[x^2] = E[m^2 + s^2]   for x = m + s * eps

    Args:
        moments: [2C, h, w] as `encode_moments` gives them.
    """
    m, s = np.split(moments.astype(np.float64), 2)
    return np.stack([m.mean(axis=(1, 2)), (m**2 + s**2).mean(axis=(1, 2))])


def channel_statistics(moments: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each raw channel, from the mean of `channel_moments` over all images."""
    mean = moments[0]
    return mean.tolist(), np.sqrt(moments[1] - mean**2).tolist()


def _per_channel(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`mean` and `std` as [C, 1, 1] tensors, in float32 or better, on the device of `latents` [B, C, H, W]."""
    channels = latents.shape[1]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"{len(mean)} means and {len(std)} standard deviations for latents of {channels} channels; "
            "give one of each per channel (for training: --latents_mean, --latents_std)."
        )
    dtype = torch.promote_types(latents.dtype, torch.float32)
    mean_c, std_c = (torch.tensor(x, dtype=dtype, device=latents.device).view(-1, 1, 1) for x in (mean, std))
    return mean_c, std_c
