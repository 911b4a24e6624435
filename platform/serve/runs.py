"""Work that is going on in the gateway, for everyone who waits for it."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Self

from lorafleet.core.errors import GenerationFailed
from lorafleet.serve import logs
from lorafleet.serve.events import Done, Event, Queued
from lorafleet.serve.result import GenerationResult, fold


class Run:
    """Consumes the events of some work and keeps them; called off when the last of those who hold it lets go.

    Whoever makes one holds it. For one event loop, not for threads.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event],
        *,
        on_end: Callable[["Run"], None] = lambda _: None,
        is_cached: bool = False,
    ) -> None:
        self.is_cached = is_cached
        self.events: list[Event] = []
        self.error: Exception | None = None
        self._holders = 1
        self._keep: Callable[[GenerationResult], Awaitable[None]] | None = None
        self._changed = asyncio.Event()
        # A context of its own, as others may hold it when the request that began it ends.
        self._task = asyncio.create_task(self._consume(events), context=logs.detached())
        self._on_end = on_end
        self._task.add_done_callback(lambda _: self._end())

    @property
    def is_done(self) -> bool:
        return self._task.done()

    @property
    def is_good(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Done)

    @property
    def is_called_off(self) -> bool:
        return self._task.cancelled()

    def when_good(self, keep: Callable[[GenerationResult], Awaitable[None]]) -> None:
        """`keep` gets the result once there is one."""
        self._keep = keep

    def hold(self) -> Self:
        self._holders += 1
        return self

    def let_go(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._task.cancel()

    def cancel(self) -> None:
        """Calls it off for all who wait."""
        self._task.cancel()

    async def follow(self, first: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Its events with their numbers, from number `first` on. Raises what the work ended with, if not well."""
        number = first
        while True:
            while number < len(self.events):
                yield number, self.events[number]
                number += 1
            if self.is_done:
                break
            await self._changed.wait()
        if self.error is not None:
            raise self.error

    async def begun(self, timeout_s: float) -> None:
        """Waits until a replica says something, but not for longer. Raises what it ended with, if that comes first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self.is_done and all(isinstance(event, Queued) for event in self.events):
                    await self._changed.wait()
        if self.error is not None:
            raise self.error

    async def result(self) -> GenerationResult:
        """All images. Raises what hindered them."""
        while not self.is_done:
            await self._changed.wait()
        if self.error is not None:
            raise self.error
        return replace(fold(self.events), is_cached=self.is_cached)

    async def _consume(self, events: AsyncGenerator[Event]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    self.events.append(event)
                    self._tell()
            if self._keep is not None and self.is_good:
                await self._keep(fold(self.events))
        except Exception as error:  # whoever waits for it gets it
            self.error = error

    def _end(self) -> None:
        if not self.is_good and self.error is None:  # called off before it began
            self.error = GenerationFailed("the work was called off")
        self._on_end(self)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
