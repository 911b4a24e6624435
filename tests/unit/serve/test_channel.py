import asyncio
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from lorafleet.core.errors import AdapterBusy, DeadlineExceeded, LorafleetError, NotReady
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.recipe import RecipeStart
from lorafleet.serve.channel import Address, Handler, NotTaken, Order, Receiver, Sender
from lorafleet.serve.events import Done, Downloading, Event, Image, Started, Step
from lorafleet.serve.work import Start, Work, WorkAdapter

PNG = bytes(range(256)) * 4000
EVENTS: list[Event] = [
    Downloading("style", 1, 3),
    Started(0),
    Step(0, 1, 2, b"small"),
    Step(0, 2, 2),
    Image(0, 2**32 - 1, PNG),
    Done({"total_s": 0.25}, ["a warning, ä"]),
]
REQUEST = GenerationRequest(prompt="red apple", width=64, height=64, seed=1)
ORDER = Order(Work(REQUEST), timeout_s=60.0, is_detailed=True)


def handler_of(*said: Event | LorafleetError, taken: list[Order] | None = None) -> Handler:
    async def handler(order: Order) -> AsyncGenerator[Event | LorafleetError]:
        if taken is not None:
            taken.append(order)
        for each in said:
            yield each

    return handler


@asynccontextmanager
async def ends(handler: Handler, **settings: float) -> AsyncIterator[tuple[Receiver, Sender, Address]]:
    receiver, sender = Receiver(handler, sign_of_life_s=0.1), Sender(**settings)
    try:
        yield receiver, sender, await receiver.start("127.0.0.1")
    finally:
        await sender.close()
        await receiver.close()


async def sent(sender: Sender, address: Address, order: Order = ORDER) -> list[Event]:
    async with aclosing(sender.send(order, address)) as events:
        return [event async for event in events]


def test_work_arrives_and_its_events_come_back(manifest_of: Callable[[str, str], Manifest]) -> None:
    adapter = WorkAdapter(manifest_of("style", "ab" * 32), 0.8, "production", is_split=True)
    start = Start(b"picture", None, RecipeStart(image="ef" * 32, strength=0.5))
    order = Order(Work(REQUEST, start, adapters=(adapter,)), 60.0, is_detailed=True, caller={"request_id": "r1"})

    async def check() -> None:
        taken: list[Order] = []
        async with ends(handler_of(*EVENTS, taken=taken)) as (_, sender, address):
            assert await sent(sender, address, order) == EVENTS
            assert await sent(sender, address, order) == EVENTS  # over the same connection
        assert taken == [order, order]

    asyncio.run(check())


@pytest.mark.parametrize("error", [DeadlineExceeded("late", param="timeout"), AdapterBusy("all slots are in use")])
def test_an_error_is_raised_as_what_it_was(error: LorafleetError) -> None:
    async def check() -> None:
        async with ends(handler_of(Started(0), error)) as (_, sender, address):
            with pytest.raises(type(error)) as raised:
                await sent(sender, address)
        assert raised.value.__dict__ == error.__dict__

    asyncio.run(check())


def test_whoever_does_not_have_the_token_is_refused() -> None:
    async def check() -> None:
        taken: list[Order] = []
        async with ends(handler_of(*EVENTS, taken=taken)) as (_, sender, address):
            with pytest.raises(NotTaken):
                await sent(sender, Address(address.url, "guessed"))
        assert not taken

    asyncio.run(check())


def test_a_replica_that_is_gone_or_about_to_go_takes_nothing() -> None:
    async def check() -> None:
        async with ends(handler_of(*EVENTS)) as (receiver, sender, address):
            await receiver.drain()
            with pytest.raises(NotTaken):
                await sent(sender, address)
            await receiver.close()
            with pytest.raises(NotTaken):
                await sent(sender, address)

    asyncio.run(check())


