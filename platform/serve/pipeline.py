"""Requests on one loaded base: images of the engine become PNGs with recipes. Knows neither HTTP nor Ray."""

import asyncio
import io
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Self

from PIL import Image

from lorafleet.core.errors import DeadlineExceeded, InvalidRequest
from lorafleet.core.generation import MAX_SEED, GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import Recorder
from lorafleet.core.recipe import BaseRef, Recipe, embed, versions
from lorafleet.core.registry import Registry
from lorafleet.sdxl.adapter_file import check_against
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import Adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve import events, tracing
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.downloads import Download, Downloads
from lorafleet.serve.engine import (
    Engine,
    Event,
    Failed,
    Finished,
    Handle,
    ImageResult,
    Job,
    JobAdapter,
    Started,
    Step,
)
from lorafleet.serve.result import GenerationResult, ModelInfo
from lorafleet.serve.work import Work, WorkAdapter

PROGRESS_S: Final = 0.25  # between two events of a download
ENCODERS: Final = 4  # threads that make PNGs
OnStep = Callable[[int, int], None]
"""Called after each evaluation of the UNet with (done, total), over all images of the request."""


class Pipeline:
    """Runs requests on an engine, for several threads at once: in its thread between `start` and `close`, else in
    the caller's. The images of all requests, and those of one, share its batches."""

    def __init__(
        self,
        base: Base,
        settings: EngineSettings | None = None,
        registry: Registry | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`registry`: where requests' adapters are. `recorder`: measures their downloads."""
        self.base = base
        self.engine = Engine(base, settings)
        self._registry = registry
        self._downloads = None if registry is None else Downloads(registry, recorder)
        self.model = ModelInfo(
            ref=BaseRef(id=base.id, revision=base.config.revision, fingerprint=base.fingerprint),
            limits=base.limits,
            created_unix_s=int(time.time()),
        )
        self._targets = targets_of(base) if self.engine.bank is None else self.engine.bank.targets
        self._versions = versions()
        self._encoders = ThreadPoolExecutor(ENCODERS, "png")
        self._is_started = False

    def start(self) -> Self:
        """Gives the engine its own thread, which `stream` needs."""
        self.engine.start()
        self._is_started = True
        return self

    def push(self, name: str, handed_in: str) -> Manifest:
        """Checks an adapter's file that was handed in at the registry against the base, and pushes it.

        Raises AdapterUnreadable, AdapterIncompatible and StorageUnavailable. Blocks.
        """
        assert self._registry is not None
        return self._registry.push_handed_in(name, handed_in, check_against(self._targets))

    def close(self) -> None:
        """Stops the engine after the step that is running; requests that are not done fail with NotReady."""
        self.engine.close()
        self._encoders.shutdown()
        if self._downloads is not None:
            self._downloads.close()

    def generate(
        self, asked: GenerationRequest | Work, *, on_step: OnStep | None = None, deadline: float | None = None
    ) -> GenerationResult:
        """All images of a request. `deadline` is on `time.monotonic()`'s clock and checked at every step.

        Raises InvalidRequest (a size or step count this base cannot do), DeadlineExceeded, GenerationFailed,
        NotReady (the engine was closed), and what hinders an adapter.
        """
        work = self._work(asked)
        for download in self._missing(work):
            download.file.result()
        progress = None if on_step is None else _Progress(on_step, images=work.request.num_images)
        handles = self._submit(work, deadline, lambda *_: progress)
        try:
            if not self._is_started:
                self.engine.run_until_idle()
            results = [handle.result() for handle in handles]
            seeds = [handle.job.seed for handle in handles]
            made = list(self._encoders.map(lambda seed, result: self._made(work, seed, result), seeds, results))
            return GenerationResult(
                images=[each.png for each in made],
                seeds=seeds,
                timings=_last(made),
                warnings=self._warnings(results[0]),
            )
        finally:
            _cancel(handles)

    async def stream(
        self, work: Work, *, deadline: float | None = None, is_detailed: bool = True
    ) -> AsyncGenerator[events.Event]:
        """As `generate`, leaving the event loop free and telling what happens; images come as they are done. Without
        details, nothing but the images and the end. Closing it calls off, within one step, what is not done."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[tuple[int, Event | _Made | Exception]] = asyncio.Queue()

        def tell(image: int, said: Event | _Made | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(inbox.put_nowait, (image, said))

        def encode(image: int, seed: int, result: ImageResult) -> None:
            try:
                tell(image, self._made(work, seed, result))
            except Exception as error:  # whoever waits gets it
                tell(image, error)

        def listen(image: int, seed: int) -> Callable[[Event], None]:
            def on_event(event: Event) -> None:
                if isinstance(event, Finished):
                    self._encoders.submit(encode, image, seed, event.result)
                elif is_detailed or isinstance(event, Failed):
                    tell(image, event)

            return on_event

        async for downloading in self._fetch(work, deadline):
            if is_detailed:
                yield downloading
        handles = self._submit(work, deadline, listen)
        made: list[_Made] = []
        previews = [0] * len(handles)
        try:
            while len(made) < len(handles):
                image, said = await inbox.get()
                match said:
                    case Started():
                        yield events.Started(image)
                    case Step(done, total, preview):
                        is_wanted = preview is not None and done < total and previews[image] < work.previews
                        previews[image] += is_wanted
                        yield events.Step(image, done, total, _png(preview) if preview and is_wanted else None)
                    case _Made():
                        made.append(said)
                        yield events.Image(image, said.seed, said.png)
                    case Failed(error) | (Exception() as error):
                        raise error
            yield events.Done(_last(made), self._warnings(made[0].result))
        finally:
            _cancel(handles)

    def _work(self, asked: GenerationRequest | Work) -> Work:
        """The request with the versions of its adapters. Raises AdapterNotFound, StorageUnavailable."""
        if isinstance(asked, Work):
            return asked
        adapters = []
        for use in asked.adapters:
            if self._registry is None:
                raise InvalidRequest("adapters need a registry to come from", param="adapters")
            chosen = self._registry.resolve(use.name)
            adapters.append(WorkAdapter(chosen.manifest, use.weight, chosen.alias, is_split=chosen.share < 1))
        return Work(asked, adapters=tuple(adapters))

    def _missing(self, work: Work) -> list[Download]:
        """What has to be there before the engine gets the work: who waits for a file must not hold a slot."""
        bank = self.engine.bank
        if self._downloads is None or bank is None:
            return []
        return [self._downloads.start(each.manifest) for each in work.adapters if not bank.holds(each.key)]

    async def _fetch(self, work: Work, deadline: float | None) -> AsyncGenerator[events.Downloading]:
        """Waits until the work's adapters are here, telling how far they are. What is being downloaded goes on if the
        caller leaves: others may want it, and the next one surely does."""
        for download in self._missing(work):
            file = asyncio.wrap_future(download.file)
            while not (await asyncio.wait([file], timeout=PROGRESS_S))[0]:
                if deadline is not None and time.monotonic() >= deadline:
                    raise DeadlineExceeded("the request's time was up before its adapters were downloaded")
                manifest = download.manifest
                yield events.Downloading(manifest.name, download.done_bytes, manifest.size_bytes)
            file.result()

    def _job_adapter(self, adapter: WorkAdapter) -> JobAdapter:
        def load() -> Adapter:
            assert self._registry is not None
            assert self.engine.bank is not None
            return read_adapter(self._registry.pull(adapter.manifest), self.engine.bank.targets)

        return JobAdapter(adapter.key, adapter.weight, load)

    def _submit(
        self, work: Work, deadline: float | None, listener: Callable[[int, int], Callable[[Event], None] | None]
    ) -> list[Handle]:
        """`listener` gets the number of each image and its seed."""
        request, start = work.request, work.start
        first_seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        more: dict[str, Any] = {
            "preview_every": _preview_every(work),
            "adapters": tuple(self._job_adapter(adapter) for adapter in work.adapters),
        }
        if start is not None:
            more |= {"init_image": _picture(start.image), "mask": _picture(start.mask), "strength": start.strength}
        seeds = [(first_seed + i) % (MAX_SEED + 1) for i in range(request.num_images)]
        handles = [
            self.engine.submit(Job(request, seed, deadline, on_event=listener(i, seed), **more))
            for i, seed in enumerate(seeds)
        ]
        tracing.follow(handles, work)
        return handles

    def _made(self, work: Work, seed: int, result: ImageResult) -> "_Made":
        start = time.monotonic()
        png = self._embed(work, seed, result)
        encoding_s = time.monotonic() - start
        more = {name: result.timings[name] + encoding_s for name in ("decode_s", "total_s")}
        return _Made(seed, result, png, {**result.timings, **more})

    def _warnings(self, result: ImageResult) -> list[str]:
        return [
            f"{name} is longer than the base's {self.base.limits.max_prompt_tokens} tokens, its end was dropped: "
            f"{dropped.strip()!r}"
            for name, dropped in (("prompt", result.dropped_prompt), ("negative_prompt", result.dropped_negative))
            if dropped
        ]

    def _embed(self, work: Work, seed: int, result: ImageResult) -> bytes:
        """The image as a PNG with its recipe."""
        request = work.request
        recipe = Recipe(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=result.image.width,
            height=result.image.height,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            scheduler=request.scheduler,
            seed=seed,
            step_reuse=request.step_reuse,
            base=self.model.ref,
            versions=self._versions,
            start=None if work.start is None else work.start.recipe,
            adapters=[adapter.use for adapter in work.adapters],
        )
        return embed(result.image, recipe)


@dataclass(frozen=True)
class _Made:
    """`timings`: making the PNG counts as decoding."""

    seed: int
    result: ImageResult
    png: bytes
    timings: dict[str, float]


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


def _preview_every(work: Work) -> int:
    """Between how many evaluations of the UNet a preview lies, so that there are `work.previews` before the last."""
    if not work.previews:
        return 0
    steps = work.request.steps * (1.0 if work.start is None else work.start.strength)
    evaluations = 2 * steps - 1 if work.request.scheduler == "heun" else steps
    return max(1, int(evaluations / (work.previews + 1)))


def _picture(data: bytes | None) -> Image.Image | None:
    return None if data is None else Image.open(io.BytesIO(data))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _last(made: Sequence[_Made]) -> dict[str, float]:
    """The timings of the image that was done last."""
    return dict(max((each.timings for each in made), key=lambda timings: timings["total_s"]))


def _cancel(handles: Sequence[Handle]) -> None:
    """What is done stays done; when one image fails or the caller leaves, the others need not go on."""
    for handle in handles:
        handle.cancel()
