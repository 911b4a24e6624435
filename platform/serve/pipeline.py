"""Requests on one loaded base: images of the engine become PNGs with recipes. Knows neither HTTP nor Ray."""

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from lorafleet.core.generation import MAX_SEED, GenerationRequest
from lorafleet.core.recipe import BaseRef, Recipe, embed, versions
from lorafleet.sdxl.base import Base
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Engine, Event, Handle, ImageResult, Job, Step
from lorafleet.serve.result import GenerationResult, ModelInfo

OnStep = Callable[[int, int], None]
"""Called after each evaluation of the UNet with (done, total), over all images of the request."""


class Pipeline:
    """Runs requests on an engine, for several threads at once: in its thread between `start` and `close`, else in
    the caller's. The images of all requests, and those of one, share its batches."""

    def __init__(self, base: Base, settings: EngineSettings | None = None) -> None:
        self.base = base
        self.engine = Engine(base, settings)
        self.model = ModelInfo(
            ref=BaseRef(id=base.id, revision=base.config.revision, fingerprint=base.fingerprint),
            limits=base.limits,
            created_unix_s=int(time.time()),
        )
        self._versions = versions()
        self._is_started = False

    def start(self) -> Self:
        """Gives the engine its own thread, which `generate_async` needs."""
        self.engine.start()
        self._is_started = True
        return self

    def close(self) -> None:
        """Stops the engine after the step that is running; requests that are not done fail with NotReady."""
        self.engine.close()

    def generate(
        self, request: GenerationRequest, *, on_step: OnStep | None = None, deadline: float | None = None
    ) -> GenerationResult:
        """All images of a request. `deadline` is on `time.monotonic()`'s clock and checked at every step.

        Raises InvalidRequest (a size or step count this base cannot do), DeadlineExceeded, GenerationFailed,
        NotReady (the engine was closed).
        """
        handles = self._submit(request, on_step, deadline)
        try:
            if not self._is_started:
                self.engine.run_until_idle()
            return self._result(request, handles, [handle.result() for handle in handles])
        finally:
            _cancel(handles)

    async def generate_async(self, request: GenerationRequest, *, deadline: float | None = None) -> GenerationResult:
        """As `generate`, leaving the event loop free. Cancelling it calls the images off within one step."""
        handles = self._submit(request, None, deadline)
        try:
            images = await asyncio.gather(*(asyncio.wrap_future(handle.future) for handle in handles))
            return await asyncio.to_thread(self._result, request, handles, images)
        finally:
            _cancel(handles)

    def _submit(self, request: GenerationRequest, on_step: OnStep | None, deadline: float | None) -> list[Handle]:
        first_seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(request.num_images)]
        listener = None if on_step is None else _Progress(on_step, images=len(seeds))
        return [self.engine.submit(Job(request, seed, deadline, on_event=listener)) for seed in seeds]

    def _result(
        self, request: GenerationRequest, handles: Sequence[Handle], results: Sequence[ImageResult]
    ) -> GenerationResult:
        start = time.monotonic()
        seeds = [handle.job.seed for handle in handles]
        images = [
            embed(result.image, self._recipe(request, seed, result))
            for seed, result in zip(seeds, results, strict=True)
        ]
        timings = dict(max((result.timings for result in results), key=lambda timings: timings["total_s"]))
        encoding_s = time.monotonic() - start
        timings["decode_s"] += encoding_s
        timings["total_s"] += encoding_s
        warnings = [
            f"{name} is longer than the base's {self.base.limits.max_prompt_tokens} tokens, its end was dropped: "
            f"{dropped.strip()!r}"
            for name, dropped in (
                ("prompt", results[0].dropped_prompt),
                ("negative_prompt", results[0].dropped_negative),
            )
            if dropped
        ]
        return GenerationResult(images=images, seeds=seeds, timings=timings, warnings=warnings)

    def _recipe(self, request: GenerationRequest, seed: int, result: ImageResult) -> Recipe:
        return Recipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=result.image.width,
            height=result.image.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=request.scheduler,
            seed=seed,
            base=self.model.ref,
            versions=self._versions,
        )


class _Progress:
    """Adds up the steps of all images of a request, which all have as many."""

    def __init__(self, on_step: OnStep, *, images: int) -> None:
        self._on_step = on_step
        self._images = images
        self._done = 0
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            with self._lock:
                self._done += 1
                self._on_step(self._done, self._images * event.total)


def _cancel(handles: Sequence[Handle]) -> None:
    """What is done stays done; when one image fails or the caller leaves, the others need not go on."""
    for handle in handles:
        handle.cancel()
