"""What callers give to the engine and get back: a job, its events, its handle, its image."""

import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from lorafleet.core.errors import LorafleetError
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.lora import Adapter

logger = logging.getLogger(__name__)


class Cancelled(LorafleetError):
    """Whoever submitted the job called it off."""

    code = "cancelled"


@dataclass(frozen=True)
class ImageResult:
    """One image, RGB. `timings`: seconds waiting (queue_s), in each stage and in all; waits for the neighbours'
    steps count as denoising. `dropped_prompt`, `dropped_negative`: what did not fit into the prompt window, else "".
    """

    image: Image.Image
    timings: dict[str, float]
    dropped_prompt: str = ""
    dropped_negative: str = ""


@dataclass(frozen=True)
class Started:
    """The job left the queue."""


@dataclass(frozen=True)
class Step:
    """The UNet was evaluated for the `done`-th of `total` times; a second-order sampler has two for most steps.

    `preview`: RGB at the latents' size (an eighth of the image's), where the job asked for one at this step.
    """

    done: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a job that went well."""

    result: ImageResult


@dataclass(frozen=True)
class Failed:
    """The last event of a job that did not: a cancelled or late one too."""

    error: LorafleetError


Event = Started | Step | Finished | Failed


@dataclass(frozen=True)
class JobAdapter:
    """An adapter that an image is made with; `weight` may be negative, zero or above 1.

    `key` names one immutable adapter, such as a version's hash. `load` reads it; it is called in a loader thread of
    the engine, once for all jobs that wait for it, and not at all while the adapter is still known.
    """

    key: str
    weight: float
    load: Callable[[], Adapter] = field(repr=False)


@dataclass(frozen=True)
class Job:
    """One image of `request` with `seed`; the request's own `seed` and `num_images` say nothing here.

    `deadline` is on `time.monotonic()`'s clock. `guidance_rescale` is diffusers' (Lin et al. 2023, section 3.4).
    With `init_image` only the last `strength` (0 to 1) of the steps are taken, from that picture; with `mask` too,
    what is white there is drawn anew and the rest kept; both are scaled to the request's size. Every
    `preview_every`-th step carries a preview, 0 means none. `adapters` add up, in both rows of guidance and in the
    text encoders; one may be there twice. `on_event` is called in the engine's thread and must
    return at once; what it raises is logged.
    """

    request: GenerationRequest
    seed: int
    deadline: float | None = None
    guidance_rescale: float = 0.0
    init_image: Image.Image | None = None
    mask: Image.Image | None = None
    strength: float = 0.8
    preview_every: int = 0
    on_event: Callable[[Event], None] | None = None
    adapters: tuple[JobAdapter, ...] = ()


class Handle:
    """A submitted job. Safe for every thread."""

    def __init__(self, job: Job, on_cancel: Callable[[], None]) -> None:
        self.job = job
        self.future: Future[ImageResult] = Future()
        """For `asyncio.wrap_future` and callbacks. Its own `cancel()` does nothing: the engine is at work on it."""
        self.future.set_running_or_notify_cancel()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.context = contextvars.copy_context()
        """Whoever submitted it, for log lines about it."""
        self._is_cancelled = threading.Event()
        self._on_cancel = on_cancel
        self._emitting = threading.RLock()  # a listener may cancel

    def result(self, timeout_s: float | None = None) -> ImageResult:
        """Waits for the image. Raises what hindered it (a LorafleetError), or TimeoutError."""
        return self.future.result(timeout_s)

    def cancel(self) -> None:
        """Calls the job off, within one step; its result is then Cancelled. A finished job stays as it is."""
        self._is_cancelled.set()
        self._on_cancel()

    @property
    def is_cancelled(self) -> bool:
        return self._is_cancelled.is_set()

    @property
    def is_done(self) -> bool:
        return self.future.done()

    def events(self, timeout_s: float | None = None) -> Iterator[Event]:
        """Started, each Step, and Finished or Failed as the last one; each event is given out once.

        Raises TimeoutError when the next one takes longer than `timeout_s`.
        """
        while True:
            try:
                event = self._events.get(timeout=timeout_s)
            except queue.Empty:
                raise TimeoutError(f"no event of this job in {timeout_s:g} seconds") from None
            yield event
            if isinstance(event, Finished | Failed):
                return

    def emit(self, event: Event) -> None:
        """For the engine: tells everyone who listens, and settles the future. Nothing comes after the last event."""
        with self._emitting:
            if self.is_done:
                return
            self._events.put(event)
            self._tell(event)
            if isinstance(event, Finished):
                self.future.set_result(event.result)
            elif isinstance(event, Failed):
                self.future.set_exception(event.error)

    def _tell(self, event: Event) -> None:
        if self.job.on_event is not None:
            try:
                self.job.on_event(event)
            except Exception:  # a listener's fault is not the image's
                logger.exception("a listener of a job failed")
