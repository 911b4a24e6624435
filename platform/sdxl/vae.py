"""Pixels to latents and back."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.core.errors import GenerationFailed
from lorafleet.sdxl.base import Base


@torch.inference_mode()
def decode(base: Base, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
    """latents [B, 4, h, w] as the UNet sees them -> RGB pixels [B, H, W, 3], uint8, as diffusers' pipeline rounds.

    Raises GenerationFailed for non-finite latents or pixels.
    """
    return to_host(*decode_on_device(base, latents))


def decode_on_device(base: Base, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The pixels of `decode` and whether latents and pixels are finite, [2], bool: for `to_host`. Waits for nothing."""
    vae = base.pipeline.vae
    z = latents.to(device=base.device, dtype=vae.dtype)
    moments = _channel_moments(vae, z)
    if moments is not None:
        mean, std = moments
        z = z * std / vae.config.scaling_factor + mean
    else:
        z = z / vae.config.scaling_factor
    image = vae.decode(z, return_dict=False)[0]
    are_finite = torch.stack([torch.isfinite(tensor).all() for tensor in (latents.to(base.device), image)])
    rows = (image * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float()
    return (rows * 255).round().to(torch.uint8), are_finite


@torch.inference_mode()
def encode_posterior(vae: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """pixels [B, 3, H, W] in [-1, 1] -> mean and standard deviation of their latents as the UNet sees them.

    Both [B, 4, h, w], float32, on the VAE's device, not finite where the VAE overflows.
    """
    posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    moments = _channel_moments(vae, mean)
    if moments is not None:
        mean, std = (mean - moments[0]) / moments[1], std / moments[1]
    return mean * vae.config.scaling_factor, std * vae.config.scaling_factor


def to_host(pixels: torch.Tensor, are_finite: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Raises GenerationFailed unless `are_finite`."""
    for is_finite, what in zip(are_finite.tolist(), ("the denoised latents", "the decoded image"), strict=True):
        if not is_finite:
            raise GenerationFailed(f"{what} hold NaN or infinity: lower guidance_scale, or set base.dtype=float32")
    found: npt.NDArray[np.uint8] = pixels.cpu().numpy()
    return found


def _channel_moments(vae: Any, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What some VAEs normalise each latent channel by, [1, 4, 1, 1]."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return None
    return torch.tensor(mean).view(1, -1, 1, 1).to(like), torch.tensor(std).view(1, -1, 1, 1).to(like)
