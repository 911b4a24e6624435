"""The outermost layer of the API: every request gets an id, every failure a JSON answer, whatever raised it, and how
each one ends is counted."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorafleet.core.errors import Overloaded
from lorafleet.core.metrics import (
    CANCELLED,
    CLIENT_LEFT,
    OK,
    OTHER,
    REJECTIONS,
    REQUEST_SECONDS,
    REQUESTS,
    REQUESTS_IN_FLIGHT,
    Recorder,
)
from lorafleet.serve import logs, tracing

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER: Final = "x-request-id"
UNMATCHED: Final = "unmatched"
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_VALID_ID: Final = re.compile(rb"^[A-Za-z0-9._-]{1,128}$")


@dataclass
class _Ending:
    """How a request ends, as far as is known."""

    status: int | None = None
    failure: str | None = None
    rejection: str | None = None
    is_answered: bool = False
    has_left: bool = False


_ending: ContextVar[_Ending | None] = ContextVar("ending", default=None)


def note_failure(error: Exception, status: int, code: str) -> None:
    """What the request that is being answered fails with, be it told inside a stream; nothing outside of one, nor when
    the client has left, which calls the work off."""
    if (ending := _ending.get()) is not None and not ending.has_left:
        ending.status, ending.failure = status, code
        ending.rejection = error.reason if isinstance(error, Overloaded) else None


class Edge:
    """ASGI middleware. A valid `x-request-id` of the caller is kept and echoed, another one replaced.

    `adds_header` is off behind Ray Serve's proxy, which puts the header on every response itself.
    """

    def __init__(
        self, app: ASGIApp, *, on_error: Callable[[Exception], Response], adds_header: bool, recorder: Recorder
    ) -> None:
        self._app = app
        self._on_error = on_error
        self._adds_header = adds_header
        self._recorder = recorder
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ending, start = _Ending(), time.monotonic()
        before = _ending.set(ending)
        request_id = _given_id(scope) or uuid.uuid4().hex
        logs.begin({"request_id": request_id})
        self._count_in_flight(+1)
        with tracing.server_span(scope["method"], scope["headers"]) as tell:
            try:
                await self._answer(scope, receive, send, ending, request_id)
            finally:
                self._count_in_flight(-1)
                _ending.reset(before)
                self._record(scope, ending, time.monotonic() - start, tell)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, ending: _Ending, request_id: str) -> None:
        scope.setdefault("state", {})["request_id"] = request_id
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                ending.status = ending.status or message["status"]
            if message["type"] == "http.response.start" and self._adds_header:
                message["headers"] = [*message.get("headers", []), (REQUEST_ID_HEADER.encode(), request_id.encode())]
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                ending.is_answered = True

        async def receive_and_note() -> Message:
            try:
                message = await receive()
            except Exception:  # behind Ray Serve's proxy, what it calls off itself when the client leaves
                message = {"type": "http.disconnect"}
            if message["type"] == "http.disconnect" and not ending.is_answered:
                ending.has_left = True
            return message

        try:
            await self._app(scope, receive_and_note, send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:  # the process edge: the caller gets an answer, the service stays
            response = self._on_error(error)
            if has_started:
                raise
            await response(scope, receive_and_note, send_with_id)

    def _count_in_flight(self, change: int) -> None:
        self._in_flight += change
        self._recorder.set(REQUESTS_IN_FLIGHT, self._in_flight)

    def _record(self, scope: Scope, ending: _Ending, seconds: float, tell: tracing.Tell) -> None:
        route = getattr(scope.get("route"), "path", UNMATCHED)
        method = scope["method"] if scope["method"] in METHODS else OTHER
        if ending.failure is not None:
            status, outcome, result = ending.status, ending.failure, "error"
        elif ending.is_answered:
            status, outcome, result = ending.status, OK, OK
        else:
            status, outcome, result = CLIENT_LEFT, CANCELLED, CANCELLED
        self._recorder.add(REQUESTS, route=route, method=method, status=str(status), outcome=outcome)
        self._recorder.observe(REQUEST_SECONDS, seconds, route=route, method=method, result=result)
        if ending.rejection is not None:
            self._recorder.add(REJECTIONS, reason=ending.rejection)
        tell(route, status or CLIENT_LEFT, outcome)
        if logger.isEnabledFor(logging.INFO):
            more = {
                "method": method,
                "route": route,
                "status": status,
                "outcome": outcome,
                "seconds": round(seconds, 4),
            }
            logger.info("%s %s ended: %s", method, route, outcome, extra=more)


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == REQUEST_ID_HEADER.encode() and _VALID_ID.match(value):
            given: bytes = value
            return given.decode()
    return None
