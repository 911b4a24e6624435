import asyncio
from collections.abc import AsyncGenerator, Callable
from itertools import pairwise

import pytest

from lorafleet.core.errors import GenerationFailed, LorafleetError, NotReady
from lorafleet.serve.events import Done, Event, Image, Queued, Retrying, Started, Step, from_json, to_json
from lorafleet.serve.runs import Run

DONE = Done({"total_s": 1.0}, ["cut"])


@pytest.mark.parametrize(
    "event",
    [Queued(), Started(1), Step(0, 2, 4), Step(0, 2, 4, b"\x89"), Image(1, 7, b"\x00\xff"), Retrying("gone"), DONE],
)
def test_events_survive_json(event: Event) -> None:
    assert from_json(to_json(event)) == event


class Source:
    """Events that a test hands out; notes how it ends."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self.is_closed = False

    async def events(self) -> AsyncGenerator[Event]:
        try:
            while True:
                event = await self.inbox.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.is_closed = True


def in_loop(test: Callable[[Source], object]) -> None:
    async def main() -> None:
        await test(Source())  # type: ignore[misc]

    asyncio.run(main())


def test_all_who_follow_see_all_events_from_where_they_ask() -> None:
    async def test(source: Source) -> None:
        run = Run(source.events())

        async def seen(first: int) -> list[tuple[int, Event]]:
            return [pair async for pair in run.follow(first)]

        followers = [asyncio.create_task(seen(first)) for first in (0, 0, 2)]
        await asyncio.sleep(0)
        for event in (Queued(), Image(1, 8, b"b"), Image(0, 7, b"a"), DONE):
            await source.inbox.put(event)
            await asyncio.sleep(0)
        everything, again, later = await asyncio.gather(*followers)
        assert everything == again == [*enumerate(run.events)]
        assert later == everything[2:]
        assert await seen(4) == []
        result = await run.result()
        assert (result.images, result.seeds, result.warnings) == ([b"a", b"b"], [7, 8], ["cut"])

    in_loop(test)


def test_the_last_who_lets_go_calls_it_off() -> None:
    async def test(source: Source) -> None:
        ended: list[Run] = []
        run = Run(source.events(), on_end=ended.append)
        run.hold()
        await source.inbox.put(Started(0))
        await run.begun(1)
        run.let_go()
        await asyncio.sleep(0.01)
        assert not source.is_closed
        run.let_go()
        with pytest.raises(GenerationFailed, match="called off"):
            await run.result()
        assert source.is_closed
        assert ended == [run]

    in_loop(test)


def test_one_that_ends_before_it_began_is_over_too() -> None:
    async def test(source: Source) -> None:
        run = Run(source.events())
        run.let_go()
        with pytest.raises(GenerationFailed, match="called off"):
            await run.result()

    in_loop(test)


def test_its_error_reaches_everyone() -> None:
    async def test(source: Source) -> None:
        run = Run(source.events())
        await source.inbox.put(Queued())
        await source.inbox.put(NotReady("gone"))
        for wait in (run.begun(5), run.result(), anext(run.follow(1))):
            with pytest.raises(LorafleetError, match="gone"):
                await wait

    in_loop(test)


def test_begun_waits_for_the_replica_but_not_forever() -> None:
    async def test(source: Source) -> None:
        run = Run(source.events())
        await source.inbox.put(Queued())
        loop = asyncio.get_running_loop()
        times = [loop.time()]
        await run.begun(0.1)
        times.append(loop.time())
        await source.inbox.put(Started(0))
        await run.begun(5)
        times.append(loop.time())
        waited, not_waited = (b - a for a, b in pairwise(times))
        assert waited >= 0.1
        assert not_waited < 1

    in_loop(test)
