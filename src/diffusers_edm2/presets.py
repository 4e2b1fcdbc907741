"""The papers' training recipes as data, with the scores that were published for them.

Papers: "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2, arXiv 2312.02696), "Elucidating the
Design Space of Diffusion-Based Generative Models" (EDM, 2206.00364), "Guiding a Diffusion Model with a Bad Version of
Itself" (autoguidance, 2406.02507), "Applying Guidance in a Limited Interval" (guidance interval, 2404.07724).

A recipe maps the training script's option names to values; every recipe has all of them:

    dataset_name          name of a data set that comes with the preset, or None: the user brings the images
    latents               True if the data set holds VAE latents in place of images
    resolution            height and width of a training sample, in pixels of the image or of the latent
    in_channels           channels that the network denoises: 1 or 3 for images, 4 for latents
    num_classes           number of classes; 0 for an unconditional network
    random_flip           mirror half of the images, left to right

    block_out_channels    width of each resolution level of the network, the highest resolution first
    layers_per_block      residual blocks per level of the encoder
    attention_resolutions the resolutions that have self-attention
    attention_head_dim    channels per attention head
    dropout               probability, in [0, 1)

    sigma_data            standard deviation of the training data (EDM Table 1)
    P_mean, P_std         training noise levels: ln σ ~ N(P_mean, P_std²) (EDM2 Table 6)
    total_batch_size      images per optimizer step, over all processes
    duration              images in the whole training, each pass over the data counted anew
    learning_rate         α_ref of EDM2 eq. 67
    lr_ref_batches        t_ref of EDM2 eq. 67: the rate decays as 1/√steps after this many steps; 0: no decay
    lr_rampup             images over which the rate rises from 0 to its full value; 0: no ramp
    adam_beta1, adam_beta2, adam_epsilon
    mixed_precision       "fp16", "bf16", "no", or None: what `accelerate` was configured or launched with
    ema_sigma_rel         lengths of the EMA tracks, as fractions of the training (EDM2 eq. 123)
    snapshot_every        images between two stored snapshots of each EMA track

    num_inference_steps   sampling steps N; each image takes 2N - 1 network calls
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

Metric = Literal["FID", "FD-DINOv2"]

Ki, Mi = 2**10, 2**20  # the training durations of EDM2
M = 10**6  # "Mimg" of the learning rate's ramp

_UNITS = {"Gi": 2**30, "Mi": Mi, "Ki": Ki, "M": M, "k": 10**3, "": 1}


def parse_images(text: str) -> int:
    """A number of images from text: "8Mi" = 8 · 2^20, "256Ki", "2Gi", "10M" = 10^7, "50k", "4096", "0".

    Raises:
        ValueError: `text` is not a whole number of at least 0 with one of these suffixes, or none.
    """
    match = re.fullmatch(r"([0-9]+)(Gi|Mi|Ki|M|k|)", text)
    if match is None:
        raise ValueError(
            f'"{text}" is not a number of images; write a whole number, and after it, if you like, '
            "Ki, Mi, Gi (powers of 1024) or k, M (powers of 1000), such as 65536, 64Ki, 8Mi or 10M."
        )
    number, unit = match.groups()
    return int(number) * _UNITS[unit]


def format_images(nimg: int) -> str:
    """The shortest text that `parse_images` reads as exactly `nimg` >= 0 images: 8388608 -> "8Mi"."""
    exact = [f"{nimg // size}{unit}" for unit, size in _UNITS.items() if nimg % size == 0]
    return min(exact, key=len)


@dataclass(frozen=True)
class Guide:
    """The second, worse network of a guided score.

    Args:
        preset (`str`): the recipe that it was trained with.
        sigma_rel (`float`): length of its EMA.
        duration (`int`): images that it was trained for, at most those of its recipe.
        conditional (`bool`): False for a network without classes, as in classifier-free guidance.
    """

    preset: str
    sigma_rel: float
    duration: int
    conditional: bool


@dataclass(frozen=True)
class Score:
    """One published score: of 50 000 images, 32 steps (63 calls) each, the best of three evaluations; lower is better.

    The evaluations differ by about ± 2 %.

    Args:
        metric (`str`): "FID" or "FD-DINOv2".
        value (`float`): the score.
        source (`str`): where it was published.
        sigma_rel (`float`, *optional*): length of the EMA that was sampled; None if not recorded here.
        guidance_scale (`float`): w in D_g + w (D - D_g); 1 is no guidance.
        guidance_interval (`tuple[float, float]`, *optional*): guidance only where lo < σ <= hi; None: everywhere.
        guide (`Guide`, *optional*): the network behind D_g; None without guidance, or if not recorded here.
        conditional (`bool`): False where the recipe was trained without classes.
    """

    metric: Metric
    value: float
    source: str
    sigma_rel: float | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    guide: Guide | None = None
    conditional: bool = True


@dataclass(frozen=True)
class Published:
    """What the papers report about one recipe; None and () where they report nothing.

    Args:
        mparams (`float`, *optional*): parameters, in millions, for 1000 classes.
        gmac (`float`, *optional*): multiply-accumulates of one network call, in 10^9. Convolutions, linear layers and
            attention alone come to about 1 % less.
        images_per_second (`int`, *optional*): training speed of the official code on 32 A100 GPUs.
        scores (`tuple[Score, ...]`): the scores, without guidance first.
    """

    mparams: float | None = None
    gmac: float | None = None
    images_per_second: int | None = None
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True)
class Preset:
    """A recipe, and what was published about it.

    Args:
        recipe (`Mapping[str, Any]`): read-only, option names to values; the module's docstring explains each.
        published (`Published`): the papers' figures.
    """

    recipe: Mapping[str, Any]
    published: Published = Published()


def get_preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ValueError: there is none; the message suggests the closest name and lists all.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f'; did you mean "{close[0]}"?' if close else "."
        raise ValueError(f'There is no preset "{name}"{hint} The presets are: {", ".join(PRESETS)}.')
    return PRESETS[name]


# ---------------------------------------------------------------------------------------------------------------------
# The recipes


class _Size(NamedTuple):
    """One column of EDM2's table of model sizes."""

    channels: int  # width of the highest resolution; the others are 2, 3 and 4 times as wide
    learning_rate: float
    dropout: float
    img512_duration: int
    img64_duration: int | None
    mparams: float | None = None
    gmac: float | None = None
    images_per_second: int | None = None


