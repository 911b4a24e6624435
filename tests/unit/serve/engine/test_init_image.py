"""Image to image and inpainting, against diffusers' own pipelines."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image, ImageDraw

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import SCHEDULERS, GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.schedulers import make_scheduler
from lorafleet.serve.engine import Engine, Job

SIZE = (64, 96)


def picture() -> Image.Image:
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).ellipse((10, 10, 54, 70), fill="red")
    return image


def mask() -> Image.Image:
    image = Image.new("L", SIZE, 0)
    ImageDraw.Draw(image).rectangle((0, 0, 40, 40), fill=255)
    return image


def request(scheduler: str, steps: int = 5, guidance_scale: float = 5.0) -> GenerationRequest:
    width, height = SIZE
    options: dict[str, Any] = {"scheduler": scheduler, "steps": steps, "guidance_scale": guidance_scale}
    return GenerationRequest(prompt="a green pear", width=width, height=height, **options)


def expected(base: Base, job: Job) -> Image.Image:
    kind = StableDiffusionXLImg2ImgPipeline if job.mask is None else StableDiffusionXLInpaintPipeline
    parts = {**base.pipeline.components, "scheduler": make_scheduler(base, job.request.scheduler)}
    zeros = base.pipeline.config.force_zeros_for_empty_prompt
    pipeline = kind(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {} if job.mask is None else {"mask_image": job.mask, "width": SIZE[0], "height": SIZE[1]}
    image: Image.Image = pipeline(
        prompt=job.request.prompt,
        image=job.init_image,
        strength=job.strength,
        num_inference_steps=job.request.steps,
        guidance_scale=job.request.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
        **options,
    ).images[0]
    return image


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [
        *((scheduler, 0.6) for scheduler in SCHEDULERS),
        ("euler", 1.0),
        *(pytest.param(scheduler, 1.0, marks=pytest.mark.nightly) for scheduler in SCHEDULERS if scheduler != "euler"),
    ],
)
def test_equals_diffusers(
    emojixl: Base,
    make_engine: Callable[..., Engine],
    pixels: Callable[[Image.Image], Any],
    scheduler: str,
    has_mask: bool,
    strength: float,
) -> None:
    job = Job(request(scheduler), seed=3, init_image=picture(), mask=mask() if has_mask else None, strength=strength)
    engine = make_engine(exact=True)
    neighbour = engine.submit(Job(request("euler"), seed=1))
    handle = engine.submit(job)
    engine.run_until_idle()
    assert abs(pixels(handle.result().image) - pixels(expected(emojixl, job))).max() < 2
    assert neighbour.result().image.size == SIZE


def test_what_makes_no_sense_is_refused(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="strength must be from 1/steps = 0.2 to 1"):
        engine.submit(Job(request("euler"), seed=0, init_image=picture(), strength=0.1))
    for strength in (float("nan"), 1.01, -0.5):
        with pytest.raises(InvalidRequest, match="strength must be"):
            engine.submit(Job(request("euler"), seed=0, init_image=picture(), strength=strength))
    with pytest.raises(InvalidRequest, match="mask needs init_image"):
        engine.submit(Job(request("euler"), seed=0, mask=mask()))
