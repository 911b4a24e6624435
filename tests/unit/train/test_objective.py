"""The objective's equations, against diffusers' own and by hand."""

import pytest
import torch
from diffusers import DDPMScheduler

from lorafleet.train import objective

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ALPHAS = SCHEDULE.alphas_cumprod.float()
TIMESTEPS = torch.tensor([0, 10, 500, 999])


def latents(seed: int) -> torch.Tensor:
    return torch.randn(4, 4, 8, 6, generator=torch.Generator().manual_seed(seed))


def test_noise_and_v_are_those_of_diffusers() -> None:
    x, noise = latents(0), latents(1)
    torch.testing.assert_close(
        objective.add_noise(x, noise, TIMESTEPS, ALPHAS), SCHEDULE.add_noise(x, noise, TIMESTEPS)
    )
    v = objective.target("v_prediction", x, noise, TIMESTEPS, ALPHAS)
    torch.testing.assert_close(v, SCHEDULE.get_velocity(x, noise, TIMESTEPS))
    assert objective.target("epsilon", x, noise, TIMESTEPS, ALPHAS) is noise


def test_min_snr_weighs_both_predictions_alike_in_terms_of_x0() -> None:
    # an error e of x0 is an error e sqrt(SNR) of the noise and e sqrt(SNR + 1) of v: both weights mean min(SNR, gamma)
    ratio = objective.snr(TIMESTEPS, ALPHAS)
    for prediction, factor in (("epsilon", ratio), ("v_prediction", ratio + 1)):
        weights = objective.min_snr_weights(ratio, 5.0, prediction)
        torch.testing.assert_close(weights * factor, ratio.clamp(max=5.0))


def test_a_schedule_that_ends_in_pure_noise_has_no_infinite_weight() -> None:
    weights = objective.min_snr_weights(torch.tensor([0.0, 25.0]), 5.0, "epsilon")
    assert weights.tolist() == pytest.approx([1.0, 0.2])
    assert objective.min_snr_weights(torch.tensor([0.0]), 5.0, "v_prediction").tolist() == [0.0]


def test_the_offset_shifts_each_channel_as_a_whole() -> None:
    noise, shift = latents(0), torch.randn(4, 4, 1, 1)
    moved = objective.offset_noise(noise, shift, 0.1) - noise
    torch.testing.assert_close(moved, (0.1 * shift).expand_as(noise), atol=1e-6, rtol=0)


def test_losses_are_per_sample_and_weighted() -> None:
    wanted = torch.zeros(2, 4, 2, 2)
    predicted = torch.stack([torch.ones(4, 2, 2), torch.full((4, 2, 2), 3.0)])
    assert objective.sample_losses(predicted, wanted).tolist() == [1.0, 9.0]
    assert objective.sample_losses(predicted, wanted, torch.tensor([2.0, 0.5])).tolist() == [2.0, 4.5]
