import base64
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from lorafleet.core.errors import NotReady
from lorafleet.core.manifest import Manifest
from lorafleet.core.recipe import extract
from lorafleet.serve.api import create_app
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Event, Queued
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.routes.generate import preferred_type
from lorafleet.serve.work import Work

MakeApp = Callable[..., FastAPI]
QUICK = {"prompt": "red apple", "steps": 1, "seed": 7}


def error_of(response: httpx.Response) -> dict[str, object]:
    """The error's fields, after checking that the response has the one shape."""
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", response.headers["x-request-id"])
    (error,) = response.json().values()
    assert error.keys() >= {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert 0 < len(error["message"]) < 500
    found: dict[str, object] = error
    return found


def test_json_holds_images_seeds_timings_and_id(client: Any) -> None:
    reply = client.post("/generate", json={**QUICK, "num_images": 2}, headers={"x-request-id": "mine-1"})
    body = reply.json()
    assert reply.status_code == 200
    assert body["id"] == reply.headers["x-request-id"] == "mine-1"
    assert body["model"] == "emojixl"
    assert body["seeds"] == [7, 8]
    assert [extract(base64.b64decode(image)).seed for image in body["images"]] == [7, 8]
    assert body["timings"].keys() >= {"encode_s", "denoise_s", "decode_s", "total_s"}
    assert body["warnings"] == []


def test_png_bytes_on_request(client: Any) -> None:
    reply = client.post("/generate", json=QUICK, headers={"accept": "image/png"})
    assert reply.headers["content-type"] == "image/png"
    assert reply.headers["x-lorafleet-seed"] == "7"
    as_json = client.post("/generate", json=QUICK).json()
    assert reply.content == base64.b64decode(as_json["images"][0])


def test_png_bytes_hold_one_image(client: Any) -> None:
    reply = client.post("/generate", json={**QUICK, "num_images": 2}, headers={"accept": "image/png"})
    assert reply.status_code == 422
    assert error_of(reply)["param"] == "num_images"


@pytest.mark.parametrize(
    ("accept", "answer"),
    [
        ("image/png", "image/png"),
        ("image/png, application/json;q=0.5", "image/png"),
        ("text/event-stream, image/png;q=0.9", "text/event-stream"),
        ("*/*", "application/json"),
        ("", "application/json"),
        ("application/json, image/png", "application/json"),
        ("image/png;q=0", "application/json"),
        ("image/png;q=x", "application/json"),
    ],
)
def test_which_answer_an_accept_header_prefers(accept: str, answer: str) -> None:
    assert preferred_type(accept) == answer


def test_another_bases_recipe_is_a_conflict(client: Any) -> None:
    base = {"id": "other", "revision": None, "fingerprint": "0" * 64}
    reply = client.post("/generate", json={**QUICK, "base": base})
    assert reply.status_code == 409
    assert error_of(reply)["code"] == "recipe_mismatch"


@pytest.mark.parametrize(
    ("options", "status", "code"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "malformed_json"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "unsupported_media_type"),
        ({"content": b"{}"}, 415, "unsupported_media_type"),
        ({"data": {"prompt": "x"}}, 415, "unsupported_media_type"),
        ({"json": {"prompt": "x" * 3000}}, 422, "invalid_value"),
        ({"json": {"prompt": "x", "pad": "x" * 5000}}, 413, "body_too_large"),
        ({"json": {**QUICK, "width": 100}}, 422, "invalid_value"),
        ({"json": {**QUICK, "scheduler": "lcm", "steps": 51}}, 422, "invalid_value"),
    ],
)
def test_bad_input_is_told_in_the_one_shape(
    make_app: MakeApp, client_of: Any, options: dict[str, object], status: int, code: str
) -> None:
    reply = client_of(make_app(max_body_bytes=4096)).post("/generate", **options)
    assert reply.status_code == status
    assert error_of(reply)["code"] == code
    assert error_of(reply)["type"] == "invalid_request_error"


def test_several_faults_are_listed(client: Any) -> None:
    error = error_of(client.post("/generate", json={"prompt": "", "steps": 0}))
    listed = error["errors"]
    assert isinstance(listed, list)
    assert [fault["param"] for fault in listed] == ["prompt", "steps"]
    assert error["message"] == listed[0]["message"]


def test_a_large_body_is_refused_while_it_streams(make_app: MakeApp, client_of: Any) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 1024
            yield b" " * 1024

    reply = client_of(make_app(max_body_bytes=4096)).post(
        "/generate", content=endless(), headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413
    assert sent <= 8192


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "route_not_found"),
        ("GET", "/generate/", 404, "route_not_found"),
        ("GET", "/generate", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/gpt-image-1", 404, "model_not_found"),
    ],
)
def test_wrong_routes(client: Any, method: str, path: str, status: int, code: str) -> None:
    reply = client.request(method, path)
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)
    if status == 405:
        assert reply.headers["allow"]


