"""Guidance in the pipeline: reference samples, the closed form of one step, and what is called when."""

import math

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from diffusers_edm2 import EDM2HeunScheduler, EDM2UNet2DModel
from golden_files import load_golden
from test_pipeline_edm2 import generators, pipeline
from test_scheduling_edm2_heun import OPTIONS
from test_unet_edm2 import active_unet

SCHEDULERS = [EDM2HeunScheduler, EDMEulerScheduler, EDMDPMSolverMultistepScheduler]


class GaussianNetwork(ModelMixin, ConfigMixin):
    """F of the optimal denoiser of N(mean, std²), D = mean + (x - mean) std² / (std² + σ²), preconditioned with 0.5."""

    @register_to_config
    def __init__(self, mean: float, std: float, sample_size: int = 8, in_channels: int = 3):
        super().__init__()
        self.register_to_config(num_class_embeds=None)
        self.weight = torch.nn.Parameter(torch.zeros([], dtype=torch.float64))  # gives the network a type

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        sigma, sd, variance = math.exp(4 * float(timestep)), 0.5, self.config.std**2
        x = sample * math.hypot(sigma, sd)
        D = self.config.mean + (x - self.config.mean) * variance / (variance + sigma**2)
        return ((D - sd**2 / (sigma**2 + sd**2) * x) / (sigma * sd / math.hypot(sigma, sd)),)


class ReplayedChurn(EDM2HeunScheduler):
    """Takes the churn noise from a list."""

    def churn(self, sample, timestep, generator=None):
        is_due = self.call_sigmas[self._current_index(timestep)] > self.sigmas[self._current_index(timestep) // 2]
        is_first = self._current_index(timestep) % 2 == 0
        return super().churn(sample, timestep, noise=self.recorded.pop(0) if is_due and is_first else None)


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("case", ["guided", "churn_guided"])
def test_guided_samples_equal_reference(case, precision):
    tensors, metadata = load_golden("sampler.safetensors")
    settings, expected = dict(metadata[case]), tensors[f"{case}/{precision}/result"]
    noise = tensors["noise"].to(expected.dtype)
    shape = {"sample_size": noise.shape[-1], "in_channels": noise.shape[1]}
    pipe = pipeline(unet=GaussianNetwork(0.1, 0.5, **shape), guide_unet=GaussianNetwork(-0.2, 0.7, **shape))
    steps, weight = settings.pop("num_steps"), settings.pop("guidance")
    pipe.scheduler = ReplayedChurn(**{OPTIONS[name]: value for name, value in settings.items()})
    recorded = list(tensors.get(f"{case}/{precision}/churn_noise", ()))

    def run(w):
        pipe.scheduler.recorded = list(recorded)
        images = pipe(latents=noise, num_inference_steps=steps, guidance_scale=w, output_type="latent").images
        assert pipe.scheduler.recorded == []
        return images

    # The network gets ln(sigma)/4 in float32, so its sigma is off by up to ln(500) * 2**-24 = 4e-7, relative; the
    # reference's own float32 is another 1e-6 from its float64.
    torch.testing.assert_close(run(weight), expected, rtol=4e-6, atol=4e-6)
    assert (run(1.0) - expected).abs().max() > 0.05


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_guided_step_is_the_formula(scheduler):
    """After one call the sample is linear in F, so it obeys D_g + w (D - D_g) itself."""
    pipe = pipeline(guide_unet=active_unet(seed=9, num_class_embeds=None, block_out_channels=(8, 8)))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)

    def run(w):
        return pipe([3], generator=generators(1), num_inference_steps=1, guidance_scale=w, output_type="latent").images

    plain, guide, guided = run(1.0), run(0.0), run(2.5)
    assert (plain - guide).abs().max() > 0.01
    torch.testing.assert_close(guided, guide + 2.5 * (plain - guide), rtol=1e-4, atol=1e-4)


