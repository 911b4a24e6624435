"""Which replica gets a piece of work, with real connections to replicas that make nothing."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from lorafleet.core.errors import NotReady
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import Unrecorded
from lorafleet.serve import directory
from lorafleet.serve.affinity import Report, short_key
from lorafleet.serve.backend import ReplicaBackend
from lorafleet.serve.channel import Address, Order, Receiver
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Done, Event, Image, Started
from lorafleet.serve.work import Work, WorkAdapter

KEY = "ab" * 32
PLAIN = Work(GenerationRequest(prompt="x", seed=1, width=64, height=64))


class Replica:
    """Makes an image of its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.taken = 0
        self.dies = False
        self.receiver = Receiver(self._work)
        self.address: Address | None = None

    async def _work(self, order: Order) -> AsyncGenerator[Event]:
        self.taken += 1
        yield Started(0)
        if self.dies:
            raise RuntimeError
        yield Image(0, 1, self.name.encode())
        yield Done({}, [])

    def known(self, *slots: str) -> directory.Known:
        assert self.address is not None
        return directory.Known(self.address, Report(slots=[short_key(key) for key in slots], unit_s=1.0).to_json())


class Handle:
    """Ray Serve's, as far as it is used: its answer comes when a replica is there."""

    def __init__(self) -> None:
        self.asked = 0
        self.model = SimpleNamespace(remote=self._model)

    async def _model(self) -> None:
        self.asked += 1
        while not directory.replicas:
            await asyncio.sleep(0.01)


@asynccontextmanager
async def replicas(*names: str) -> AsyncIterator[tuple[ReplicaBackend, Handle, list[Replica]]]:
    handle, made = Handle(), [Replica(name) for name in names]
    backend = ReplicaBackend(cast("Any", handle), ServeSettings(), Unrecorded())
    async with AsyncExitStack() as stack:
        for replica in made:
            replica.address = await replica.receiver.start("127.0.0.1")
            stack.push_async_callback(replica.receiver.close)
        stack.push_async_callback(backend.close)
        stack.callback(directory.note, {})
        yield backend, handle, made


async def images(backend: ReplicaBackend, work: Work) -> list[bytes]:
    events = backend.stream(work, 10, is_detailed=False)
    return [event.png async for event in events if isinstance(event, Image)]


def run(check: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(check, 20))


def test_work_goes_where_its_adapters_are(manifest_of: Callable[[str, str], Manifest]) -> None:
    async def check() -> None:
        async with replicas("a", "b") as (backend, _, (a, b)):
            directory.note({"a": a.known(), "b": b.known(KEY)})
            work = Work(PLAIN.request, adapters=(WorkAdapter(manifest_of("style", KEY), 1.0),))
            assert await images(backend, work) == [b"b"]
            directory.note({"a": a.known(KEY), "b": b.known()})
            assert await images(backend, work) == [b"a"]

    run(check())


def test_one_that_is_gone_or_about_to_go_is_passed_over() -> None:
    async def check() -> None:
        async with replicas("gone", "going", "there") as (backend, handle, (gone, going, there)):
            directory.note({"gone": gone.known(), "going": going.known(), "there": there.known()})
            await gone.receiver.close()
            await going.receiver.drain()
            for _ in range(6):
                assert await images(backend, PLAIN) == [b"there"]
            assert (gone.taken, going.taken, there.taken) == (0, 0, 6)
            assert handle.asked == 0

    run(check())


def test_where_nobody_is_work_waits_for_the_first_one() -> None:
    async def check() -> None:
        async with replicas("a") as (backend, handle, (a,)):
            waiting = asyncio.create_task(images(backend, PLAIN))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            assert handle.asked == 1  # which makes Serve start one
            directory.note({"a": a.known()})
            assert await waiting == [b"a"]

    run(check())


def test_one_that_is_lost_with_work_is_told_and_nobody_else_begins_it() -> None:
    async def check() -> None:
        async with replicas("a", "b") as (backend, _, (a, b)):
            a.dies = b.dies = True
            directory.note({"a": a.known(), "b": b.known()})
            with pytest.raises(NotReady, match="try again"):
                await images(backend, PLAIN)
            assert a.taken + b.taken == 1

    run(check())
