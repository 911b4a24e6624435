"""What a training step minimises, as pure functions of tensors.

Shapes: B samples, latents [B, 4, h, w]. Everything here is float32, whatever the model computes in. `alphas_cumprod`
is the base's own schedule, [T], alpha-bar of DDPM (https://arxiv.org/abs/2006.11239, section 2).
"""

import torch
import torch.nn.functional as F

PREDICTIONS = ("epsilon", "v_prediction")


def add_noise(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, alphas_cumprod: torch.Tensor
) -> torch.Tensor:
    """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps, DDPM equation 4. timesteps: [B], int64, 0 to T-1."""
    signal, spread = _rates(timesteps, alphas_cumprod)
    return signal * latents + spread * noise


def target(
    prediction: str,
    latents: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
) -> torch.Tensor:
    """What the UNet should put out: the noise, or v = sqrt(a_t) eps - sqrt(1 - a_t) x_0 (https://arxiv.org/abs/2202.00512,
    appendix D)."""
    if prediction == "epsilon":
        return noise
    assert prediction == "v_prediction"
    signal, spread = _rates(timesteps, alphas_cumprod)
    return signal * noise - spread * latents


def snr(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Signal to noise ratio a_t / (1 - a_t), [B]; 0 at the end of a schedule rescaled to zero terminal SNR."""
    alphas = alphas_cumprod[timesteps]
    return alphas / (1 - alphas)


def min_snr_weights(ratio: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """Loss weights [B] of Min-SNR (https://arxiv.org/abs/2303.09556, section 3.4): min(SNR, gamma) / SNR for noise,
    min(SNR, gamma) / (SNR + 1) for v. Where SNR is 0 the first one's limit, 1, is taken."""
    clipped = ratio.clamp(max=gamma)
    if prediction == "v_prediction":
        return clipped / (ratio + 1)
    return torch.where(ratio > 0, clipped / ratio.clamp(min=1e-12), torch.ones_like(ratio))


def offset_noise(noise: torch.Tensor, shift: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise whose channels are shifted as a whole, so that dark and bright pictures are learnt
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise). shift: normal, noise's shape
    but for h and w, which are 1."""
    return noise + strength * shift


def sample_losses(predicted: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of each sample, times its weight: [B]."""
    losses = F.mse_loss(predicted.float(), wanted.float(), reduction="none").flatten(1).mean(1)
    return losses if weights is None else losses * weights


def _rates(timesteps: torch.Tensor, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alphas = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()