_SIZES = {
    "xxs": _Size(64, 0.0170, 0.0, 2048 * Mi, None),
    "xs": _Size(128, 0.0120, 0.0, 2048 * Mi, 1024 * Mi, 124.7, 45.5, 8265),
    "s": _Size(192, 0.0100, 0.0, 2048 * Mi, 1024 * Mi, 280.2, 102.2, 4717),
    "m": _Size(256, 0.0090, 0.1, 2048 * Mi, 2048 * Mi, 497.8, 180.8, 3205),
    "l": _Size(320, 0.0080, 0.1, 1792 * Mi, 1024 * Mi, 777.5, 282.2, 2137),
    "xl": _Size(384, 0.0070, 0.1, 1280 * Mi, 640 * Mi, 1119.3, 405.9, 1597),
    "xxl": _Size(448, 0.0065, 0.1, 896 * Mi, None, 1523.2, 552.1, 1189),
}

# What all recipes share; each may override it.
_COMMON = {
    "dataset_name": None,
    "latents": False,
    "random_flip": False,
    "dropout": 0.0,
    "sigma_data": 0.5,
    "adam_beta1": 0.9,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-8,
    "mixed_precision": None,
    "ema_sigma_rel": (0.05, 0.10),
    "num_inference_steps": 32,
}


def _imagenet(size: _Size, duration: int, **options: Any) -> Mapping[str, Any]:
    """EDM2's ImageNet recipe: what the latent and the pixel models share (EDM2 Table 6)."""
    return _recipe(
        num_classes=1000,
        block_out_channels=tuple(size.channels * multiple for multiple in (1, 2, 3, 4)),
        layers_per_block=3,
        attention_resolutions=(16, 8),
        attention_head_dim=64,
        dropout=size.dropout,
        total_batch_size=2048,
        duration=duration,
        learning_rate=size.learning_rate,
        lr_rampup=10 * M,
        mixed_precision="fp16",
        snapshot_every=8 * Mi,
        **options,
    )


