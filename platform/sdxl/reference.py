"""The oracle: diffusers' own pipeline, one image at a time, that faster code is tested against."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import MAX_SEED, GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.schedulers import make_scheduler
from lorafleet.sdxl.vae import decode

OnStep = Callable[[int, int], None]
"""Called after each denoising evaluation with (done, total); what it raises stops the generation."""


def generate(base: Base, request: GenerationRequest, *, on_step: OnStep | None = None) -> list[Image.Image]:
    """RGB images, image i from a CPU generator seeded with `seed + i`.

    `request.seed` must be given: an oracle does not draw one. Raises InvalidRequest.
    """
    if request.seed is None:
        raise InvalidRequest("seed must be given to the reference", param="seed")
    base.limits.check(request)
    return [_one_image(base, request, (request.seed + i) % (MAX_SEED + 1), on_step) for i in range(request.num_images)]


def _one_image(base: Base, request: GenerationRequest, seed: int, on_step: OnStep | None) -> Image.Image:
    width, height = base.limits.size_of(request)
    pipeline = copy.copy(base.pipeline)
    pipeline.scheduler = make_scheduler(base, request.scheduler)

    def after_step(_: object, index: int, *_more: object) -> dict[str, object]:
        if on_step is not None:
            on_step(index + 1, pipeline.num_timesteps)
        return {}

    # A float32 VAE beside a float16 UNet is our own arrangement (see `Base`), so its decoding is ours too.
    mixed = pipeline.vae.dtype != base.dtype
    with _reusing(pipeline.unet, request.step_reuse):
        output = pipeline(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt or None,
            width=width,
            height=height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent" if mixed else "pil",
            callback_on_step_end=after_step,
        ).images
    image: Image.Image = Image.fromarray(decode(base, output)[0]) if mixed else output[0]
    return image


@contextmanager
def _reusing(unet: Any, every: int) -> Iterator[None]:
    """The UNet computes all of it each time, but what its last block gets from within is that of every `every`-th
    evaluation: no quicker, and what reusing it should give."""
    count, kept = 0, None

    def replace(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        nonlocal count, kept
        if count % every == 0:
            kept = options["hidden_states"]
        count += 1
        return arguments, options | {"hidden_states": kept}

    hook = unet.up_blocks[-1].register_forward_pre_hook(replace, with_kwargs=True) if every > 1 else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
