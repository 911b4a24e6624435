"""Who watches an engine: told what happens, by the threads in which it happens."""

import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


class Observer:
    """Hears nothing; override what is wanted. Methods are called by the engine's threads, several at a time, and must
    return at once; what they raise is logged once and hurts no image."""

    def step_taken(self, seconds: float, images: int, rows: int, batch_rows: int) -> None:
        """`images` took a step together, with `rows` of the batch's `batch_rows`."""

    def image_ended(self, outcome: str, timings: Mapping[str, float]) -> None:
        """`outcome`: metrics.OK or an error's code. `timings`: an `ImageResult`'s; empty unless it went well."""

    def slot_filled(self, seconds: float) -> None:
        """An adapter was copied into a slot; its file had been read."""


class Guarded(Observer):
    """Keeps the faults of another one to itself."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._has_failed = False

    def step_taken(self, seconds: float, images: int, rows: int, batch_rows: int) -> None:
        self._tell(self._observer.step_taken, seconds, images, rows, batch_rows)

    def image_ended(self, outcome: str, timings: Mapping[str, float]) -> None:
        self._tell(self._observer.image_ended, outcome, timings)

    def slot_filled(self, seconds: float) -> None:
        self._tell(self._observer.slot_filled, seconds)

    def _tell(self, listen: Callable[..., None], *what: object) -> None:
        try:
            listen(*what)
        except Exception:  # an observer's fault is not the image's
            if not self._has_failed:
                self._has_failed = True
                logger.exception("an observer of the engine failed; this is told only once")
