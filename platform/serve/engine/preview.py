"""Latents as small pictures, by a linear map from latent to RGB that is fitted to the base's own VAE."""

import functools
import threading

import torch
import torch.nn.functional as F
from PIL import Image

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.vae import decode

# Smooth random latents: where the neighbours of a latent are like it, its pixels depend on it alone.
SAMPLES, SIDE, CELLS = 4, 16, 4
SEED = 0


class Previewer:
    """Fits the map when it is first used: four decodings at 128x128 pixels. Safe for several threads."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._lock = threading.Lock()

    def render(self, latents: torch.Tensor) -> Image.Image:
        """latents [1, 4, h, w] as the UNet sees them -> RGB image of w x h pixels. NaN becomes black."""
        with self._lock:
            weights = self._weights
        rgb = _features(latents.detach().float().cpu()) @ weights
        pixels = (rgb.nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8)
        height, width = latents.shape[-2:]
        return Image.fromarray(pixels.reshape(height, width, 3).numpy())

    @functools.cached_property
    def _weights(self) -> torch.Tensor:
        """[5, 3]: the least-squares solution of [latent, 1] @ W = mean RGB of the 8x8 pixels of that latent."""
        generator = torch.Generator("cpu").manual_seed(SEED)
        cells = torch.randn(SAMPLES, 4, CELLS, CELLS, generator=generator)
        latents = F.interpolate(cells, size=SIDE, mode="bilinear", align_corners=False)
        pixels = [torch.from_numpy(decode(self._base, latents[i : i + 1])) for i in range(SAMPLES)]
        images = torch.cat(pixels).permute(0, 3, 1, 2).float() / 255
        rgb = F.adaptive_avg_pool2d(images, SIDE).permute(0, 2, 3, 1).reshape(-1, 3)
        solution: torch.Tensor = torch.linalg.lstsq(_features(latents), rgb).solution
        return solution


def _features(latents: torch.Tensor) -> torch.Tensor:
    """[B, 4, h, w] -> [B * h * w, 5], the last feature 1."""
    flat = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
