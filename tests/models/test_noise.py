"""Noise processes against their formulas written a second way, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from sdpo.models.noise import Diffusion, RectifiedFlow, Times

KEYS = [(seed, epoch, position) for seed in (0, 1) for epoch in (0, 1) for position in range(500)]


def schedule(**more):
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **more)


def latents():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_velocity(zero_snr):
    """v = a eps - s x_0, from which x_0 = a x_t - s v and eps = s x_t + a v."""
    process = Diffusion(schedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr))
    clean, noise = latents()
    times = torch.tensor([0, 400, 998, 999])
    x_t, v = process.noised(clean, noise, times), process.target(clean, noise, times)
    a = process.schedule.alphas_cumprod[times].double().sqrt()[:, None, None, None]
    s = (1 - process.schedule.alphas_cumprod[times].double()).sqrt()[:, None, None, None]
    torch.testing.assert_close(v, a * noise - s * clean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a * x_t - s * v, clean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(s * x_t + a * v, noise, rtol=1e-5, atol=1e-5)
    if zero_snr:  # nothing of the image is left: v says all, eps nothing
        torch.testing.assert_close(v[-1], -clean[-1], rtol=1e-3, atol=1e-3)


def test_noise_is_the_target_of_epsilon():
    process = Diffusion(schedule())
    clean, noise = latents()
    assert process.target(clean, noise, torch.tensor([3, 5, 7, 900])) is noise


def test_rectified_flow():
    process = RectifiedFlow()
    clean, noise = latents()
    times = torch.tensor([0.0, 0.25, 0.9, 1.0])
    x_t, velocity = process.noised(clean, noise, times), process.target(clean, noise, times)
    for i, sigma in enumerate([0.0, 0.25, 0.9, 1.0]):
        wanted = (1 - sigma) * clean[i] + sigma * noise[i]
        torch.testing.assert_close(x_t[i], wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(x_t[i] - sigma * velocity[i], clean[i], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            x_t[i] + (1 - sigma) * velocity[i], noise[i], rtol=1e-6, atol=1e-6
        )


def logit_normal(sigma, mean, std):
    """The distribution's share below sigma."""
    return 0.5 * (1 + math.erf((math.log(sigma / (1 - sigma)) - mean) / std / math.sqrt(2)))


@pytest.mark.parametrize("how", [Times(), Times(mean=-0.5, std=0.7), Times("uniform")])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_their_distribution(how, shift):
    process = RectifiedFlow(shift, how)
    drawn = process.draw_times(KEYS)
    assert drawn.dtype == torch.float32 and drawn.shape == (2000,)
    assert drawn.min() > 0 and drawn.max() < 1
    for sigma in (0.1, 0.3, 0.5, 0.8):
        before = sigma / (shift - (shift - 1) * sigma)  # what the shift made sigma of
        share = before if how.sampling == "uniform" else logit_normal(before, how.mean, how.std)
        assert (drawn < sigma).float().mean().item() == pytest.approx(share, abs=0.04)
        (found,) = process.times_at([share]).tolist()
        assert found == pytest.approx(sigma, abs=1e-5)


def test_a_time_depends_on_its_key_alone():
    process = RectifiedFlow(3.0)
    assert torch.equal(process.draw_times(KEYS)[7:9], process.draw_times(KEYS[7:9]))
    assert len(set(process.draw_times(KEYS).tolist())) > 1990


def test_the_ends_of_the_distribution_are_finite():
    process = RectifiedFlow(3.0)
    assert process.times_at([0.0]).tolist() == [0.0]
    assert torch.isfinite(process.times_at([1 - 1e-12])).all()


def test_bins():
    process = RectifiedFlow()
    times = torch.tensor([0.0, 0.099, 0.1, 0.55, 1.0])
    assert process.bin_of(times, 10).tolist() == [0, 0, 1, 5, 9]
    names = process.bin_names(10)
    assert (names[0], names[9], len(names)) == ("0-0.1", "0.9-1", 10)
