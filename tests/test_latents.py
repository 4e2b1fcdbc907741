import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline

from diffusers_edm2.latents import (
    RAW_MEAN,
    RAW_STD,
    channel_moments,
    channel_statistics,
    encode_moments,
    load_vae,
    quantize_rgb,
    sample_posterior,
    scale_rgb,
    unscale_rgb,
    unwhiten,
    whiten,
)


def test_every_rgb_value_survives_the_round_trip():
    stored = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    seen = scale_rgb(stored)
    assert seen.dtype == torch.float32
    assert (seen.min(), seen.max()) == (-1, 1)
    assert torch.equal(quantize_rgb(seen), stored)
    torch.testing.assert_close(unscale_rgb(seen), stored / 255)


def test_rgb_beyond_the_range_is_clamped_and_between_values_rounded():
    samples = torch.tensor([-3.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 3.0])
    assert quantize_rgb(samples).tolist() == [0, 0, 1, 255]
    assert unscale_rgb(samples)[[0, 3]].tolist() == [0, 1]
    assert unscale_rgb(samples.half()).dtype == torch.float16


def test_whitening_gives_mean_0_and_standard_deviation_sigma_data():
    mean, std = (torch.tensor(x).view(1, 4, 1, 1) for x in (RAW_MEAN, RAW_STD))
    raw = torch.cat([mean - std, mean, mean + std])
    expected = torch.tensor([-0.5, 0, 0.5]).view(3, 1, 1, 1).expand(3, 4, 1, 1)
    torch.testing.assert_close(whiten(raw), expected)
    torch.testing.assert_close(whiten(raw, sigma_data=2.0), 4 * expected)
    torch.testing.assert_close(unwhiten(whiten(raw)), raw)
    torch.testing.assert_close(unwhiten(whiten(raw, sigma_data=2.0), sigma_data=2.0), raw)


@pytest.mark.parametrize("change", [whiten, unwhiten])
def test_whitening_is_float32_or_better(change):
    raw = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    torch.testing.assert_close(change(raw), change(raw.float()), rtol=0, atol=0)
    assert change(raw.double()).dtype == torch.float64


def test_whitening_takes_any_number_of_channels_and_refuses_another():
    raw = torch.full((1, 2, 1, 1), 3.0)
    assert whiten(raw, mean=(1, 2), std=(4, 1)).flatten().tolist() == [0.25, 0.5]
    with pytest.raises(ValueError, match="4 means and 4 standard deviations for latents of 2 channels; give one"):
        whiten(raw)
    with pytest.raises(ValueError, match="2 means and 1 standard deviations for latents of 2 channels"):
        unwhiten(raw, mean=(1, 2), std=(4,))


