"""The adapters that requests name, as the registry says; while it is silent, as it last said."""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.manifest import Entry
from lorafleet.core.registry import Registry, Resolved, drawn, open_registry
from lorafleet.core.registry_config import RegistryConfig

logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 5.0  # then the registry counts as silent
RETRY_S: Final = 5.0  # how long a silent one is not asked about what is known
PROBE_S: Final = 10.0  # how often readiness asks it at most
MAX_KNOWN: Final = 10_000  # references
THREADS: Final = 8
T = TypeVar("T")


class Fleet:
    """The registry for an event loop: asked in threads, not for long, and not again for what is fresh."""

    def __init__(self, registry: Registry, fresh_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """`fresh_s`: seconds for which an answer is used again."""
        self.registry = registry
        self._fresh_s = fresh_s
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, "registry")
        self._known: OrderedDict[str, tuple[float, tuple[Resolved, ...]]] = OrderedDict()
        self._asked_at = self._failed_at = -float("inf")
        self.failure: str | None = None
        """Why the registry did not answer the last time; None when it did."""

    async def resolve(self, reference: str) -> Resolved:
        """The version that the reference means; of an alias that names several, chance picks one by their shares.

        Raises AdapterNotFound, InvalidRequest, and StorageUnavailable for what is not known from before.
        """
        now = self._clock()
        read_at, choices = self._known.get(reference, (-float("inf"), ()))
        is_silent = self.failure is not None and now - self._failed_at < RETRY_S
        if not choices or not (is_silent or now - read_at < self._fresh_s):
            try:
                choices = await self.ask(lambda: self.registry.choices(reference))
            except StorageUnavailable:
                if not choices:
                    raise
            else:
                self._remember(reference, choices)
        return drawn(choices)

    async def entries(self) -> list[Entry]:
        """All adapters. Raises StorageUnavailable."""
        return await self.ask(self.registry.entries)

    async def ask(self, question: Callable[[], T], timeout_s: float | None = TIMEOUT_S) -> T:
        """The registry's answer to what a thread asks it. Raises what it raises, StorageUnavailable after the time."""
        self._asked_at = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                answer = await asyncio.get_running_loop().run_in_executor(self._threads, question)
        except (StorageUnavailable, TimeoutError) as error:
            self._failed_at = self._clock()
            unavailable = (
                error
                if isinstance(error, StorageUnavailable)
                else StorageUnavailable(f"the adapter registry {self.registry.url} did not answer in {timeout_s:g} s")
            )
            if self.failure is None:
                logger.warning("%s", unavailable.message)
            self.failure = unavailable.message
            raise unavailable from error
        except Exception:
            self.failure = None  # it answered
            raise
        self.failure = None
        return answer

    async def probe(self) -> str | None:
        """Why the registry does not answer, None if it does; asks it unless that was done a moment ago."""
        if self._clock() - self._asked_at >= PROBE_S:
            with suppress(StorageUnavailable):
                await self.ask(self.registry.probe)
        return self.failure

    def forget(self, name: str) -> None:
        """What is known of an adapter: it was changed."""
        for reference in [known for known in self._known if known.partition("@")[0] == name]:
            del self._known[reference]

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _remember(self, reference: str, choices: tuple[Resolved, ...]) -> None:
        self._known[reference] = self._clock(), choices
        self._known.move_to_end(reference)
        while len(self._known) > MAX_KNOWN:
            self._known.popitem(last=False)


def open_fleet(config: RegistryConfig) -> Fleet:
    """Raises ConfigError."""
    registry = open_registry(config)
    by_default = 0.0 if registry.is_local else 1.0
    return Fleet(registry, by_default if config.fresh_s is None else config.fresh_s)
