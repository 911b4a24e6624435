"""Events over HTTP, in this process."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from lorafleet.core.recipe import extract
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.sse import EventStream, encode

QUICK = {"prompt": "red apple", "steps": 4, "seed": 7}
EVENTS = {"accept": "text/event-stream"}


def events_of(reply: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in reply.text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_generate_tells_every_step_and_gives_the_same_image(client: Any) -> None:
    plain = client.post("/generate", json={**QUICK, "num_images": 2}).json()
    events = events_of(client.post("/generate", json={**QUICK, "num_images": 2, "previews": 1}, headers=EVENTS))
    names = [name for name, _ in events]
    assert names[0] == "queued"
    assert names[-1] == "done"
    assert (names.count("started"), names.count("step"), names.count("image")) == (2, 8, 2)
    images = {data["image"]: data["png"] for name, data in events if name == "image"}
    assert [images[0], images[1]] == plain["images"]
    steps = [data for name, data in events if name == "step" and data["image"] == 0]
    assert [(data["done"], data["total"]) for data in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [data["done"] for data in steps if "preview" in data] == [2]
    assert base64.b64decode(steps[1]["preview"]).startswith(b"\x89PNG")
    assert events[-1][1]["timings"]["total_s"] > 0


def test_what_is_refused_before_it_begins_has_a_status(client: Any) -> None:
    reply = client.post("/generate", json={**QUICK, "width": 100}, headers=EVENTS)
    assert reply.status_code == 422
    assert reply.json()["error"]["param"] == "width"


def test_a_failure_on_the_way_is_the_last_event(make_app: Callable[..., FastAPI], client_of: Any) -> None:
    body = {**QUICK, "steps": 150, "num_images": 8}
    events = events_of(client_of(make_app(request_timeout_s=0.3)).post("/generate", json=body, headers=EVENTS))
    name, data = events[-1]
    assert (name, data["error"]["code"]) == ("error", "deadline_exceeded")


async def leave_early(app: FastAPI, path: str, body: dict[str, object], after: bytes) -> None:
    """A client that is gone as soon as it has seen `after`."""
    gone = asyncio.Event()
    sent = False

    async def receive() -> dict[str, object]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if after in message.get("body", b""):
            gone.set()

    headers = [(b"content-type", b"application/json"), (b"accept", b"text/event-stream")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "state": {}}
    await app(scope, receive, send)


def test_a_client_that_leaves_calls_the_work_off(make_app: Callable[..., FastAPI], running_pipeline: Pipeline) -> None:
    body = {**QUICK, "steps": 150, "num_images": 8, "width": 256, "height": 256}
    start = time.monotonic()
    asyncio.run(leave_early(make_app(), "/generate", body, after=b"event: step"))
    while running_pipeline.engine._runs:
        assert time.monotonic() - start < 5
        time.sleep(0.01)


@pytest.mark.parametrize("heartbeat_s", [0.01, 5.0])
def test_silence_is_filled_with_heartbeats(heartbeat_s: float) -> None:
    closed: list[bool] = []

    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.1)
        yield encode("x", {"a": "é\n"}, "3")

    async def collect() -> bytes:
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        async def receive() -> Any:
            await asyncio.sleep(60)

        response = EventStream(slow(), on_close=lambda: closed.append(True), heartbeat_s=heartbeat_s)
        await response({"type": "http"}, receive, send)
        return b"".join(sent)

    text = asyncio.run(collect()).decode()
    assert text.endswith('id: 3\nevent: x\ndata: {"a": "é\\n"}\n\n')
    assert (": still here\n\n" in text) == (heartbeat_s < 1)
    assert closed == [True]


def test_streamed_images_carry_their_recipe(client: Any) -> None:
    events = events_of(client.post("/generate", json={"prompt": "x", "steps": 1}, headers=EVENTS))
    (image,) = [data for name, data in events if name == "image"]
    assert extract(base64.b64decode(image["png"])).seed == image["seed"]
