"""Both clients against answers that a test hands out: events, jobs, pictures, retries."""

import asyncio
import base64
import inspect
import json
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import lorafleet.client
from lorafleet.client import AsyncClient, Client, Done, Downloading, Image, Queued, Step
from lorafleet.client import adapters as adapters_module
from lorafleet.client import http as sync_module
from lorafleet.client.events import Decoder
from lorafleet.core import errors
from lorafleet.core.generation import AdapterUse, GenerationRequest

URL = "http://127.0.0.1:8000"
REQUEST = GenerationRequest(prompt="x", steps=2, seed=1)
PNG = b"\x89PNG"
B64 = base64.b64encode(PNG).decode()
DONE = {"type": "done", "timings": {"total_s": 1.0}, "warnings": [], "since": "a later version"}
STEPS = [
    {"type": "queued"},
    {"type": "downloading", "adapter": "plush", "done_bytes": 1, "total_bytes": 2},
    {"type": "step", "image": 0, "done": 1, "total": 2, "preview": B64},
]
IMAGE = {"type": "image", "image": 0, "seed": 1, "png": B64}
EXPECTED = [Queued(), Downloading("plush", 1, 2), Step(0, 1, 2, PNG), Image(0, 1, PNG), Done({"total_s": 1.0}, [])]
JOB = {"id": "j/1", "status": "succeeded", "created_at": 1, "progress": 1.0, "images": [], "object": "job"}
VERSION = "ab" * 32
MANIFEST = {
    "name": "plush",
    "version": VERSION,
    "size_bytes": 1,
    "pushed_at": "2026-01-01T00:00:00Z",
    "format": "peft",
    "rank": 4,
    "modules": {"unet": 1},
    "fits_fingerprint": "ba5e" * 16,
}
Answer = Callable[[httpx.Request], httpx.Response]


def sse(*events: dict[str, Any], first: int = 1, broken: bool = False) -> httpx.Response:
    lines = [f"id: {i}\nevent: {event['type']}\ndata: {json.dumps(event)}\n\n" for i, event in enumerate(events, first)]
    content = ": still here\n\n" + "".join(lines)

    def chunks() -> Iterator[bytes]:
        for at in range(0, len(content), 7):
            yield content[at : at + 7].encode()
        if broken:
            raise httpx.ReadError("cut off")

    class Both(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return chunks()

        async def __aiter__(self) -> Any:
            for chunk in chunks():
                yield chunk

    return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Both())


def refusal(status: int, code: str, **headers: str) -> httpx.Response:
    error = {"message": "no.", "type": "x", "param": "steps", "code": code}
    return httpx.Response(
        status, headers={name.replace("_", "-"): v for name, v in headers.items()}, json={"error": error}
    )


