"""The objective, and six whole training steps against the reference."""

import math

import pytest
import torch

from diffusers_edm2 import EDM2HeunScheduler, EDM2Loss, PowerFunctionEMA
from diffusers_edm2.loss import drop_labels, noise_generators
from diffusers_edm2.optim import guard_gradients, learning_rate
from golden_files import build_unet, load_golden, select
from test_unet_edm2 import active_unet


@pytest.mark.parametrize("name", ["unet_g_rgb_cond", "unet_g_latent_uncond", "unet_g_options"])
def test_loss_and_gradients_equal_reference(name):
    tensors, metadata = load_golden(f"{name}.safetensors")
    config = metadata["config"]
    unet = build_unet(config).train()
    unet.load_state_dict(select(tensors, "param"))
    scheduler = EDM2HeunScheduler(sigma_data=config.get("sigma_data", 0.5))
    sigma = (metadata["P_mean"] + metadata["P_std"] * tensors["train_rnd_normal"].flatten()).exp()
    out = EDM2Loss()(
        unet, scheduler, tensors["train_images"], tensors.get("class_labels"), sigma, tensors["train_noise"]
    )
    # float32 on both sides: only the order of additions differs
    torch.testing.assert_close(out.loss_per_sample, tensors["train_loss_per_sample"].flatten(), rtol=2e-6, atol=1e-6)
    pixels = tensors["train_images"][0].numel()
    torch.testing.assert_close(out.loss, pixels * out.loss_per_sample.mean(), rtol=1e-6, atol=0)

    out.loss.backward()
    expected = select(tensors, "grad")
    found = {n: p.grad for n, p in unet.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys()
    largest = max(g.norm() for g in expected.values())
    for key, gradient in expected.items():
        # Gains are sums of cancelling terms: they are compared on the scale of the other gradients.
        scale = gradient.norm() if gradient.ndim else largest
        assert (found[key] - gradient).norm() < 5e-6 * scale, key


def test_training_trajectory_equals_reference():
    """Normalise, forward/backward, learning rate, step, EMA: six times, to the last digits of float32."""
    tensors, metadata = load_golden("training_trajectory.safetensors")
    batch = metadata["batch_size"]
    unet = build_unet(metadata["config"]).train()
    unet.load_state_dict(select(tensors, "initial"))
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, betas=metadata["adam_betas"], eps=1e-8)
    ema = PowerFunctionEMA(unet, metadata["ema_stds"])
    loss, scheduler = EDM2Loss(metadata["P_mean"], metadata["P_std"]), EDM2HeunScheduler()
    for step in range(6):
        nimg = step * batch
        sigma = (loss.P_mean + loss.P_std * tensors["rnd_normal"][step].flatten()).exp()
        labels = tensors["class_index"][step]
        out = loss(unet, scheduler, tensors["images"][step], labels, sigma, tensors["noise"][step])
        assert out.loss_per_sample.double().mean().item() == pytest.approx(tensors["loss_mean"][step].item(), rel=2e-6)
        optimizer.zero_grad()
        out.loss.backward()
        guard_gradients(trained)
        lr = learning_rate(nimg, batch, metadata["ref_lr"], metadata["ref_batches"], metadata["rampup_images"])
        assert lr == pytest.approx(tensors["lr"][step].item(), rel=1e-12)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        ema.update(nimg + batch)
    # Rounding, which Adam amplifies where a gradient is near 0. Forgetting to normalise once would show as 6e-5.
    for prefix, found in [
        ("final", unet.state_dict()),
        ("ema_0.050", ema.averaged(0.05)),
        ("ema_0.100", ema.averaged(0.1)),
    ]:
        expected = select(tensors, prefix)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=f"{prefix} {name}": f"{n}: {m}"
            )


def test_fresh_network_has_loss_one():
    """F = 0 and u = 0: the loss is lambda (c_skip x - y)² = 1 on average over Gaussian data of variance sigma_data²."""
    unet = active_unet(num_class_embeds=None).train()
    torch.nn.init.zeros_(unet.out_gain)
    loss, scheduler = EDM2Loss(), EDM2HeunScheduler()
    generator = torch.Generator().manual_seed(0)
    images = 0.5 * torch.randn(256, 3, 16, 16, generator=generator)
    sigma, noise = loss.draw(images, generator)
    unet.logvar = lambda timestep: torch.zeros(256)
    out = loss(unet, scheduler, images, None, sigma, noise)
    assert out.loss_per_sample.mean().item() == pytest.approx(1, abs=0.01)
    assert out.loss.item() == pytest.approx(3 * 16 * 16, rel=0.01)


def test_noise_levels_are_lognormal():
    sigma, noise = EDM2Loss(P_mean=-1.2, P_std=0.5).draw(torch.zeros(20000, 1, 2, 2), torch.Generator().manual_seed(0))
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.02)
    assert sigma.log().std().item() == pytest.approx(0.5, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def test_draws_follow_the_image_not_the_batch():
    loss = EDM2Loss()
    seeded = lambda seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
    sigma, noise = loss.draw(torch.zeros(4, 3, 8, 8), seeded(range(4)))
    other_sigma, other_noise = loss.draw(torch.zeros(2, 3, 8, 8), seeded([2, 3]))
    assert torch.equal(sigma[2:], other_sigma) and torch.equal(noise[2:], other_noise)
    with pytest.raises(ValueError, match="3 generators for 4 images; pass one per image, or just one"):
        loss.draw(torch.zeros(4, 3, 8, 8), seeded(range(3)))


def test_u_converges_to_the_log_of_the_loss():
    """Minimising loss / exp(u) + u over u gives u = ln(loss)."""
    unet, u = active_unet(num_class_embeds=None), torch.tensor(0.0, requires_grad=True)
    unet.logvar = lambda timestep: u.expand(8)
    run = lambda: EDM2Loss()(unet, EDM2HeunScheduler(), *fixed_batch())  # noqa: E731
    unweighted = run().loss_per_sample.mean().item()  # u = 0
    optimizer = torch.optim.Adam([u], lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        run().loss.backward()
        optimizer.step()
    assert abs(math.log(unweighted)) > 0.1
    assert u.item() == pytest.approx(math.log(unweighted), abs=0.01)


def fixed_batch():
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(8, 3, 16, 16, generator=generator) for _ in range(2))
    return 0.5 * images, None, torch.ones(8), noise


def test_p_std_must_be_positive():
    with pytest.raises(ValueError, match=r"P_std=0 must be positive: it is the standard deviation of ln\(sigma\)"):
        EDM2Loss(P_std=0)


def test_labels_are_dropped_at_the_given_rate_whatever_the_batch():
    labels = torch.arange(4000) % 10
    generators = lambda: noise_generators(0, range(4000))  # noqa: E731
    dropped = drop_labels(labels, 0.1, generators())
    assert set(dropped[dropped != labels].tolist()) == {-1}
    share = (dropped == -1).float().mean().item()
    assert abs(share - 0.1) < 5 * math.sqrt(0.1 * 0.9 / 4000)
    assert torch.equal(drop_labels(labels[1000:1007], 0.1, generators()[1000:1007]), dropped[1000:1007])


def test_without_label_dropout_nothing_is_drawn():
    generators, untouched = noise_generators(0, range(3)), noise_generators(0, range(3))
    assert drop_labels(torch.tensor([1, 2, 3]), 0.0, generators).tolist() == [1, 2, 3]
    assert [g.get_state().tolist() for g in generators] == [g.get_state().tolist() for g in untouched]
