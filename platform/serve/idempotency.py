"""Requests with one idempotency key are one request: who repeats it joins the run, or gets what it ended with."""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from lorafleet.core.errors import IdempotencyConflict
from lorafleet.serve.cache import size_of
from lorafleet.serve.result import fold
from lorafleet.serve.runs import Run
from lorafleet.serve.terms import KEY_HEADER

MAX_KEYS: Final = 10_000
MAX_BYTES: Final = 128 << 20
TTL_S: Final = 3600.0


class RememberedRuns:
    """Runs by key, for an hour; those that failed or were called off are forgotten, for another try to begin anew."""

    def __init__(
        self, *, max_keys: int = MAX_KEYS, max_bytes: int = MAX_BYTES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_keys, self._max_bytes = max_keys, max_bytes
        self._clock = clock
        self._runs: OrderedDict[str, tuple[str, Run, float]] = OrderedDict()

    def find(self, key: str, fingerprint: str) -> Run | None:
        """The run, held for the caller. Raises IdempotencyConflict when the key was used for something else."""
        self._forget()
        if key not in self._runs:
            return None
        known, run, _ = self._runs[key]
        if run.is_done and not run.is_good:
            del self._runs[key]
            return None
        if known != fingerprint:
            raise IdempotencyConflict(
                f"{KEY_HEADER} was used for another request: send that one again, or a new key", param=KEY_HEADER
            )
        return run.hold()

    def remember(self, key: str, fingerprint: str, run: Run) -> None:
        self._runs[key] = (fingerprint, run, self._clock() + TTL_S)

    def _forget(self) -> None:
        """The oldest, as far as there are too many or their time is up."""
        total = sum(_size_of(run) for _, run, _ in self._runs.values())
        while self._runs:
            _, run, until = next(iter(self._runs.values()))
            if self._clock() < until and len(self._runs) < self._max_keys and total <= self._max_bytes:
                return
            total -= _size_of(run)
            self._runs.popitem(last=False)


def _size_of(run: Run) -> int:
    return size_of(fold(run.events)) if run.is_good else 0