@pytest.fixture(params=["threads", "event loop"])
def use(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`use(answer, "generate", ...)`: what that method of either client gives, events as a list."""

    def in_thread(answer: Answer, method: str, *arguments: Any, **options: Any) -> Any:
        with Client(URL, transport=httpx.MockTransport(answer)) as client:
            result = operator.attrgetter(method)(client)(*arguments, **options)
            return list(result) if inspect.isgenerator(result) else result

    def in_loop(answer: Answer, method: str, *arguments: Any, **options: Any) -> Any:
        async def main() -> Any:
            async with AsyncClient(URL, transport=httpx.MockTransport(answer)) as client:
                result = operator.attrgetter(method)(client)(*arguments, **options)
                return [event async for event in result] if inspect.isasyncgen(result) else await result

        return asyncio.run(main())

    return in_thread if request.param == "threads" else in_loop


def test_both_clients_offer_the_same() -> None:
    def offer(kind: type) -> dict[str, object]:
        methods = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
        return {name: inspect.signature(method).parameters.keys() for name, method in methods.items()}

    assert offer(Client) == offer(AsyncClient)
    assert offer(adapters_module.Adapters) == offer(adapters_module.AsyncAdapters)


def test_all_that_is_exported_is_there() -> None:
    assert sorted(lorafleet.client.__all__) == lorafleet.client.__all__
    assert all(hasattr(lorafleet.client, name) for name in lorafleet.client.__all__)


def test_events_come_typed(use: Callable[..., Any]) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return sse(*STEPS, {"type": "of a later version"}, IMAGE, DONE)

    assert use(answer, "stream", REQUEST, previews=2, idempotency_key="k", init_image=b"pic") == EXPECTED
    body = json.loads(seen[0].content)
    assert (body["previews"], base64.b64decode(body["init_image"])) == (2, b"pic")
    assert (seen[0].headers["accept"], seen[0].headers["idempotency-key"]) == ("text/event-stream", "k")


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (lambda: sse(*STEPS), errors.NotReady),
        (lambda: sse(*STEPS, broken=True), errors.NotReady),
        (
            lambda: sse({"type": "error", "error": {"message": "late.", "code": "deadline_exceeded"}}),
            errors.DeadlineExceeded,
        ),
        (lambda: sse({"type": "error"}), errors.LorafleetError),
        (lambda: sse({"type": "step"}), errors.LorafleetError),
        (lambda: sse({"type": "image", "image": 0, "seed": 1, "png": "?"}), errors.LorafleetError),
        (lambda: refusal(422, "invalid_value"), errors.InvalidRequest),
    ],
)
def test_a_stream_that_does_not_end_well(
    use: Callable[..., Any], reply: Callable[[], httpx.Response], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as error:
        use(lambda _: reply(), "stream", REQUEST)
    assert type(error.value) is kind or kind is errors.NotReady


def test_a_job_s_events_go_on_over_a_broken_connection(use: Callable[..., Any]) -> None:
    seen: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers.get("last-event-id"))
        return sse(*STEPS, broken=True) if len(seen) == 1 else sse(IMAGE, DONE, first=4)

    assert use(answer, "job_events", "j/1") == EXPECTED
    assert seen == [None, "3"]


def test_jobs(use: Callable[..., Any]) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.method} {request.url.raw_path.decode()}")
        image = {"index": 0, "seed": 1, "b64_json": B64}
        return (
            sse(DONE) if request.url.path.endswith("events") else httpx.Response(200, json={**JOB, "images": [image]})
        )

    job = use(answer, "submit", REQUEST)
    assert (job.id, job.has_ended, job.images[0].png) == ("j/1", True, PNG)
    assert use(answer, "wait", "j/1") == use(answer, "cancel", "j/1") == use(answer, "job", "j/1") == job
    paths = ["POST /v1/jobs", "GET /v1/jobs/j%2F1/events", "GET /v1/jobs/j%2F1", "DELETE /v1/jobs/j%2F1"]
    assert seen == [*paths, "GET /v1/jobs/j%2F1"]


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ({"status": "failed", "error": {"message": "late.", "code": "deadline_exceeded"}}, errors.DeadlineExceeded),
        ({"status": "cancelled"}, errors.GenerationFailed),
    ],
)
def test_a_job_that_did_not_end_well(use: Callable[..., Any], end: dict[str, Any], kind: type[Exception]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("events"):
            return sse({"type": "cancelled"})
        return httpx.Response(200, json={**JOB, **end})

    with pytest.raises(kind):
        use(answer, "wait", "j/1")


def test_an_edit_is_a_form(use: Callable[..., Any]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        text = request.read().decode("latin-1")
        assert request.headers["content-type"].startswith("multipart/form-data")
        for name, value in (("size", "64x96"), ("strength", "0.5"), ("n", "1"), ("image", "pic"), ("mask", "hole")):
            assert f'name="{name}"' in text
            assert f"\r\n{value}\r\n" in text
        assert '[{"name": "plush", "weight": 0.5}]' in text
        return httpx.Response(200, json={"data": [{"b64_json": B64}]})

    uses = [AdapterUse(name="plush", weight=0.5)]
    request = REQUEST.model_copy(update={"width": 64, "height": 96, "adapters": uses})
    assert use(answer, "edit", request, b"pic", mask=b"hole", strength=0.5) == [PNG]


def test_a_push_sends_the_whole_file_at_every_try(use: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "plush.safetensors"
    file.write_bytes(b"weights" * 20_000)
    seen: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.read())
        assert (request.method, request.url.path) == ("POST", "/v1/adapters")
        return refusal(503, "not_ready", retry_after="0") if len(seen) == 1 else httpx.Response(201, json=MANIFEST)

    manifest = use(answer, "adapters.push", "plush", file)
    assert (manifest.name, manifest.rank) == ("plush", 4)
    assert all(file.read_bytes() in body and b'name="name"\r\n\r\nplush' in body for body in seen)
    assert len(seen) == 2
    with pytest.raises(errors.InvalidRequest, match=r"cannot read .*nothing: No such file"):
        use(answer, "adapters.push", "plush", tmp_path / "nothing")


def test_adapters_are_named_and_deleted(use: Callable[..., Any]) -> None:
    seen: list[tuple[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else None
        seen.append((f"{request.method} {request.url.raw_path.decode()}", body))
        if request.url.path.endswith("/production"):
            return httpx.Response(200, json={"name": "plush", "alias": "production", "versions": {VERSION: 1.0}})
        return httpx.Response(200, json={"deleted": [f"plush@{VERSION}"]})

    assert use(answer, "adapters.alias", "plush", "production", "latest").versions == {VERSION: 1.0}
    use(answer, "adapters.alias", "plush", "production", {"latest": 9, "abcdef": 1})
    use(answer, "adapters.unalias", "plush", "production")
    assert use(answer, "adapters.delete", "plush@abcdef") == [f"plush@{VERSION}"]
    alias = "/v1/adapters/plush/aliases/production"
    assert seen == [
        (f"PUT {alias}", {"version": "latest"}),
        (f"PUT {alias}", {"versions": {"latest": 9, "abcdef": 1}}),
        (f"DELETE {alias}", None),
        ("DELETE /v1/adapters/plush@abcdef", None),
    ]


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(
    ("reply", "tries"),
    [
        (refusal(429, "overloaded", retry_after="0.01"), 3),
        (refusal(503, "not_ready", retry_after="0.01"), 3),
        (refusal(503, "not_ready", retry_after="0.01", x_should_retry="false"), 1),
        (refusal(429, "overloaded", retry_after="3600"), 1),
        (refusal(504, "deadline_exceeded", x_should_retry="false"), 1),
        (refusal(500, "internal_error"), 1),
        (refusal(422, "invalid_value"), 1),
    ],
)
def test_asked_again_when_the_server_says_so(
    use: Callable[..., Any], method: str, reply: httpx.Response, tries: int
) -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)

    with pytest.raises(errors.LorafleetError, match="no"):
        use(answer, method, REQUEST)
    assert len(seen) == tries


def test_a_retry_that_succeeds(use: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter(
        [refusal(503, "not_ready", retry_after="0"), httpx.Response(200, json={"data": [{"id": "emojixl"}]})]
    )
    assert use(lambda _: next(replies), "models") == ["emojixl"]
    assert use(lambda _: refusal(503, "not_ready"), "ready") is False


def test_waits_grow_where_the_server_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(sync_module.time, "sleep", waits.append)
    with (
        Client(URL, transport=httpx.MockTransport(lambda _: refusal(503, "not_ready")), retries=3) as client,
        pytest.raises(errors.NotReady),
    ):
        client.models()
    assert waits == [0.5, 1.0, 2.0]


def test_the_decoder_follows_the_standard() -> None:
    decoder = Decoder()
    lines = ["﻿", ":comment", "event: a", "data: 1", "data:2", "id: 7", "retry: 3", "", "", "data", "", "event: lost"]
    messages = [message for line in lines[1:] if (message := decoder.feed(line))]
    assert [(message.name, message.data, message.number) for message in messages] == [("a", "1\n2", "7")]
