"""Bounds how much work may wait, and says honestly when to come back."""

import time
from collections.abc import Callable
from typing import Final

from lorafleet.core.errors import Overloaded

KEPT: Final = 0.8  # of what is known about the speed, when some more work is done
MIN_RETRY_AFTER_S: Final = 1.0


class Admission:
    """Counts work in flight, and learns from it how many seconds a unit of it takes; for one event loop.

    `servers` requests are being worked on at a time, `max_queued` more may wait, and none is taken in that would not
    be done in time.
    """

    def __init__(self, *, servers: int, max_queued: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._places = servers + max_queued
        self._clock = clock
        self._in_flight = 0
        self._backlog = 0.0
        self._seconds, self._units = 0.0, 0.0  # recent ones, in which work was done, and how much
        self._marked_at = 0.0

    @property
    def backlog_s(self) -> float:
        """Seconds that the work in flight takes; 0 as long as nothing is known."""
        return self._backlog * self._unit_s

    def admit(self, units: float, timeout_s: float) -> "Place":
        """A place for work of this size. Raises Overloaded when there is none, or when the work in front of it would
        keep it for longer than `timeout_s`; work that finds nobody before it is always taken."""
        if self._in_flight >= self._places:
            raise Overloaded(
                f"{self._in_flight} requests are running or waiting, all that is accepted: try again later",
                retry_after_s=max(MIN_RETRY_AFTER_S, self.backlog_s / self._in_flight),
            )
        needed_s = self.backlog_s + units * self._unit_s
        if self._in_flight and needed_s > timeout_s:
            raise Overloaded(
                f"this would be done in about {needed_s:.0f} seconds, as {self.backlog_s:.0f} seconds of work are in "
                f"front of it, and a request may take {timeout_s:g}: try again later",
                retry_after_s=max(MIN_RETRY_AFTER_S, min(self.backlog_s, needed_s - timeout_s)),
            )
        return self.enter(units)

    def enter(self, units: float) -> "Place":
        """A place without asking whether there is one."""
        if not self._in_flight:
            self._marked_at = self._clock()
        self._in_flight += 1
        self._backlog += units
        return Place(self, units)

    @property
    def _unit_s(self) -> float:
        return self._seconds / self._units if self._units else 0.0

    def _leave(self, units: float, *, is_done: bool) -> None:
        self._in_flight -= 1
        self._backlog = self._backlog - units if self._in_flight else 0.0
        now = self._clock()
        if is_done:  # how much was done of what failed or was called off nobody knows
            self._seconds = KEPT * self._seconds + now - self._marked_at
            self._units = KEPT * self._units + units
        self._marked_at = now


class Place:
    """What was admitted keeps it until `leave`."""

    def __init__(self, admission: Admission, units: float) -> None:
        self._admission = admission
        self._units = units

    def leave(self, *, is_done: bool) -> None:
        """To be called once. `is_done`: the images were made."""
        self._admission._leave(self._units, is_done=is_done)
