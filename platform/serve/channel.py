"""The way of work from the gateway to a replica, and of its images back: HTTP/1.1 between their event loops.

Ray Serve starts, watches and replaces the replicas, and tells the gateway where they are. Work does not go by its
handle, with which a call took 7.3 ms (Ray 2.60, two cores, a no-op that answers with 17 KB); over a socket, 0.5 ms.

A request is JSON, its answer a row of msgpack objects: None, which says that the work is taken and now and then that it
goes on; events; the error as the last one, if there is one. Nothing is pickled. Who does not have the replica's token,
which only Ray tells, is refused. Where Ray's own connections are encrypted (RAY_USE_TLS), so are these, with the same
certificates.
"""

import asyncio
import hmac
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Self

import msgpack
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector, web

from lorafleet.core.config import ray_tls
from lorafleet.core.errors import LorafleetError, NotReady, by_code
from lorafleet.serve import events, logs
from lorafleet.serve.events import Done, Event
from lorafleet.serve.work import Work

PATH: Final = "/work"
SIGN_OF_LIFE: Final = msgpack.packb(None)
SIGN_OF_LIFE_S: Final = 5.0
SILENT_S: Final = 20.0  # then a replica counts as lost
CONNECT_S: Final = 5.0
KEPT_S: Final = 60.0  # an idle connection by the gateway; by the replica for longer, so that none closes as it is used
LOST: Final = "the replica went away while it worked on this request: try again"


class NotTaken(Exception):
    """The replica is not there any more, or about to go: the work was not begun, another one may have it."""


@dataclass(frozen=True)
class Address:
    """Where a replica takes work."""

    url: str
    token: str = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Order:
    """Work with what belongs to it. Without details no event comes before the images."""

    work: Work
    timeout_s: float
    is_detailed: bool
    caller: logs.Caller = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "work": self.work.to_json(),
            "timeout_s": self.timeout_s,
            "is_detailed": self.is_detailed,
            "caller": dict(self.caller),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(Work.from_json(content["work"]), content["timeout_s"], content["is_detailed"], content["caller"])


Handler = Callable[[Order], AsyncGenerator[Event | LorafleetError]]
"""Does the work; an error is the last thing it says. Closed, it calls the work off."""


class Receiver:
    """The replica's end."""

    def __init__(self, handler: Handler, *, sign_of_life_s: float = SIGN_OF_LIFE_S) -> None:
        self._handler = handler
        self._sign_of_life_s = sign_of_life_s
        self._token = secrets.token_urlsafe(32)
        self._in_flight = 0
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_draining = False
        app = web.Application(client_max_size=0)  # no limit: the gateway has one
        app.router.add_post(PATH, self._answer)
        # A closed connection calls the work off.
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=10 * KEPT_S)

    async def start(self, host: str) -> Address:
        """Listens on a free port of that address of this machine."""
        await self._runner.setup()
        tls = _tls(ssl.Purpose.CLIENT_AUTH)
        await web.TCPSite(self._runner, host, 0, ssl_context=tls).start()
        name, port = f"[{host}]" if ":" in host else host, self._runner.addresses[0][1]
        return Address(f"{'https' if tls else 'http'}://{name}:{port}", self._token)

    async def drain(self) -> None:
        """Takes nothing more, and waits for what is in flight."""
        self._is_draining = True
        await self._is_idle.wait()

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        given = http.headers.get("authorization", "").encode(errors="replace")
        if not hmac.compare_digest(given, f"Bearer {self._token}".encode()):
            return web.Response(status=401)
        order = Order.from_json(await http.json())
        if self._is_draining:
            return web.Response(status=503)
        reply = web.StreamResponse()
        with self._counted():
            await reply.prepare(http)
            await reply.write(SIGN_OF_LIFE)  # at once: it is taken
            signs = asyncio.create_task(self._show_life(reply))
            rest = b""
            try:
                async with aclosing(self._handler(order)) as said:
                    async for event in said:
                        if order.is_detailed:
                            await reply.write(_packed(event))
                        else:  # nobody waits for the first one: all go with the end
                            rest += _packed(event)
            finally:
                signs.cancel()
            await reply.write_eof(rest)
        return reply

    async def _show_life(self, reply: web.StreamResponse) -> None:
        with suppress(ConnectionError):  # who waited has left, which ends the work by itself
            while True:
                await asyncio.sleep(self._sign_of_life_s)
                await reply.write(SIGN_OF_LIFE)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._in_flight += 1
        self._is_idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._is_idle.set()


class Sender:
    """The gateway's end, for one event loop; keeps connections to every replica."""

    def __init__(self, *, silent_s: float = SILENT_S) -> None:
        self._silent_s = silent_s
        self._session: ClientSession | None = None

    async def send(self, order: Order, address: Address) -> AsyncGenerator[Event]:
        """What becomes of the work. Closed before that is over, it calls the work off.

        Raises NotTaken, what the replica says went wrong, and NotReady when it is lost.
        """
        is_taken = is_done = False
        headers = {"authorization": f"Bearer {address.token}"}
        try:
            call = self._opened().post(address.url + PATH, json=order.to_json(), headers=headers)
            async with call as reply:
                if reply.status != 200:
                    raise NotTaken(f"it answers with status {reply.status}")
                is_taken = True
                async for event in _unpacked(reply.content.iter_any()):
                    yield event
                    is_done = isinstance(event, Done)
        except (ClientError, TimeoutError) as error:
            raise (NotReady(LOST) if is_taken else NotTaken(str(error) or type(error).__name__)) from error
        if not is_done:
            raise NotReady(LOST)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    def _opened(self) -> ClientSession:
        if self._session is None:  # not earlier: it belongs to the event loop that it is made in
            tls = _tls(ssl.Purpose.SERVER_AUTH)
            self._session = ClientSession(
                connector=TCPConnector(limit=0, keepalive_timeout=KEPT_S, ssl=True if tls is None else tls),
                timeout=ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=self._silent_s),
            )
        return self._session


def _packed(said: Event | LorafleetError) -> bytes:
    if isinstance(said, LorafleetError):
        content = {"type": "error", "code": said.code, "message": said.message, "param": said.param}
    else:
        content = events.to_fields(said)
    packed: bytes = msgpack.packb(content)
    return packed


async def _unpacked(chunks: AsyncIterator[bytes]) -> AsyncGenerator[Event]:
    """Raises the error that is told."""
    unpacker = msgpack.Unpacker(max_buffer_size=0)  # no limit
    async for chunk in chunks:
        unpacker.feed(chunk)
        for content in unpacker:
            if content is None:
                continue
            if content["type"] == "error":
                raise by_code()[content["code"]](content["message"], param=content["param"])
            yield events.from_fields(content)


def _tls(purpose: ssl.Purpose) -> ssl.SSLContext | None:
    """With Ray's certificates, if its own connections are encrypted; each end shows one that the other's CA knows."""
    files = ray_tls()
    if files is None:
        return None
    authority, certificate, key = files
    context = ssl.create_default_context(purpose, cafile=authority)
    context.load_cert_chain(certificate, key)
    context.check_hostname = False  # Ray's certificates name what they like; the CA is the cluster's own
    context.verify_mode = ssl.CERT_REQUIRED
    return context
