"""Bounds how much work may wait, and says honestly when to come back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from lorafleet.core.errors import Overloaded

SMOOTHING: Final = 0.2  # weight of the newest request in the running mean of service times
MIN_RETRY_AFTER_S: Final = 1.0


class Admission:
    """Counts requests in flight; for one event loop, not for threads.

    `servers` requests are being worked on at a time, `max_queued` more may wait.
    """

    def __init__(self, *, servers: int, max_queued: int) -> None:
        self._servers = servers
        self._max_queued = max_queued
        self._in_flight = 0
        self._mean_service_s = 0.0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Holds one place. Raises Overloaded, with the time in which a place should be free, when there is none."""
        if self._in_flight >= self._servers + self._max_queued:
            raise Overloaded(
                f"{self._in_flight} requests are running or waiting, all that is accepted: try again later",
                retry_after_s=max(MIN_RETRY_AFTER_S, self._mean_service_s / self._servers),
            )
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1

    def record(self, service_s: float) -> None:
        """Tells how long a finished request was worked on, waiting left out."""
        if self._mean_service_s == 0.0:
            self._mean_service_s = service_s
        self._mean_service_s += SMOOTHING * (service_s - self._mean_service_s)