def test_draining_waits_for_what_is_in_flight() -> None:
    async def check() -> None:
        may_end = asyncio.Event()

        async def handler(_: Order) -> AsyncGenerator[Event]:
            yield Started(0)
            await may_end.wait()
            for event in EVENTS[1:]:
                yield event

        async with ends(handler) as (receiver, sender, address), aclosing(sender.send(ORDER, address)) as events:
            await anext(events)
            draining = asyncio.create_task(receiver.drain())
            await asyncio.sleep(0.1)
            assert not draining.done()
            may_end.set()
            assert [event async for event in events] == EVENTS[1:]
            await draining

    asyncio.run(check())


def test_hanging_up_calls_the_work_off() -> None:
    async def check() -> None:
        called_off = asyncio.Event()

        async def handler(_: Order) -> AsyncGenerator[Event]:
            try:
                yield Started(0)
                await asyncio.sleep(60)
            finally:
                called_off.set()

        async with ends(handler) as (_, sender, address):
            async with aclosing(sender.send(ORDER, address)) as events:
                assert await anext(events) == Started(0)
            await asyncio.wait_for(called_off.wait(), 10)

    asyncio.run(check())


def test_a_replica_that_dies_on_the_way_is_lost() -> None:
    async def check() -> None:
        async def handler(_: Order) -> AsyncGenerator[Event]:
            yield Started(0)
            raise RuntimeError("a bug")

        async with ends(handler) as (_, sender, address):
            with pytest.raises(NotReady, match="try again"):
                await sent(sender, address)
        async with ends(handler_of(Started(0))) as (_, sender, address):  # an end without a word
            with pytest.raises(NotReady, match="try again"):
                await sent(sender, address)

    asyncio.run(check())


def test_slow_work_shows_signs_of_life_and_silence_is_a_loss() -> None:
    async def check() -> None:
        async def slow(_: Order) -> AsyncGenerator[Event]:
            await asyncio.sleep(2.5)
            yield Done({}, [])

        async with ends(slow, silent_s=1.5) as (_, sender, address):
            assert await sent(sender, address) == [Done({}, [])]

        async def silent(http: web.Request) -> web.StreamResponse:
            reply = web.StreamResponse()
            await reply.prepare(http)
            await reply.write(b"\xc0")
            await asyncio.sleep(3)
            return reply

        app = web.Application()
        app.router.add_post("/work", silent)
        runner, sender = web.AppRunner(app), Sender(silent_s=1.0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        with pytest.raises(NotReady, match="try again"):
            await sent(sender, Address(f"http://127.0.0.1:{runner.addresses[0][1]}", ""))
        await sender.close()
        await runner.cleanup()

    asyncio.run(check())


def test_where_ray_encrypts_work_is_encrypted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ours", "theirs"):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-days", "1"]
        files = ["-keyout", f"{tmp_path}/{name}.key", "-out", f"{tmp_path}/{name}.crt"]
        subprocess.run([*command, *files], check=True, capture_output=True)

    def use(name: str) -> None:
        monkeypatch.setenv("RAY_TLS_CA_CERT", f"{tmp_path}/{name}.crt")
        monkeypatch.setenv("RAY_TLS_SERVER_CERT", f"{tmp_path}/{name}.crt")
        monkeypatch.setenv("RAY_TLS_SERVER_KEY", f"{tmp_path}/{name}.key")

    async def check() -> None:
        monkeypatch.setenv("RAY_USE_TLS", "1")
        use("ours")
        async with ends(handler_of(*EVENTS)) as (_, sender, address):
            assert address.url.startswith("https:")
            assert await sent(sender, address) == EVENTS
            use("theirs")
            stranger = Sender()
            with pytest.raises(NotTaken):
                await sent(stranger, address)
            await stranger.close()
            monkeypatch.delenv("RAY_USE_TLS")
            with pytest.raises((NotTaken, NotReady)):
                await sent(stranger := Sender(), Address(address.url.replace("https", "http"), address.token))
            await stranger.close()

    asyncio.run(check())
