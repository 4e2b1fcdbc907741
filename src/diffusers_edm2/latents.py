"""Between stored images and what the network sees: RGB in [-1, 1], and VAE latents whitened to sigma_data.

The latents of EDM2 are those of `stabilityai/sd-vae-ft-mse` fed images in [0, 1]. The constants below are the
mean and standard deviation of each raw channel over ImageNet-512 (EDM2, arXiv 2312.02696).
"""

from collections.abc import Sequence

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


def _per_channel(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`mean` and `std` as [C, 1, 1] tensors, in float32 or better, on the device of `latents` [B, C, H, W]."""
    channels = latents.shape[1]
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"{len(mean)} means and {len(std)} standard deviations for latents of {channels} channels; "
            "give one of each per channel."
        )
    dtype = torch.promote_types(latents.dtype, torch.float32)
    mean_c, std_c = (torch.tensor(x, dtype=dtype, device=latents.device).view(-1, 1, 1) for x in (mean, std))
    return mean_c, std_c
