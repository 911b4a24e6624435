"""A run as server-sent events."""

from collections.abc import AsyncIterator, Awaitable, Callable

from lorafleet.serve import sse
from lorafleet.serve.events import Event, name_of, to_json
from lorafleet.serve.runs import Run
from lorafleet.serve.service import ErrorBody

Translate = Callable[[Event], Awaitable[list[bytes]]]
"""What a client is sent for an event: none, one or several encoded ones."""


async def plainly(event: Event) -> list[bytes]:
    """The event itself."""
    return [sse.encode(name_of(event), to_json(event))]


async def respond(run: Run, translate: Translate, error_body: ErrorBody) -> sse.EventStream:
    """Lets the run go at the end. What fails at once is raised here, so that it gets a status of its own."""

    async def content() -> AsyncIterator[bytes]:
        try:
            async for _, event in run.follow():
                for chunk in await translate(event):
                    yield chunk
        except Exception as error:  # the status is out: it can only be told inside
            yield sse.encode("error", error_body(error))

    try:
        await run.begun(sse.HEARTBEAT_S)
    except BaseException:
        run.let_go()
        raise
    return sse.EventStream(content(), on_close=run.let_go)
