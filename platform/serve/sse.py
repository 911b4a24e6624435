"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

MEDIA_TYPE: Final = "text/event-stream"
HEARTBEAT_S: Final = 10.0  # proxies drop connections that are silent for longer, most of them after 30 to 60 seconds
_HEARTBEAT: Final = b": still here\n\n"


def encode(name: str, data: dict[str, Any], number: str | None = None) -> bytes:
    """One event; `number` is what a client sends back as `Last-Event-ID` to go on after it."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class EventStream(StreamingResponse):
    """A response of events, with a heartbeat where there are none. `on_close` is called however it ends."""

    media_type = MEDIA_TYPE

    def __init__(
        self,
        content: AsyncIterator[bytes],
        *,
        on_close: Callable[[], None] = lambda: None,
        heartbeat_s: float = HEARTBEAT_S,
    ) -> None:
        # x-accel-buffering: nginx would hold events back until its buffer is full
        super().__init__(
            _kept_alive(content, heartbeat_s), headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _kept_alive(content: AsyncIterator[bytes], heartbeat_s: float) -> AsyncIterator[bytes]:
    waiting: asyncio.Future[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(content))
            done, _ = await asyncio.wait({waiting}, timeout=heartbeat_s)
            if not done:
                yield _HEARTBEAT
                continue
            try:
                chunk = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield chunk
    finally:
        if waiting is not None:
            waiting.cancel()