def moments(batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    mean = 4 * torch.randn(batch, 4, 8, 8, generator=generator)
    return torch.cat([mean, torch.rand(batch, 4, 8, 8, generator=generator)], dim=1)


def test_posterior_is_mean_plus_deviation_times_noise():
    stored = moments()
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    drawn = sample_posterior(stored, torch.Generator().manual_seed(7))
    torch.testing.assert_close(drawn, whiten(stored[:, :4] + stored[:, 4:] * noise), rtol=0, atol=0)

    certain = torch.cat([stored[:, :4], torch.zeros(3, 4, 8, 8)], dim=1)
    torch.testing.assert_close(sample_posterior(certain), whiten(stored[:, :4]), rtol=0, atol=0)


def test_posterior_is_drawn_anew_with_the_right_spread():
    mean, std = torch.tensor(RAW_MEAN), torch.tensor(RAW_STD)
    stored = torch.cat([mean, std]).view(1, 8, 1, 1).expand(4, 8, 64, 64)
    generator = torch.Generator().manual_seed(0)
    first, second = sample_posterior(stored, generator), sample_posterior(stored, generator)
    for drawn in (first, second):  # a posterior as wide as the data is whitened to N(0, 0.5²)
        assert drawn.mean().abs() < 0.01  # 5 standard errors of 65 536 numbers
        assert (drawn.std() - 0.5).abs() < 0.007
    assert (first * second).mean().abs() < 0.005  # independent draws


def test_one_generator_per_image_makes_a_draw_independent_of_the_batch():
    def generators(numbers):
        return [torch.Generator().manual_seed(number) for number in numbers]

    stored = moments()
    together = sample_posterior(stored, generators([10, 11, 12]))
    alone = sample_posterior(stored[1:2], generators([11]))
    assert torch.equal(together[1:2], alone)
    assert torch.equal(sample_posterior(stored.flip(0), generators([12, 11, 10])), together.flip(0))


def test_posterior_takes_any_number_of_channels_and_half_precision():
    stored = moments()[:, [0, 1, 4, 5]].half()
    statistics = {"mean": (0.0, 1.0), "std": (1.0, 2.0)}
    drawn = sample_posterior(stored, torch.Generator().manual_seed(0), **statistics)
    assert (drawn.dtype, drawn.shape) == (torch.float32, (3, 2, 8, 8))
    assert torch.equal(drawn, sample_posterior(stored.float(), torch.Generator().manual_seed(0), **statistics))


def test_posterior_refuses_what_it_cannot_draw():
    with pytest.raises(ValueError, match="Stored latents have 7 channels; a mean and a standard deviation per latent"):
        sample_posterior(moments()[:, :7])
    with pytest.raises(ValueError, match="2 generators for 3 images; pass one, or one per image"):
        sample_posterior(moments(), [torch.Generator(), torch.Generator()])
    with pytest.raises(ValueError, match="4 means and 4 standard deviations for latents of 3 channels"):
        sample_posterior(moments()[:, :6])


# ---- The VAE ---------------------------------------------------------------------------------------------------------


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    return AutoencoderKL(**levels, block_out_channels=[4, 8], norm_num_groups=4, latent_channels=channels).eval()


@torch.no_grad()
def test_the_vae_sees_0_to_1_and_gives_means_and_deviations():
    vae = tiny_vae(channels=3)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    moments = encode_moments(vae, images)
    mean, logvar = vae.quant_conv(vae.encoder(images / 255)).chunk(2, dim=1)
    assert (moments.shape, moments.dtype, moments.requires_grad) == ((5, 6, 8, 8), torch.float32, False)
    assert torch.equal(moments[:, :3], mean)
    torch.testing.assert_close(moments[:, 3:].log(), logvar / 2)


def test_statistics_are_those_of_the_draws():
    stored = moments(batch=50)
    drawn = sample_posterior(stored, torch.Generator().manual_seed(0), mean=[0] * 4, std=[0.5] * 4)  # raw
    mean, std = channel_statistics(sum(map(channel_moments, stored.numpy())) / 50)
    # 50 x 64 numbers per channel, whose mean and deviation have standard errors of 1/57 and 1/80 of the deviation
    np.testing.assert_allclose(mean, drawn.mean(dim=(0, 2, 3)), atol=4 * 4 / 57)
    np.testing.assert_allclose(std, drawn.std(dim=(0, 2, 3)), rtol=4 / 80)
    certain = torch.cat([stored[:, :4], torch.zeros(50, 4, 8, 8)], dim=1)
    mean, std = channel_statistics(sum(map(channel_moments, certain.numpy())) / 50)
    raw = stored[:, :4].double()
    np.testing.assert_allclose(mean, raw.mean(dim=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, raw.std(dim=(0, 2, 3), correction=0), rtol=1e-12)


def test_a_vae_is_found_alone_and_in_a_pipeline(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "alone")
    tiny_vae().save_pretrained(tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": DiffusionPipeline.__name__}))
    expected = tiny_vae().state_dict()
    for name in ("alone", "pipeline"):
        weights = load_vae(str(tmp_path / name)).state_dict()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)


def test_what_is_no_vae_is_refused(tmp_path):
    AutoencoderTiny().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="path .* is of class AutoencoderTiny; latents are made .* by an AutoencoderKL"
    ):
        load_vae(str(tmp_path))
    with pytest.raises(ValueError, match=r"missing holds no AutoencoderKL, and no pipeline with one; name a folder"):
        load_vae(str(tmp_path / "missing"))