def test_openai_routes(client: Any) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["emojixl"]
    assert client.get("/v1/models/emojixl").json()["object"] == "model"
    body = {"prompt": "x", "num_inference_steps": 1, "size": "64x96", "model": "emojixl", "n": 2}
    reply = client.post("/v1/images/generations", json=body).json()
    assert (reply["size"], len(reply["data"])) == ("64x96", 2)
    recipe = extract(base64.b64decode(reply["data"][0]["b64_json"]))
    assert (recipe.width, recipe.height) == (64, 96)


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"model": "gpt-image-1"}, 404, "model", "known are emojixl"),
        ({"size": "1024x1024"}, 422, "size", "multiple of 32 from 64 to 256"),
        ({"scheduler": "lcm", "num_inference_steps": 51}, 422, "num_inference_steps", "from 1 to 50"),
        ({"stream": True, "partial_images": 4}, 422, "partial_images", "from 0 to 3"),
    ],
)
def test_openai_refusals(client: Any, body: dict[str, object], status: int, param: str, words: str) -> None:
    reply = client.post("/v1/images/generations", json={"prompt": "x", **body})
    assert (reply.status_code, error_of(reply)["param"]) == (status, param)
    assert words in str(error_of(reply)["message"])


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "é"])
def test_an_unfit_request_id_is_replaced(client: Any, given: str) -> None:
    reply = client.get("/healthz", headers={"x-request-id": given.encode()})
    assert re.fullmatch("[0-9a-f]{32}", reply.headers["x-request-id"])


def test_health(client: Any) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200


def test_more_than_is_accepted_is_told_when_to_come_back(make_app: MakeApp, client_of: Any) -> None:
    client = client_of(make_app(max_queued=1))
    replies = client.at_once("POST", "/generate", 5, json=QUICK)
    assert sorted(reply.status_code for reply in replies) == [200, 200, 429, 429, 429]
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert error_of(refused)["code"] == "overloaded"
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/generate", json=QUICK).status_code == 200


def test_a_passed_deadline_asks_not_to_be_retried(make_app: MakeApp, client_of: Any) -> None:
    app = make_app(request_timeout_s=0.2)
    reply = client_of(app).post("/generate", json={**QUICK, "steps": 150, "num_images": 8})
    assert reply.status_code == 504
    assert error_of(reply)["code"] == "deadline_exceeded"
    assert reply.headers["x-should-retry"] == "false"


class BrokenBackend:
    """A backend that fails as none should."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def model(self) -> ModelInfo:
        raise self.error

    async def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        raise self.error
        yield Queued()

    async def push(self, name: str, handed_in: str) -> Manifest:
        raise self.error

    is_asleep = False


def test_no_replica_is_not_ready(client_of: Any) -> None:
    client = client_of(create_app(ServeSettings(), BrokenBackend(NotReady("no replica has its model loaded yet"))))
    assert client.get("/healthz").status_code == 200
    for reply in (client.get("/readyz"), client.post("/generate", json=QUICK)):
        assert (reply.status_code, error_of(reply)["code"]) == (503, "not_ready")
        assert reply.headers["retry-after"] == "1"


def test_an_unforeseen_failure_keeps_its_details_to_itself(client_of: Any, caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(create_app(ServeSettings(), BrokenBackend(KeyError("secret"))))
    reply = client.post("/generate", json=QUICK)
    assert (reply.status_code, error_of(reply)["code"]) == (500, "internal_error")
    assert "secret" not in reply.text
    assert "secret" in caplog.text


def test_browsers_of_named_origins_may_call(make_app: MakeApp, client_of: Any) -> None:
    client = client_of(make_app(cors_origins=["http://localhost:3000"]))
    reply = client.post("/generate", json={}, headers={"origin": "http://localhost:3000"})
    assert reply.status_code == 422
    assert reply.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "access-control-allow-origin" not in client.get("/healthz", headers={"origin": "http://evil"}).headers


def test_the_document_says_what_the_base_can_do(client: Any) -> None:
    document = client.get("/openapi.json").json()
    body = document["components"]["schemas"]["GenerateBody"]
    assert body["properties"]["steps"]["maximum"] == 150
    width = {"type": "integer", "minimum": 64, "maximum": 256, "multipleOf": 32}
    assert body["properties"]["width"]["anyOf"][0] == width
    assert set(document["paths"]["/generate"]["post"]["responses"]) >= {"200", "409", "413", "422", "429", "504"}
    assert "#/components/schemas/ErrorReply" in json.dumps(document["paths"]["/v1/models"])


@pytest.mark.parametrize(("field", "value"), [("stream", 0), ("stream", 0.0), ("partial_images", False)])
def test_zero_is_not_false_nor_false_zero(client: Any, field: str, value: object) -> None:
    reply = client.post("/v1/images/generations", json={"prompt": "x", "num_inference_steps": 1, field: value})
    assert reply.status_code == 422
    assert error_of(reply)["param"] == field
