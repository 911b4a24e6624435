"""One request from prompt to PNGs on one loaded base. Plain Python and torch: knows neither HTTP nor Ray."""

import copy
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from PIL import Image

from lorafleet.core.errors import DeadlineExceeded, GenerationFailed
from lorafleet.core.generation import MAX_SEED, GenerationRequest
from lorafleet.core.recipe import BaseRef, Recipe, embed, versions
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.schedulers import make_scheduler
from lorafleet.sdxl.text import PromptEmbedding, encode_negative, encode_prompt
from lorafleet.sdxl.vae import decode
from lorafleet.serve.result import GenerationResult, ModelInfo

OnStep = Callable[[int, int], None]
"""Called after each evaluation of the UNet with (done, total), over all images of the request."""


class Pipeline:
    """Runs requests one after another; not for several threads at once."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.model = ModelInfo(
            ref=BaseRef(id=base.id, revision=base.config.revision, fingerprint=base.fingerprint),
            limits=base.limits,
            created_unix_s=int(time.time()),
        )
        self._versions = versions()

    def generate(
        self, request: GenerationRequest, *, on_step: OnStep | None = None, deadline: float | None = None
    ) -> GenerationResult:
        """All images of a request. `deadline` is on `time.monotonic()`'s clock and checked at every step.

        Raises InvalidRequest (a size or step count this base cannot do), DeadlineExceeded, GenerationFailed.
        """
        self.base.limits.check(request)
        first_seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(request.num_images)]
        clock = _Clock(deadline)
        with _out_of_memory_named(), torch.inference_mode():
            with clock.stage("encode_s"):
                positive = encode_prompt(self.base, request.prompt)
                negative = encode_negative(self.base, request.negative_prompt, positive)
            images = []
            for i, seed in enumerate(seeds):
                with clock.stage("denoise_s"):
                    progress = _progress(clock, on_step, i, len(seeds))
                    latents = self._denoise(request, seed, positive, negative, progress)
                with clock.stage("decode_s"):
                    image = Image.fromarray(decode(self.base, latents)[0])
                    images.append(embed(image, self._recipe(request, seed, image)))
        warnings = [
            f"{name} is longer than the base's {self.base.limits.max_prompt_tokens} tokens, its end was dropped: "
            f"{embedding.dropped_text.strip()!r}"
            for name, embedding in (("prompt", positive), ("negative_prompt", negative))
            if embedding.dropped_text
        ]
        return GenerationResult(images=images, seeds=seeds, timings=clock.timings(), warnings=warnings)

    def _denoise(
        self,
        request: GenerationRequest,
        seed: int,
        positive: PromptEmbedding,
        negative: PromptEmbedding,
        after_step: Callable[[int, int], None],
    ) -> torch.Tensor:
        """Latents [1, 4, h, w] of one image, noise from a CPU generator of its own."""
        width, height = self.base.limits.size_of(request)
        pipeline = copy.copy(self.base.pipeline)  # shares the weights; scheduler and guidance are this image's
        pipeline.scheduler = make_scheduler(self.base, request.scheduler)

        def callback(_: object, index: int, *_more: object) -> dict[str, object]:
            after_step(index + 1, pipeline.num_timesteps)
            return {}

        latents: torch.Tensor = pipeline(
            prompt_embeds=positive.hidden,
            pooled_prompt_embeds=positive.pooled,
            negative_prompt_embeds=negative.hidden,
            negative_pooled_prompt_embeds=negative.pooled,
            width=width,
            height=height,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            callback_on_step_end=callback,
        ).images
        return latents

    def _recipe(self, request: GenerationRequest, seed: int, image: Image.Image) -> Recipe:
        return Recipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=image.width,
            height=image.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=request.scheduler,
            seed=seed,
            base=self.model.ref,
            versions=self._versions,
        )


class _Clock:
    """Seconds by stage, and the deadline that every stage and step looks at."""

    def __init__(self, deadline: float | None) -> None:
        self._deadline = deadline
        self._start = time.monotonic()
        self._stages = {"encode_s": 0.0, "denoise_s": 0.0, "decode_s": 0.0}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.check()
        start = time.monotonic()
        yield
        self._stages[name] += time.monotonic() - start

    def check(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineExceeded("the request's time was up before its images were done")

    def timings(self) -> dict[str, float]:
        return {**self._stages, "total_s": time.monotonic() - self._start}


def _progress(clock: _Clock, on_step: OnStep | None, image: int, images: int) -> Callable[[int, int], None]:
    """What to do after each step of the `image`-th image."""

    def after_step(done: int, total: int) -> None:
        if on_step is not None:
            on_step(image * total + done, images * total)
        clock.check()

    return after_step


@contextmanager
def _out_of_memory_named() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise GenerationFailed("out of GPU memory: ask for a smaller size, or set base.low_memory=true") from error
