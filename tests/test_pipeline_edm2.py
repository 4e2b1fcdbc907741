"""The pipeline: closed forms, then everything that its arguments promise."""

import math
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from diffusers_edm2 import EDM2HeunScheduler, EDM2Pipeline
from diffusers_edm2.latents import unscale_rgb, unwhiten
from test_unet_edm2 import active_unet

STEPS = 4


def pipeline(**components) -> EDM2Pipeline:
    pipe = EDM2Pipeline(components.pop("unet", None) or active_unet(), EDM2HeunScheduler(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(n)]


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
    )


@pytest.mark.parametrize("scheduler", [EDM2HeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_untrained_pipeline_solves_gaussian_data(scheduler):
    """out_gain = 0 makes D(x) = c_skip x, the optimal denoiser of N(0, sigma_data²)."""
    unet = active_unet()
    torch.nn.init.zeros_(unet.out_gain)
    pipe = pipeline(unet=unet)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    exact = noise * 80 * 0.5 / math.hypot(80, 0.5)
    error = [
        (pipe([1, 2], latents=noise, num_inference_steps=n, output_type="latent").images / exact - 1).abs().max().item()
        for n in (32, 64)
    ]
    second_order = scheduler is not EDMEulerScheduler
    assert error[0] < (0.02 if second_order else 0.2)
    assert error[0] / error[1] > (3.4 if second_order else 1.8)


def test_float64_latents_are_sampled_in_float64():
    pipe = pipeline()
    noise = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    images = pipe([1], latents=noise, num_inference_steps=STEPS, output_type="latent").images
    assert images.dtype == torch.float64
    single = pipe([1], latents=noise.float(), num_inference_steps=STEPS, output_type="latent").images
    assert single.dtype == torch.float32
    torch.testing.assert_close(images, single.double(), rtol=1e-3, atol=1e-4)


def test_an_image_does_not_depend_on_its_batch():
    """With a generator per image, rounding of the convolutions is the only difference."""
    pipe = pipeline()
    pipe.scheduler = EDM2HeunScheduler(s_churn=20)
    together = pipe([5, 6, 7], generator=generators(3), num_inference_steps=STEPS, output_type="pt").images
    for i in range(3):
        alone = pipe([5 + i], generator=[generators(3)[i]], num_inference_steps=STEPS, output_type="pt").images
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=5e-5)
    random_classes = pipe(generator=generators(3), num_inference_steps=STEPS, output_type="pt").images
    alone = pipe(generator=[generators(3)[1]], num_inference_steps=STEPS, output_type="pt").images
    torch.testing.assert_close(alone[0], random_classes[1], rtol=0, atol=5e-5)
    assert not torch.allclose(together[0], together[1], atol=0.01)


def test_labels_may_come_as_number_list_or_tensor():
    pipe = pipeline()

    def run(labels, **kw):
        return pipe(labels, generator=generators(2), num_inference_steps=2, output_type="np", **kw).images

    expected = run([4, 4])
    for same in (4, np.int64(4), np.array([4, 4]), torch.tensor([4, 4], dtype=torch.uint8)):
        assert np.array_equal(run(same), expected)
    one_hot = torch.zeros(2, 10)
    one_hot[:, 4] = 1
    assert np.array_equal(run(one_hot), expected)
    assert not np.array_equal(run(-1), expected)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB"), (2, None)])
def test_output_types(channels, mode):
    pipe = pipeline(unet=active_unet(in_channels=channels))

    def run(kind):
        return pipe([1, 2], generator=generators(2), num_inference_steps=2, output_type=kind).images

    latent, pt, array = run("latent"), run("pt"), run("np")
    torch.testing.assert_close(pt, ((latent + 1) / 2).clamp(0, 1))
    assert pt.shape == (2, channels, 16, 16) and array.shape == (2, 16, 16, channels)
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    if mode is None:
        with pytest.raises(
            ValueError, match="output_type='pil' needs 1 or 3 channels, not 2; use 'np', 'pt' or 'latent'"
        ):
            run("pil")
        return
    torch.testing.assert_close(pt, unscale_rgb(latent))
    images = run("pil")
    assert [image.mode for image in images] == [mode, mode] and images[0].size == (16, 16)
    pixels = np.asarray(images[0]).reshape(16, 16, channels)
    assert np.array_equal(pixels, (array[0] * 255).round().astype("uint8"))
    assert isinstance(pipe([1], num_inference_steps=2, return_dict=False), tuple)


def test_callback_sees_and_replaces_latents():
    pipe, seen = pipeline(), []

    def halve(pipe_, i, t, tensors):
        assert pipe_ is pipe and tensors.keys() == {"latents"}
        seen.append((i, float(t)))
        return {"latents": 0 * tensors["latents"]} if i == 2 * STEPS - 2 else tensors

    images = pipe([1], num_inference_steps=STEPS, output_type="latent", callback_on_step_end=halve).images
    assert [i for i, _ in seen] == list(range(2 * STEPS - 1))
    assert [t for _, t in seen] == pipe.scheduler.timesteps.tolist()
    assert images.abs().max() == 0


def test_callback_gets_what_it_asks_for_and_may_return_nothing():
    seen = []
    pipeline()(
        [1],
        num_inference_steps=2,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(tensors),
        callback_on_step_end_tensor_inputs=[],
    )
    assert seen == [{}, {}, {}]


def test_stochastic_schedulers_follow_the_generators():
    pipe = pipeline()
    pipe.scheduler = EDMDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, algorithm_type="sde-dpmsolver++")
    runs = [pipe([1, 2], generator=generators(2), num_inference_steps=4, output_type="np").images for _ in range(2)]
    assert np.array_equal(runs[0], runs[1])