def _recipe(**options: Any) -> Mapping[str, Any]:
    return MappingProxyType({**_COMMON, **options})


# CIFAR-10 at the network size of the public reproduction of configurations C and E (128 channels x 1, 2, 2, 2,
# attention at 16x16 with one head, dropout 0.13), with EDM's noise levels, batch, mirroring, duration and 18 steps.
#
# A starting point, not a proven recipe: nobody has published a good FID for pixel-space G on CIFAR-10 (the attempts
# known to us stay above 10; EDM itself reaches 1.79 with classes, the reproduction 3.03 with C and 2.72 with E).
# What is our choice, and why:
# - layers_per_block 3: the size was published without its number of blocks; this is the one of EDM2's networks.
# - learning_rate 0.01: EDM2 takes 0.012 for 128 channels and 0.010 for 192; the smaller of the two is the safer.
# - lr_ref_batches 26 000: EDM2's S recipes decay after 1/15 of the run (70 000 of 1 048 576 steps, 35 000 of 524 288);
#   that share of the 390 625 steps here. The reproduction's E: 39 000.
# - lr_rampup 10 million images: EDM2's, and the reproduction's E too (200 epochs of 50 000 images).
_CIFAR10 = _recipe(
    resolution=32,
    in_channels=3,
    num_classes=10,
    random_flip=True,
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=3,
    attention_resolutions=(16,),
    attention_head_dim=256,  # the width at 16x16: one head
    dropout=0.13,
    P_mean=-1.2,
    P_std=1.2,
    total_batch_size=512,
    duration=200 * M,
    learning_rate=0.010,
    lr_ref_batches=26_000,
    lr_rampup=10 * M,
    snapshot_every=4 * Mi,
    num_inference_steps=18,
)

# scikit-learn's 8x8 digits, bundled with it: a few minutes on two CPU cores. A mirrored digit is no digit: no flips.
_DIGITS = _recipe(
    dataset_name="digits",
    resolution=8,
    in_channels=1,
    num_classes=10,
    block_out_channels=(32, 64),
    layers_per_block=1,
    attention_resolutions=(4,),
    attention_head_dim=32,
    P_mean=-0.4,
    P_std=1.0,
    total_batch_size=128,
    duration=128 * Ki,
    learning_rate=0.010,
    lr_ref_batches=250,
    lr_rampup=16 * Ki,
    snapshot_every=4 * Ki,
)


# ---------------------------------------------------------------------------------------------------------------------
# The scores

_EDM2 = "arXiv 2312.02696"
_AUTOGUIDANCE = "arXiv 2406.02507"
_INTERVAL = "arXiv 2404.07724"


_METRICS: tuple[Metric, ...] = ("FID", "FD-DINOv2")  # the order of the rows below


def _plain(*rows: tuple[float, float]) -> tuple[Score, ...]:
    """EDM2's scores without guidance: FID, and where it was measured FD-DINOv2, each (score, σ_rel)."""
    return tuple(
        Score(metric, value, _EDM2, sigma_rel) for metric, (value, sigma_rel) in zip(_METRICS, rows, strict=False)
    )


def _cfg(*rows: tuple[float, float, float]) -> tuple[Score, ...]:
    """EDM2's scores with classifier-free guidance: FID and FD-DINOv2, each (score, w, σ_rel of both networks).

    The guide of every size is an XS network without classes.
    """
    return tuple(
        Score(
            metric, value, _EDM2, sigma_rel, w, guide=Guide("edm2-img512-xs", sigma_rel, 2048 * Mi, conditional=False)
        )
        for metric, (value, w, sigma_rel) in zip(_METRICS, rows, strict=True)
    )


