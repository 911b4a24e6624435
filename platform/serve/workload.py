"""How much work is in flight, and how many seconds a unit of it takes: learnt as it is done."""

import time
from collections.abc import Callable
from typing import Final

KEPT: Final = 0.8  # of what is known about the speed, when some more work is done


class Workload:
    """Work in flight, in any unit (`Work.cost`). For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.in_flight = 0
        self._units = 0.0
        self._seconds, self._done_units = 0.0, 0.0  # recent ones, in which work was done, and how much
        self._marked_at = 0.0

    @property
    def unit_s(self) -> float:
        """Seconds that a unit takes; 0 as long as nothing is known."""
        return self._seconds / self._done_units if self._done_units else 0.0

    @property
    def backlog_s(self) -> float:
        """Seconds that the work in flight takes; 0 as long as nothing is known."""
        return self._units * self.unit_s

    def enter(self, units: float) -> None:
        if not self.in_flight:
            self._marked_at = self._clock()
        self.in_flight += 1
        self._units += units

    def leave(self, units: float, *, is_done: bool) -> None:
        """To be called once for each `enter`. `is_done`: the images were made."""
        self.in_flight -= 1
        self._units = self._units - units if self.in_flight else 0.0
        now = self._clock()
        if is_done:  # how much was done of what failed or was called off nobody knows
            self._seconds = KEPT * self._seconds + now - self._marked_at
            self._done_units = KEPT * self._done_units + units
        self._marked_at = now
