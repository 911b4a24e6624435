"""Latents to pixels."""

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
    _require_finite(latents, "the denoised latents")
    vae = base.pipeline.vae
    z = latents.to(device=base.device, dtype=vae.dtype)
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        std_t = torch.tensor(std).view(1, -1, 1, 1).to(z)
        mean_t = torch.tensor(mean).view(1, -1, 1, 1).to(z)
        z = z * std_t / vae.config.scaling_factor + mean_t
    else:
        z = z / vae.config.scaling_factor
    image = vae.decode(z, return_dict=False)[0]
    _require_finite(image, "the decoded image")
    rows = (image * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
    pixels: npt.NDArray[np.uint8] = (rows * 255).round().astype(np.uint8)
    return pixels


def _require_finite(tensor: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise GenerationFailed(f"{what} hold NaN or infinity: lower guidance_scale, or set base.dtype=float32")
