"""Bounds how much work may wait, and says honestly when to come back."""

import time
from collections.abc import Callable
from typing import Final

from lorafleet.core.errors import Overloaded
from lorafleet.serve.workload import Workload

MIN_RETRY_AFTER_S: Final = 1.0


class Admission:
    """Counts work in flight, and learns from it how many seconds a unit of it takes; for one event loop.

    `servers` requests are being worked on at a time, `max_queued` more may wait, and none is taken in that would not
    be done in time.
    """

    def __init__(self, *, servers: int, max_queued: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._servers = servers
        self._workload = Workload(clock)
        self.max_queued = max_queued

    @property
    def backlog_s(self) -> float:
        """Seconds that the work in flight takes; 0 as long as nothing is known."""
        return self._workload.backlog_s

    def admit(self, units: float, timeout_s: float) -> "Place":
        """A place for work of this size. Raises Overloaded when there is none, or when the work in front of it would
        keep it for longer than `timeout_s`; work that finds nobody before it is always taken."""
        in_flight = self._workload.in_flight
        if in_flight >= self._servers + self.max_queued:
            raise Overloaded(
                f"{in_flight} requests are running or waiting, all that is accepted: try again later",
                retry_after_s=max(MIN_RETRY_AFTER_S, self.backlog_s / in_flight),
            )
        needed_s = self.backlog_s + units * self._workload.unit_s
        if in_flight and needed_s > timeout_s:
            raise Overloaded(
                f"this would be done in about {needed_s:.0f} seconds, as {self.backlog_s:.0f} seconds of work are in "
                f"front of it, and a request may take {timeout_s:g}: try again later",
                retry_after_s=max(MIN_RETRY_AFTER_S, min(self.backlog_s, needed_s - timeout_s)),
                reason="too_late",
            )
        return self.enter(units)

    def enter(self, units: float) -> "Place":
        """A place without asking whether there is one."""
        self._workload.enter(units)
        return Place(self._workload, units)


class Place:
    """What was admitted keeps it until `leave`."""

    def __init__(self, workload: Workload, units: float) -> None:
        self._workload = workload
        self._units = units

    def leave(self, *, is_done: bool) -> None:
        """To be called once. `is_done`: the images were made."""
        self._workload.leave(self._units, is_done=is_done)
