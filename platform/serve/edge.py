"""The outermost layer of the API: every request gets an id, every failure a JSON answer, whatever raised it."""

import re
import uuid
from collections.abc import Callable
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID_HEADER: Final = "x-request-id"
_VALID_ID: Final = re.compile(rb"^[A-Za-z0-9._-]{1,128}$")


class Edge:
    """ASGI middleware. A valid `x-request-id` of the caller is kept and echoed, another one replaced.

    `adds_header` is off behind Ray Serve's proxy, which puts the header on every response itself.
    """

    def __init__(self, app: ASGIApp, *, on_error: Callable[[Exception], Response], adds_header: bool) -> None:
        self._app = app
        self._on_error = on_error
        self._adds_header = adds_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or uuid.uuid4().hex.encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
            if message["type"] == "http.response.start" and self._adds_header:
                message["headers"] = [*message.get("headers", []), (REQUEST_ID_HEADER.encode(), request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:  # the process edge: the caller gets an answer, the service stays
            if has_started:
                raise
            await self._on_error(error)(scope, receive, send_with_id)


def _given_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER.encode() and _VALID_ID.match(value):
            given: bytes = value
            return given
    return None
