import io
import time

import numpy as np
import pytest
import torch
from PIL import Image

from lorafleet.core.errors import DeadlineExceeded, GenerationFailed, InvalidRequest
from lorafleet.core.generation import SCHEDULERS, GenerationRequest
from lorafleet.core.recipe import extract
from lorafleet.sdxl import reference
from lorafleet.serve.pipeline import Pipeline

LONG = "a red apple on a blue background, " * 20


def pixels(png: bytes | Image.Image) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.asarray(Image.open(io.BytesIO(png)) if isinstance(png, bytes) else png)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_equals_the_oracle_pixel_for_pixel(pipeline: Pipeline, scheduler: str) -> None:
    request = GenerationRequest(
        prompt="red apple on a blue background",
        negative_prompt="" if scheduler in ("euler", "lcm") else "green",
        scheduler=scheduler,  # type: ignore[arg-type]
        guidance_scale=1.0 if scheduler == "ddim" else 5.0,
        width=128 if scheduler == "heun" else 96,
        height=160,
        steps=4,
        seed=2**32 - 1,
        num_images=2,
    )
    ours = pipeline.generate(request)
    assert ours.seeds == [2**32 - 1, 0]
    for png, image in zip(ours.images, reference.generate(pipeline.base, request), strict=True):
        assert (pixels(png) == pixels(image)).all()
        assert pixels(png).shape == (160, request.width, 3)


def test_the_recipe_in_a_png_makes_it_again(pipeline: Pipeline) -> None:
    first = pipeline.generate(GenerationRequest(prompt="yellow star", steps=2, num_images=2, scheduler="euler_a"))
    recipe = extract(first.images[1])
    assert recipe.seed == first.seeds[1] == (first.seeds[0] + 1) % 2**32
    assert recipe.base.fingerprint == pipeline.base.fingerprint
    assert pipeline.generate(recipe.request()).images == [first.images[1]]


def test_a_recipe_holds_what_steps_reused(pipeline: Pipeline) -> None:
    whole = GenerationRequest(prompt="yellow star", steps=4, seed=1)
    reusing = pipeline.generate(whole.model_copy(update={"step_reuse": 2}))
    recipe = extract(reusing.images[0])
    assert recipe.step_reuse == 2
    assert pipeline.generate(recipe.request()).images == reusing.images
    assert (pixels(reusing.images[0]) != pixels(pipeline.generate(whole).images[0])).any()


def test_seeds_left_out_differ(pipeline: Pipeline) -> None:
    request = GenerationRequest(prompt="yellow star", steps=1)
    assert pipeline.generate(request).seeds != pipeline.generate(request).seeds


def test_stages_are_timed(pipeline: Pipeline) -> None:
    timings = pipeline.generate(GenerationRequest(prompt="x", steps=2, seed=0)).timings
    stages = [timings[name] for name in ("encode_s", "denoise_s", "decode_s")]
    assert all(seconds > 0 for seconds in stages)
    assert timings["total_s"] == pytest.approx(sum(stages), abs=0.05)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_prompt_cut_short_is_told(pipeline: Pipeline, field: str) -> None:
    request = GenerationRequest(**{"prompt": "x", field: LONG + "the end"}, steps=1, seed=0)
    (warning,) = pipeline.generate(request).warnings
    assert warning.startswith(f"{field} is longer than the base's {pipeline.base.limits.max_prompt_tokens} tokens")
    assert warning.endswith("the end'")


def test_progress_counts_over_all_images(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    request = GenerationRequest(prompt="x", steps=2, seed=0, num_images=2)
    pipeline.generate(request, on_step=lambda *at: seen.append(at))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_passed_deadline_stops_within_one_step(pipeline: Pipeline) -> None:
    seen: list[int] = []

    def on_step(done: int, total: int) -> None:
        seen.append(done)
        time.sleep(0.2)

    with pytest.raises(DeadlineExceeded):
        pipeline.generate(
            GenerationRequest(prompt="x", steps=100, seed=0), on_step=on_step, deadline=time.monotonic() + 0.1
        )
    assert seen in ([], [1])


def test_a_deadline_passed_in_the_queue_costs_no_step(pipeline: Pipeline) -> None:
    with pytest.raises(DeadlineExceeded):
        pipeline.generate(GenerationRequest(prompt="x"), on_step=pytest.fail, deadline=time.monotonic() - 1)


def test_numbers_that_blow_up_fail_one_request_only(pipeline: Pipeline) -> None:
    request = GenerationRequest(prompt="x", steps=2, seed=0)
    before = pipeline.generate(request).images
    weight = next(iter(pipeline.base.pipeline.unet.parameters()))
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(GenerationFailed, match="NaN"):
            pipeline.generate(request)
    finally:
        with torch.no_grad():
            weight.copy_(saved)
    assert pipeline.generate(request).images == before


def test_a_size_off_the_bases_grid_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(InvalidRequest, match="width must be a multiple of 32"):
        pipeline.generate(GenerationRequest(prompt="x", width=100))