@pytest.mark.parametrize("scheduler", [EDM2HeunScheduler, EDMDPMSolverMultistepScheduler])
def test_sampling_starts_at_sigma_max(scheduler):
    """At sigma_max = 1 the data's own variance is as large as the noise, and a start at sqrt(2) would be 41 % off."""
    unet = active_unet()
    torch.nn.init.zeros_(unet.out_gain)
    pipe = pipeline(unet=unet)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, sigma_max=1.0)
    noise = torch.randn(1, 3, 16, 16)
    images = pipe([1], latents=noise, num_inference_steps=64, output_type="latent").images
    torch.testing.assert_close(images, noise * 0.5 / math.hypot(1, 0.5), rtol=0.01, atol=0)


def test_progress_bar_counts_network_calls(capfd):
    pipe = EDM2Pipeline(active_unet(), EDM2HeunScheduler())
    pipe([1], num_inference_steps=STEPS)
    assert f"{2 * STEPS - 1}/{2 * STEPS - 1}" in capfd.readouterr().err


# --- VAE -----------------------------------------------------------------------------------------------------------


def test_vae_decodes_whitened_latents(tmp_path):
    vae = tiny_vae()
    mean, std = [1.0, -2.0, 0.5, 0.0], [3.0, 4.0, 5.0, 6.0]
    pipe = pipeline(unet=active_unet(in_channels=4), vae=vae, latents_mean=mean, latents_std=std)
    pipe.scheduler = EDM2HeunScheduler(sigma_data=0.7)
    run = lambda p, kind: p([1], generator=generators(1), num_inference_steps=2, output_type=kind).images  # noqa: E731
    x = run(pipe, "latent")
    raw = unwhiten(x, mean, std, sigma_data=0.7)
    with torch.no_grad():
        expected = vae.decode(raw).sample.clamp(0, 1)  # the VAE works on images in [0, 1]
    assert expected.shape == (1, 3, 32, 32) and 0.1 < expected.std() < 0.5
    torch.testing.assert_close(run(pipe, "pt"), expected, rtol=1e-5, atol=1e-5)
    assert run(pipe, "pil")[0].size == (32, 32)

    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config.latents_mean == mean and loaded.config.latents_std == std
    torch.testing.assert_close(run(loaded, "pt"), expected, rtol=1e-4, atol=1e-4)


def test_vae_constants_default_to_the_paper_and_must_fit():
    pipe = pipeline(unet=active_unet(in_channels=4), vae=tiny_vae())
    assert pipe.config.latents_mean == [5.81, 3.25, 0.12, -2.15] and pipe.config.latents_std == [4.17, 4.62, 3.71, 3.28]
    with pytest.raises(ValueError, match="the network has 3 channels and the VAE 4, but latents_mean has 4 values"):
        pipeline(vae=tiny_vae())


