"""The network: reference numbers first, then everything a Diffusers user does with a model."""

import copy
import json
import math

import pytest
import torch
from torch import nn

from diffusers_edm2.scheduling_edm2_heun import EDM2HeunScheduler
from diffusers_edm2.unet_edm2 import EDM2UNet2DModel, mp_cat, mp_silu, mp_sum, normalize, resample_down, resample_up
from golden_files import build_unet, load_golden, select

GOLDEN = ["unet_g_rgb_cond", "unet_g_latent_uncond", "unet_g_options"]
# float32 on both sides: only the order of additions in convolutions and matrix products may differ.
ROUNDING = {"rtol": 1e-5, "atol": 2e-6}


def active_unet(seed: int = 0, **options) -> EDM2UNet2DModel:
    """A tiny network whose zero-initialised gains are set, so that every path reaches the output."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 16,
        "in_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "attention_resolutions": (8,),
        "attention_head_dim": 8,
        "num_class_embeds": 10,
    }
    unet = EDM2UNet2DModel(**(settings | options))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if name.endswith("gain"):
                parameter.fill_(0.7)
    return unet.eval()


def example(batch: int = 2, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randn(batch, 3, 16, 16, generator=generator)
    return sample, torch.linspace(-1.0, 0.8, batch), torch.arange(batch)


# --- Reference numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_outputs_equal_reference(name):
    tensors, metadata = load_golden(f"{name}.safetensors")
    unet = build_unet(metadata["config"]).eval()
    unet.load_state_dict(select(tensors, "param"))
    sigma, sd = tensors["sigma"].flatten(), metadata["config"].get("sigma_data", 0.5)
    c_in = (sigma**2 + sd**2).rsqrt()[:, None, None, None]
    with torch.no_grad():
        F_x = unet(c_in * tensors["x"], sigma.log() / 4, tensors.get("class_labels")).sample
        u = unet.logvar(sigma.log() / 4)
    torch.testing.assert_close(F_x, tensors["raw_output"], **ROUNDING)
    torch.testing.assert_close(u, tensors["logvar"].flatten(), **ROUNDING)
    D_x = EDM2HeunScheduler(sigma_data=sd).precondition_outputs(tensors["x"], F_x, sigma)
    torch.testing.assert_close(D_x, tensors["denoised"], **ROUNDING)


def test_integer_labels_equal_one_hot_labels():
    unet, (sample, timestep, _) = active_unet(), example(3)
    labels = torch.tensor([4, -1, 0])
    one_hot = torch.zeros(3, 10)
    one_hot[0, 4] = one_hot[2, 0] = 1
    with torch.no_grad():
        assert torch.equal(unet(sample, timestep, labels).sample, unet(sample, timestep, one_hot).sample)
        nothing = unet(sample, timestep, None).sample
        assert torch.equal(nothing[1], unet(sample, timestep, labels).sample[1])
        assert not torch.equal(nothing[0], unet(sample, timestep, labels).sample[0])


# --- Closed forms --------------------------------------------------------------------------------------------------


def test_operations_preserve_magnitude():
    torch.manual_seed(0)
    a, b = torch.randn(2, 4096, 4, 4), torch.randn(2, 1024, 4, 4)
    rms = lambda x: x.square().mean().sqrt().item()  # noqa: E731
    assert rms(normalize(3 * a, dim=1)) == pytest.approx(1, abs=1e-3)
    assert rms(mp_silu(a)) == pytest.approx(1, abs=1e-2)
    assert rms(mp_sum(a, torch.randn_like(a), 0.3)) == pytest.approx(1, abs=1e-2)
    c = mp_cat(a, b, 0.3)
    # Each input contributes in proportion to its weight squared, whatever its number of channels (EDM2 eq. 103).
    share = c[:, :4096].square().sum() / c.square().sum()
    assert rms(c) == pytest.approx(1, abs=1e-2)
    assert share.item() == pytest.approx(0.7**2 / (0.7**2 + 0.3**2), abs=1e-2)


def test_short_resampling_filter_equals_the_general_convolution():
    x = torch.randn(2, 3, 8, 8)
    padded = (0, 1, 1, 0)  # the same filter, written with four taps, takes the general path
    torch.testing.assert_close(resample_down(x, (1, 1)), resample_down(x, padded), **ROUNDING)
    torch.testing.assert_close(resample_up(x, (1, 1)), resample_up(x, padded), **ROUNDING)


def test_fresh_network_outputs_zero_and_keeps_activation_magnitudes():
    unet, (sample, timestep, labels) = active_unet(block_out_channels=(64, 128), attention_head_dim=32), example(4)
    magnitudes = []
    for name, block in [*unet.enc.items(), *unet.dec.items()]:
        block.register_forward_hook(lambda m, i, o, n=name: magnitudes.append(o.square().mean().sqrt().item()))
    with torch.no_grad():
        unet(sample, timestep, labels)
        assert len(magnitudes) == 11
        assert max(magnitudes) < 1.4 and min(magnitudes) > 0.6
        unet.out_gain.zero_()
        assert unet(sample, timestep, labels).sample.abs().max() == 0


def test_forced_normalization_happens_in_training_only():
    unet, inputs = active_unet(), example()
    weight = unet.enc["16x16_conv"].weight
    with torch.no_grad():
        weight.mul_(3)
        before = weight.clone()
        unet(*inputs)
        assert torch.equal(weight, before)

        by_hand = copy.deepcopy(unet).train()
        by_hand.normalize_in_forward = False
        by_hand.normalize_weights()
        unet.train()(*inputs)  # without gradients, as in sampling
        assert torch.equal(weight, before)
        with torch.enable_grad():
            assert torch.equal(unet(*inputs).sample, by_hand(*inputs).sample)
        assert torch.equal(weight, by_hand.enc["16x16_conv"].weight)
    # unit root mean square over each output filter, but for eps = 1e-4 in the norm
    torch.testing.assert_close(weight.square().mean((1, 2, 3)), torch.ones(8), rtol=3e-4, atol=0)


# --- What a Diffusers user does with a model -------------------------------------------------------------------------


def test_any_size_that_the_levels_divide():
    unet = active_unet(block_out_channels=(8, 8, 16), sample_size=16, attention_resolutions=(4,))
    assert unet(torch.randn(1, 3, 12, 20), 0.1).sample.shape == (1, 3, 12, 20)
    with pytest.raises(ValueError, match=r"sample is 12x18 pixels, but a network of 3 levels needs multiples of 4"):
        unet(torch.randn(1, 3, 12, 18), 0.1)


def test_timestep_may_be_a_number_a_scalar_or_one_per_sample():
    unet, (sample, _, labels) = active_unet(), example()
    with torch.no_grad():
        expected = unet(sample, torch.tensor([0.25, 0.25]), labels).sample
        for timestep in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.tensor(0.25, dtype=torch.float64)):
            assert torch.equal(unet(sample, timestep, labels).sample, expected)


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "5KB"}, {"variant": "fp16"}], ids=["plain", "sharded", "variant"]
)
def test_save_and_load(tmp_path, options):
    unet, inputs = active_unet(), example()
    unet.save_pretrained(tmp_path, **options)
    files = [p.name for p in tmp_path.iterdir()]
    assert all(name.endswith((".safetensors", ".json")) for name in files)
    assert len(files) > 3 if "max_shard_size" in options else len(files) == 2
    loaded = EDM2UNet2DModel.from_pretrained(tmp_path, variant=options.get("variant"))
    ours, theirs = (json.loads(m.to_json_string()) | {"_name_or_path": None} for m in (unet, loaded))
    assert theirs == ours
    for name, tensor in unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs).sample, unet(*inputs).sample, **ROUNDING)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.02), (torch.float16, 0.003)])
@pytest.mark.parametrize("how", ["from_pretrained", "to", "autocast"])
def test_half_precision_follows_float32(tmp_path, dtype, error, how):
    """Relative RMS error of F. Measured on a CPU: 1.0e-2 in bfloat16, 1.4e-3 in float16."""
    unet, (sample, timestep, labels) = active_unet(block_out_channels=(16, 32)), example(8)
    with torch.no_grad():
        exact, exact_u = unet(sample, timestep, labels, return_dict=False, return_logvar=True)
    if how == "from_pretrained":
        unet.save_pretrained(tmp_path)
        unet = EDM2UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
        assert unet.dtype == dtype and unet.logvar_linear.weight.dtype == torch.float32
    elif how == "to":
        unet.to(dtype)
    assert unet.emb_fourier.freqs.dtype == unet.logvar_fourier.phases.dtype == torch.float32
    assert copy.deepcopy(unet).double().float().emb_fourier.freqs.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=how == "autocast"):
        half, u = unet(sample.to(unet.dtype), timestep, labels, return_dict=False, return_logvar=True)
    assert half.dtype == dtype and u.dtype == torch.float32
    assert ((half.float() - exact).norm() / exact.norm()).item() < error
    # u is computed in float32; .to() is the one way that rounds its weights
    torch.testing.assert_close(u, exact_u, atol=0.02 if how == "to" else 1e-6, rtol=1e-5)


def test_fourier_features_survive_offload(tmp_path):
    from accelerate import cpu_offload, disk_offload

    unet, inputs = active_unet(), example()
    with torch.no_grad():
        expected = unet(*inputs).sample
        on_disk = disk_offload(copy.deepcopy(unet), tmp_path, execution_device=torch.device("cpu"))
        torch.testing.assert_close(on_disk(*inputs).sample, expected, **ROUNDING)
        torch.testing.assert_close(on_disk.logvar(0.1), unet.logvar(0.1), **ROUNDING)
        in_memory = cpu_offload(copy.deepcopy(unet), execution_device=torch.device("cpu"))
        torch.testing.assert_close(in_memory(*inputs).sample, expected, **ROUNDING)


def gradients(unet, run=None) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)  # dropout
    sample, timestep, labels = example()
    F_x, u = (unet if run is None else run)(sample, timestep, labels, return_dict=False, return_logvar=True)
    ((F_x - sample).square().sum() + u.square().sum()).backward()
    grads = {name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad}
    unet.zero_grad()
    return grads


def test_gradient_checkpointing_gives_the_same_gradients():
    unet = active_unet(dropout=0.2).train()
    expected = gradients(copy.deepcopy(unet))
    calls = []
    unet.dec["8x8_in0"].register_forward_pre_hook(lambda *_: calls.append(1))
    unet.enable_gradient_checkpointing()
    found = gradients(unet)
    assert len(calls) == 2  # once forward, once again for backward
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.slow
@pytest.mark.timeout(600)  # the compiler
# Diffusers' checkpointing function looks up torch's version, which dynamo has something to say about.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("mode", ["train", "train with checkpointing", "eval"])
def test_compiles_to_one_graph(mode):
    """Same gradients and same forced normalisation, from weights that are not normalised yet."""
    torch._dynamo.reset()
    unet = active_unet().train(mode != "eval")
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    if mode == "train with checkpointing":
        unet.enable_gradient_checkpointing()
    twin = copy.deepcopy(unet)
    expected, found = gradients(unet), gradients(twin, torch.compile(twin, fullgraph=True))
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        # rounding; gains are sums of cancelling terms and are compared on the scale of the other gradients
        assert (found[name] - gradient).norm() < 1e-5 * (gradient.norm() if gradient.ndim else largest), name
    for name, tensor in unet.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only():
    unet, inputs = active_unet(dropout=0.5), example()
    seen = []
    unet.dec["8x8_in1"].conv_res1.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    first, second = (unet.train()(*inputs).sample for _ in range(2))
    assert not torch.allclose(first, second)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    first, second = (unet.eval()(*inputs).sample for _ in range(2))
    assert torch.equal(first, second) and (seen[-1] == 0).float().mean().item() < 0.01


def test_activations_are_clipped():
    unet = active_unet(clip_act=0.1)
    outputs = []
    unet.dec["8x8_in1"].register_forward_hook(lambda module, args, output: outputs.append(output))
    unet(*example())
    assert outputs[0].abs().max().item() == pytest.approx(0.1)


def test_channels_last_and_deepcopy_change_nothing():
    unet, inputs = active_unet(), example()
    with torch.no_grad():
        expected = unet(*inputs).sample
        twin = copy.deepcopy(unet)
        assert torch.equal(twin(*inputs).sample, expected)
        twin.to(memory_format=torch.channels_last)
        found = twin(inputs[0].to(memory_format=torch.channels_last), *inputs[1:]).sample
    assert twin.enc["16x16_conv"].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, **ROUNDING)


def test_layers_are_plain_convolutions_and_linear_maps():
    """Layerwise casting and offloading act on instances of nn.Conv2d and nn.Linear."""
    unet, inputs = active_unet(), example()
    with torch.no_grad():
        expected = unet(*inputs).sample
        unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert isinstance(unet.out_conv, nn.Conv2d) and unet.out_conv.weight.dtype == torch.float8_e4m3fn
        assert unet.emb_fourier.freqs.dtype == torch.float32
        found = unet(*inputs).sample
    assert ((found - expected).norm() / expected.norm()).item() < 0.15  # 3 bits of mantissa


# --- Errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sample_size": 15}, r"sample_size=15 is not a positive multiple of 2, which 2 levels need"),
        ({"attention_resolutions": (4,)}, r"attention_resolutions \[4\] are not among .* resolutions \[16, 8\]"),
        ({"attention_head_dim": 5}, r"attention_head_dim=5 does not divide the 16 channels at resolution 8"),
        ({"num_class_embeds": 0}, r"num_class_embeds=0 is not a positive number; use None"),
        ({"resample_filter": (1, 2, 1)}, r"resample_filter=\(1, 2, 1\) needs an even number of taps"),
    ],
)
def test_config_errors(options, message):
    with pytest.raises(ValueError, match=message):
        active_unet(**options)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"sample": torch.zeros(2, 4, 16, 16)},
            r"sample has shape \[2, 4, 16, 16\], but the network takes \[batch, 3, H, W\]",
        ),
        ({"timestep": torch.zeros(3)}, r"timestep has 3 values for a batch of 2"),
        ({"class_labels": torch.tensor([1])}, r"class_labels have shape \[1\] .* takes long \[2\] or float \[2, 10\]"),
        ({"class_labels": torch.tensor([1, 10])}, r"class_labels \[1, 10\] are not all in \[0, 9\]"),
        ({"class_labels": torch.tensor([1, -2])}, r"class_labels \[1, -2\] are not all in \[0, 9\]"),
    ],
)
def test_input_errors(change, message):
    sample, timestep, labels = example()
    with pytest.raises(ValueError, match=message):
        active_unet()(**({"sample": sample, "timestep": timestep, "class_labels": labels} | change))


def test_unconditional_network_refuses_labels():
    sample, timestep, labels = example()
    unet = active_unet(num_class_embeds=None)
    assert "emb_label.weight" not in unet.state_dict()
    with pytest.raises(ValueError, match="class_labels were given to an unconditional network"):
        unet(sample, timestep, labels)


def test_logvar_takes_scalars_and_batches():
    unet = active_unet()
    u = unet.logvar(torch.tensor([0.1, math.log(2) / 4]))
    assert u.shape == (2,) and u.dtype == torch.float32
    assert torch.equal(unet.logvar(0.1), u[:1])