def _autoguided(
    guide: tuple[str, int], *rows: tuple[float, float, float, float], conditional: bool = True
) -> tuple[Score, ...]:
    """Autoguidance by `guide` (preset, images): FID and FD-DINOv2, each (score, w, σ_rel, σ_rel of the guide)."""
    preset, duration = guide
    return tuple(
        Score(
            metric,
            value,
            _AUTOGUIDANCE,
            sigma_rel,
            w,
            guide=Guide(preset, guide_sigma_rel, duration, conditional),
            conditional=conditional,
        )
        for metric, (value, w, sigma_rel, guide_sigma_rel) in zip(_METRICS, rows, strict=True)
    )


def _interval(fid: float, w: float, interval: tuple[float, float]) -> tuple[Score, ...]:
    return (Score("FID", fid, _INTERVAL, guidance_scale=w, guidance_interval=interval),)


_IMG512_SCORES = {
    "xs": _plain((3.53, 0.135), (103.39, 0.200)) + _cfg((2.91, 1.4, 0.045), (79.94, 1.7, 0.150)),
    "s": _plain((2.56, 0.130), (68.64, 0.190))
    + _cfg((2.23, 1.4, 0.025), (52.32, 1.9, 0.085))
    + _interval(1.68, 2.1, (0.28, 2.90))
    + _autoguided(("edm2-img512-xs", 128 * Mi), (1.34, 2.10, 0.070, 0.125), (36.67, 2.45, 0.120, 0.165))
    + _autoguided(
        ("edm2-img512-xs", 128 * Mi), (3.86, 2.85, 0.070, 0.110), (90.39, 2.90, 0.090, 0.125), conditional=False
    ),
    "m": _plain((2.25, 0.100), (58.44, 0.155)) + _cfg((2.01, 1.2, 0.030), (41.98, 2.0, 0.015)),
    "l": _plain((2.06, 0.085), (52.25, 0.155)) + _cfg((1.88, 1.2, 0.015), (38.20, 1.7, 0.035)),
    "xl": _plain((1.96, 0.085), (45.96, 0.155)) + _cfg((1.85, 1.2, 0.020), (35.67, 1.7, 0.030)),
    "xxl": _plain((1.91, 0.070), (42.84, 0.150))
    + _cfg((1.81, 1.2, 0.015), (33.09, 1.7, 0.015))
    + _interval(1.40, 2.0, (0.19, 1.61))
    + _autoguided(("edm2-img512-m", 256 * Mi), (1.25, 2.05, 0.075, 0.155), (24.18, 2.30, 0.130, 0.205)),
}

_IMG64_SCORES = {
    "s": _plain((1.58, 0.075))
    + _autoguided(("edm2-img64-xs", 128 * Mi), (1.01, 1.70, 0.045, 0.110), (31.85, 2.20, 0.105, 0.175)),
    "m": _plain((1.43, 0.060)),
    "l": _plain((1.33, 0.040)),
    "xl": _plain((1.33, 0.040)),
}


# ---------------------------------------------------------------------------------------------------------------------
# The presets


def _img512(name: str, size: _Size, duration: int) -> Preset:
    """ImageNet at 512x512, in the 4-channel latents of a VAE."""
    recipe = _imagenet(
        size, duration, latents=True, resolution=64, in_channels=4, P_mean=-0.4, P_std=1.0, lr_ref_batches=70_000
    )
    scores = _IMG512_SCORES.get(name, ())
    return Preset(recipe, Published(size.mparams, size.gmac, size.images_per_second, scores))


def _img64(name: str, size: _Size, duration: int) -> Preset:
    """ImageNet at 64x64, in RGB pixels."""
    recipe = _imagenet(size, duration, resolution=64, in_channels=3, P_mean=-0.8, P_std=1.6, lr_ref_batches=35_000)
    return Preset(recipe, Published(scores=_IMG64_SCORES.get(name, ())))


PRESETS: dict[str, Preset] = {
    **{f"edm2-img512-{n}": _img512(n, s, s.img512_duration) for n, s in _SIZES.items()},
    **{f"edm2-img64-{n}": _img64(n, s, s.img64_duration) for n, s in _SIZES.items() if s.img64_duration},
    "cifar10": Preset(_CIFAR10),
    "digits": Preset(_DIGITS),
}