# --- Saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_guide", [False, True], ids=["plain", "guided"])
def test_saved_folder_loads_with_plain_diffusers(tmp_path, with_guide):
    pipe = pipeline(guide_unet=active_unet(seed=4, num_class_embeds=None) if with_guide else None)
    scale = 1.5 if with_guide else 1.0
    images = pipe(
        [1, 2], generator=generators(2), num_inference_steps=STEPS, guidance_scale=scale, output_type="np"
    ).images
    pipe.save_pretrained(tmp_path / "pipe")
    np.save(tmp_path / "images.npy", images)
    script = f"""
import numpy as np, torch
import diffusers_edm2
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path / "pipe")!r})
assert type(pipe) is diffusers_edm2.EDM2Pipeline and type(pipe.unet) is diffusers_edm2.EDM2UNet2DModel
assert type(pipe.scheduler) is diffusers_edm2.EDM2HeunScheduler
generators = [torch.Generator().manual_seed(100 + i) for i in range(2)]
options = dict(num_inference_steps={STEPS}, guidance_scale={scale}, output_type="np")
images = pipe([1, 2], generator=generators, **options).images
print("difference", np.abs(images - np.load({str(tmp_path / "images.npy")!r})).max())
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split("difference")[1]) < 1e-4  # rounding, after 7 network calls
    assert not [p for p in (tmp_path / "pipe").rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_other_folders_load_as_before(tmp_path):
    """Registration adds names and changes nothing else."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, **blocks)
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is diffusers.DDPMPipeline and type(loaded.unet) is diffusers.UNet2DModel


def test_components_may_be_replaced_when_loading(tmp_path):
    guide, other = (active_unet(seed=s, num_class_embeds=None) for s in (4, 5))
    pipeline(guide_unet=guide).save_pretrained(tmp_path)
    assert EDM2Pipeline.from_pretrained(tmp_path, guide_unet=other).guide_unet is other
    assert EDM2Pipeline.from_pretrained(tmp_path, guide_unet=None).guide_unet is None
    swapped = DiffusionPipeline.from_pretrained(tmp_path, scheduler=EDMEulerScheduler())
    assert type(swapped.scheduler) is EDMEulerScheduler


def test_variant_of_a_whole_pipeline(tmp_path):
    pipe = pipeline(guide_unet=active_unet(seed=4, num_class_embeds=None))
    pipe.save_pretrained(tmp_path, variant="fp16")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    for name, tensor in pipe.guide_unet.state_dict().items():
        assert torch.equal(loaded.guide_unet.state_dict()[name], tensor), name


def test_half_precision_pipeline_follows_float32(tmp_path):
    pipe = pipeline()
    pipe.save_pretrained(tmp_path)
    half = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    run = lambda p: p([1, 2], generator=generators(2), num_inference_steps=STEPS, output_type="latent").images  # noqa: E731
    types = set()
    half.unet.register_forward_pre_hook(lambda module, args: types.add(args[0].dtype))
    exact, found = run(pipe), run(half)
    assert types == {torch.bfloat16}
    assert half.unet.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert ((found - exact).norm() / exact.norm()).item() < 0.03


# --- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"class_labels": [10]}, r"class_labels=\[10\] are not all in \[0, 9\], .* use -1 for no class"),
        (
            {"class_labels": [1], "output_type": "jpg"},
            "output_type='jpg' is unknown; use 'pil', 'np', 'pt' or 'latent'",
        ),
        (
            {"class_labels": [1, 2], "generator": [torch.Generator()] * 3},
            r"disagree on the number of images, or it is 0 \(class_labels: 2, generator: 3\)",
        ),
        ({"class_labels": []}, r"or it is 0 \(class_labels: 0\)"),
        (
            {"latents": torch.zeros(1, 4, 16, 16)},
            r"latents have shape \[1, 4, 16, 16\]; the network takes \[batch, 3, H, W\]",
        ),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"tensor_inputs=\['noise'\]: only \['latents'\] exist"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number from 1"),
    ],
)
def test_call_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline()(**arguments)


def test_labels_for_an_unconditional_network_are_an_error():
    with pytest.raises(ValueError, match=r"class_labels=\[1\], but this pipeline's network is unconditional"):
        pipeline(unet=active_unet(num_class_embeds=None))([1])
