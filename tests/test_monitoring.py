"""What the log shows, against plain computations on the same numbers and on a real network."""

import math

import numpy as np
import pytest
import torch

from diffusers_edm2 import EDM2UNet2DModel
from diffusers_edm2.monitoring import SIGMA_EDGES, LossMeter, activation_magnitudes, weight_magnitudes


def draws(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, u and noise levels of n samples; sigma from 0.0002 to 200, so that every interval has some."""
    generator = torch.Generator().manual_seed(seed)
    loss, logvar = torch.rand(2, n, generator=generator)
    return loss, logvar, (-1.5 + 2.5 * torch.randn(n, generator=generator)).exp()


def fresh_unet(dropout: float = 0.0) -> EDM2UNet2DModel:
    torch.manual_seed(0)
    return EDM2UNet2DModel(
        sample_size=8,
        in_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_resolutions=(4,),
        attention_head_dim=32,
        num_class_embeds=3,
        dropout=dropout,
    )


def inputs(batch: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 1, 8, 8, generator=generator)
    return sample, torch.randn(batch, generator=generator) / 4, torch.arange(batch) % 3


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def test_losses_by_noise_level():
    """Each interval against numpy, its upper edge included."""
    loss, logvar, sigma = draws(400)
    sigma[:7] = torch.tensor(SIGMA_EDGES)  # exactly on an edge: below it
    meter = LossMeter()
    for part in range(0, 400, 100):  # as micro-batches come
        meter.add_samples(loss[part : part + 100], logvar[part : part + 100], sigma[part : part + 100])
    meter.add_step(torch.tensor(1.0), torch.tensor(0))
    means = meter.means()

    values, levels = loss.double().numpy(), sigma.numpy()
    edges = np.array([0, *SIGMA_EDGES, np.inf], dtype=np.float32)
    names = ["0-0.01", "0.01-0.03", "0.03-0.1", "0.1-0.3", "0.3-1", "1-3", "3-10", "10-inf"]
    for name, low, high in zip(names, edges, edges[1:], strict=False):
        inside = (low < levels) & (levels <= high)
        assert inside.sum() > 3
        assert means[f"loss/sigma_{name}"] == pytest.approx(values[inside].mean(), rel=1e-12)
    assert len([key for key in means if key.startswith("loss/")]) == len(names) == 8
    assert means["loss"] == pytest.approx(values.mean(), rel=1e-12)
    assert means["logvar"] == pytest.approx(logvar.double().numpy().mean(), rel=1e-12)


def test_empty_intervals_are_left_out():
    meter = LossMeter()
    meter.add_samples(torch.tensor([2.0, 4.0]), torch.zeros(2), torch.tensor([0.2, 0.15]))
    meter.add_step(torch.tensor(5.0), torch.tensor(0))
    assert meter.means() == {
        "loss": 3.0,
        "logvar": 0.0,
        "grad_norm": 5.0,
        "nonfinite_gradients": 0.0,
        "loss/sigma_0.1-0.3": 3.0,
    }


def test_the_sums_of_two_processes_combine():
    """Each process has samples of its own; all measure the same gradients, which are averaged before."""
    loss, logvar, sigma = draws(90)
    steps = [(torch.tensor(1.5), torch.tensor(0)), (torch.tensor(2.5), torch.tensor(6))]
    alone, first, second = LossMeter(), LossMeter(), LossMeter()
    for meter, part in ((alone, slice(None)), (first, slice(0, 30)), (second, slice(30, None))):
        meter.add_samples(loss[part], logvar[part], sigma[part])
        for step in steps:
            meter.add_step(*step)
    together = first.means(first.sums + second.sums)
    assert together == pytest.approx(alone.means(), rel=1e-12)
    assert together["grad_norm"] == 2.0
    assert together["nonfinite_gradients"] == 3.0  # elements per step, whatever the number of processes


def test_reset_begins_anew_and_sums_can_be_restored():
    meter, resumed = LossMeter(), LossMeter()
    meter.add_samples(*draws(20))
    meter.add_step(torch.tensor(1.0), torch.tensor(0))
    before = meter.means()
    resumed.restore(meter.sums[None], rank=0, world=1)
    assert resumed.means() == before
    meter.reset()
    assert not meter.sums.any()
    meter.add_samples(*draws(20))
    meter.add_step(torch.tensor(1.0), torch.tensor(0))
    assert meter.means() == before


def test_many_small_losses_keep_their_digits():
    """float64 sums: in float32, 2^24 + 1 is 2^24, and the log would stop counting."""
    meter = LossMeter()
    meter.add_samples(torch.tensor([2.0**24]), torch.zeros(1), torch.tensor([0.5]))
    meter.add_samples(torch.tensor([1.0]), torch.zeros(1), torch.tensor([0.5]))
    meter.add_step(torch.tensor(1.0), torch.tensor(0))
    assert meter.means()["loss"] == meter.means()["loss/sigma_0.3-1"] == (2**24 + 1) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Magnitudes


GROUPS = ["enc_8x8", "enc_4x4", "dec_4x4", "dec_8x8"]


def test_fresh_weights_have_magnitude_1():
    """N(0, 1): the root mean square of n numbers is off by about 1/sqrt(2n), here n > 10 000."""
    magnitudes = weight_magnitudes(fresh_unet())
    assert list(magnitudes) == [f"weights/{group}" for group in GROUPS]
    assert all(abs(value - 1) < 4 / math.sqrt(2 * 10_000) for value in magnitudes.values())


def test_normalised_weights_have_magnitude_1_and_grown_ones_do_not():
    unet = fresh_unet()
    with torch.no_grad():
        for parameter in unet.enc["4x4_block0"].parameters():
            parameter *= 3
        for parameter in unet.enc["4x4_down"].parameters():
            parameter *= 3
    grown = weight_magnitudes(unet)
    assert grown["weights/enc_4x4"] == pytest.approx(3, rel=0.03)
    assert grown["weights/enc_8x8"] == pytest.approx(1, rel=0.03)
    unet.normalize_weights()
    # each filter of n weights becomes 1 - eps * sqrt(number of weights / number of filters) / norm = 1 - 1e-4 or so
    assert weight_magnitudes(unet) == pytest.approx({f"weights/{group}": 1.0 for group in GROUPS}, abs=2e-4)


def test_fresh_activations_have_magnitude_1():
    """Up to the zero padding: of a 3x3 convolution's taps at n x n pixels, (1 - 2/(3n))² lie inside, 69 % at 4x4."""
    magnitudes = activation_magnitudes(fresh_unet(), *inputs())
    assert list(magnitudes) == [f"activations/{group}" for group in GROUPS]
    assert all(math.sqrt(0.69) - 0.05 < value < 1.05 for value in magnitudes.values())


def test_activation_magnitudes_are_means_over_the_blocks():
    """The encoder, run by hand."""
    unet = fresh_unet().eval()
    sample, timestep, labels = inputs()
    found: dict[str, list[float]] = {"activations/enc_8x8": [], "activations/enc_4x4": []}
    with torch.no_grad():
        emb = unet.embed(timestep, labels)
        x = torch.cat([sample, torch.ones_like(sample)], dim=1)
        for name, layer in unet.enc.items():
            x = layer(x) if name.endswith("conv") else layer(x, emb)
            found[f"activations/enc_{name[:3]}"].append(math.sqrt(x.square().mean()))
    magnitudes = activation_magnitudes(unet, sample, timestep, labels)
    assert {len(values) for values in found.values()} == {2}
    for group, values in found.items():
        assert magnitudes[group] == pytest.approx(sum(values) / 2, rel=1e-6)


def test_magnitudes_without_classes():
    magnitudes = activation_magnitudes(fresh_unet(), *inputs()[:2], None)  # as the script passes them
    assert len(magnitudes) == 4


@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_nothing(training):
    """Not the mode, the weights (which training mode would normalise), the hooks of others, or the random state."""
    unet = fresh_unet(dropout=0.5).train(training)
    calls: list[int] = []
    unet.dec["8x8_up"].register_forward_hook(lambda *_: calls.append(1))
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in unet.modules()]
    random_state = torch.get_rng_state()

    first = activation_magnitudes(unet, *inputs())

    assert sum(hooks) == len(calls) == 1
    assert [len(module._forward_hooks) for module in unet.modules()] == hooks
    assert {module.training for module in unet.modules()} == {training}
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert activation_magnitudes(unet, *inputs()) == first


def test_a_failing_look_changes_nothing():
    unet = fresh_unet().train()
    with pytest.raises(ValueError, match="sample has shape"):
        activation_magnitudes(unet, torch.zeros(1, 5, 8, 8), torch.zeros(1))
    assert unet.training
    assert not any(module._forward_hooks for module in unet.modules())
