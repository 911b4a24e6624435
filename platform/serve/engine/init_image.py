"""Starting from an image in place of noise: image to image, and inpainting with a base of four latent channels.

The arithmetic, and the order in which random numbers are drawn, is that of diffusers' StableDiffusionXLImg2Img- and
InpaintPipeline for one image, "legacy" blending: after each step what the mask keeps is put back, noised as far as
the next step expects it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from lorafleet.sdxl.base import Base


class InitImage:
    """The latents of an image, its noise, and which of them a mask keeps; for one job."""

    def __init__(
        self,
        base: Base,
        image: Image.Image,
        mask: Image.Image | None,
        generator: torch.Generator,
        size: tuple[int, int],
        dtype: torch.dtype,
    ) -> None:
        """Draws from `generator`. `image` and `mask` (white is drawn anew) are scaled to `size`, (width, height)."""
        width, height = size
        factor = base.pipeline.vae_scale_factor
        pixels = VaeImageProcessor(vae_scale_factor=factor).preprocess(image.convert("RGB"), height, width)
        self._latents = _encode(base, pixels, generator, dtype)
        self._noise = randn_tensor(self._latents.shape, generator=generator, device=base.device, dtype=dtype)
        self._mask: torch.Tensor | None = None
        if mask is not None:
            processor = VaeImageProcessor(
                vae_scale_factor=factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
            )
            whole = processor.preprocess(mask, height, width)
            self._mask = F.interpolate(whole, size=(height // factor, width // factor)).to(base.device, dtype)
            # diffusers samples the masked image's latents here, which only bases of nine channels use.
            randn_tensor(self._latents.shape, generator=generator, device=base.device, dtype=dtype)

    def start(self, scheduler: Any, timestep: torch.Tensor, *, from_noise: bool) -> torch.Tensor:
        """Latents to begin with at `timestep`, the first of those that are left."""
        if from_noise:
            return self._noise * scheduler.init_noise_sigma  # type: ignore[no-any-return]
        return self._noised(scheduler, timestep)

    def keep(self, latents: torch.Tensor, scheduler: Any, next_timestep: torch.Tensor | None) -> torch.Tensor:
        """`latents` after a step, with what the mask keeps put back. None: it was the last one."""
        if self._mask is None:
            return latents
        original = self._latents if next_timestep is None else self._noised(scheduler, next_timestep)
        return (1 - self._mask) * original + self._mask * latents

    def _noised(self, scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
        noised: torch.Tensor = scheduler.add_noise(self._latents, self._noise, timestep.reshape(1))
        return noised


def first_step(steps: int, strength: float) -> int:
    """How many of the steps are left out at the beginning."""
    return max(steps - min(int(steps * strength), steps), 0)


def _encode(base: Base, pixels: torch.Tensor, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """pixels [1, 3, H, W] in [-1, 1] -> a sample of their latents [1, 4, h, w] as the UNet sees them."""
    vae = base.pipeline.vae
    latents = vae.encode(pixels.to(device=base.device, dtype=vae.dtype)).latent_dist.sample(generator).to(dtype)
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is not None and std is not None:
        mean_t, std_t = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        scaled: torch.Tensor = (latents - mean_t) * vae.config.scaling_factor / std_t
        return scaled
    plain: torch.Tensor = vae.config.scaling_factor * latents
    return plain