def count_calls(network) -> list[int]:
    """The batch sizes of the calls of a network, from now on."""
    calls: list[int] = []
    network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_guide_is_called_within_the_interval_only(scheduler):
    pipe = pipeline(guide_unet=active_unet(seed=9))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    main, guide = count_calls(pipe.unet), count_calls(pipe.guide_unet)

    def run(**options):
        main.clear(), guide.clear()
        options = {"num_inference_steps": 8, "output_type": "latent", "guidance_scale": 2.0, **options}
        return pipe([3], generator=generators(1), **options).images

    plain = run(guidance_scale=1.0)
    calls = len(main)
    assert calls == (15 if scheduler is EDM2HeunScheduler else 8) and not guide
    everywhere = run()
    assert len(guide) == len(main) == calls
    assert torch.equal(run(guidance_interval=(0, math.inf)), everywhere)
    assert torch.equal(run(guidance_interval=(100, 200)), plain) and not guide

    levels = sorted(float(s) for s in pipe.scheduler.sigmas)[1:]  # the lowest is the final 0
    inside = [s for s in levels if levels[2] < s <= levels[4]]  # the upper end belongs to it, the lower does not
    some = run(guidance_interval=(levels[2], levels[4]))
    assert len(inside) == 2
    # Heun comes to each of these levels twice: as the end of one step and the start of the next.
    assert len(guide) == (4 if scheduler is EDM2HeunScheduler else 2) and len(main) == calls
    assert not torch.equal(some, plain) and not torch.equal(some, everywhere)


def test_each_image_has_its_own_weight():
    pipe = pipeline(guide_unet=active_unet(seed=9))
    guide = count_calls(pipe.guide_unet)

    def run(labels, seeds, w):
        generator = [generators(3)[i] for i in seeds]
        options = {"num_inference_steps": 4, "output_type": "latent"}
        return pipe(labels, generator=generator, guidance_scale=w, **options).images

    together = run([1, 2, 3], [0, 1, 2], [1.5, 1.0, 3.0])
    assert guide == [2] * 7  # the image of weight 1 costs nothing
    for i, w in enumerate((1.5, 1.0, 3.0)):
        alone = run([i + 1], [i], w)
        torch.testing.assert_close(together[i], alone[0], rtol=1e-4, atol=1e-4)  # other batch sizes round differently
    weights = torch.tensor([1.5, 2.0, 3.0])
    guide.clear()
    torch.testing.assert_close(run([1, 2, 3], [0, 1, 2], weights)[[0, 2]], together[[0, 2]], rtol=1e-4, atol=1e-4)
    assert guide == [3] * 7
    guide.clear()
    run([1, 2, 3], [0, 1, 2], [1, 1, 1])
    assert guide == []


def test_a_network_trained_with_label_dropout_guides_itself_as_no_class():
    unet = active_unet(label_dropout=0.1)

    def run(pipe, labels, **options):
        options |= {"num_inference_steps": 3, "output_type": "latent"}
        return pipe(labels, generator=generators(2), **options).images

    itself = run(pipeline(unet=unet), [1, 2], guidance_scale=1.7)

    class WithoutClass(EDM2UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, **kwargs):
            return super().forward(sample, timestep, torch.full_like(class_labels, -1), **kwargs)

    guide = WithoutClass.from_config(unet.config)
    guide.load_state_dict(unet.state_dict())
    torch.testing.assert_close(itself, run(pipeline(unet=unet, guide_unet=guide), [1, 2], guidance_scale=1.7))
    assert not torch.allclose(itself, run(pipeline(unet=unet), [1, 2]), atol=1e-3)


@pytest.mark.parametrize(
    "components, arguments, message",
    [
        ({}, {}, "guidance_scale=2.0 needs a guide_unet in the pipeline, or a network .* trained with label dropout"),
        (
            {"unet": {"label_dropout": 0.1, "num_class_embeds": None}},
            {"class_labels": None},
            "needs a guide_unet in the pipeline",
        ),
        (
            {"guide_unet": {"in_channels": 4}},
            {},
            "guide_unet has 4 channels of 16x16 and unet 3 channels of 16x16; a guide works on the same samples",
        ),
        (
            {"guide_unet": {"sample_size": 32, "attention_resolutions": ()}},
            {},
            "guide_unet has 3 channels of 32x32 and unet 3 channels of 16x16",
        ),
        (
            {"guide_unet": {"num_class_embeds": 4}},
            {},
            "guide_unet knows 4 classes and unet 10; a guide knows the same classes, or none",
        ),
        ({"guide_unet": {}}, {"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number, or one per"),
        (
            {"guide_unet": {}},
            {"guidance_scale": [1.5, 2.0, 2.5]},
            r"disagree on the number of images, or it is 0 \(class_labels: 2, guidance_scale: 3\)",
        ),
        (
            {"guide_unet": {}},
            {"guidance_interval": (2.9, 0.28)},
            r"guidance_interval=\(2.9, 0.28\) must be two noise levels, 0 <= lo < hi",
        ),
    ],
)
def test_errors(components, arguments, message):
    pipe = pipeline(**{name: active_unet(**options) for name, options in components.items()})
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [1, 2], "guidance_scale": 2.0, **arguments})
