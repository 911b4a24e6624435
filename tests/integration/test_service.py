"""The service as its clients see it."""

import base64
import io
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import SCHEDULERS, GenerationRequest
from lorafleet.core.recipe import extract
from lorafleet.sdxl import reference
from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.launch import check_port, running_service

APPLE = {"prompt": "red apple on a blue background", "steps": 2, "seed": 7}
JSON = {"content-type": "application/json"}
PNG = {"accept": "image/png"}
HEAVY = {"prompt": "x", "steps": 150, "num_images": 8, "width": 256, "height": 256}


@pytest.fixture(autouse=True)
def still_serves(http: httpx.Client) -> None:
    """Before each test, and so after the one before it, the service makes images."""
    assert http.post("/generate", json=APPLE).json()["seeds"] == [7]


def test_ready(http: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert http.get(path).status_code == 200
    assert "swagger" in http.get("/docs").text


def test_the_image_is_the_oracles(http: httpx.Client) -> None:
    png = http.post("/generate", json={**APPLE, "steps": 4}, headers={"accept": "image/png"}).content
    expected = reference.generate(load_base(BaseConfig(device="cpu")), GenerationRequest(**{**APPLE, "steps": 4}))
    ours = np.asarray(Image.open(io.BytesIO(png))).astype(int)
    # The replica may use another number of threads, and sums in another order: not bit for bit.
    assert np.abs(ours - np.asarray(expected[0]).astype(int)).max() <= 2


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_recipe_read_back_and_posted_as_it_is_makes_the_same_bytes(http: httpx.Client, scheduler: str) -> None:
    body = {"prompt": "yellow star", "negative_prompt": "blue", "steps": 3, "scheduler": scheduler, "num_images": 2}
    first = http.post("/generate", json=body).json()
    assert first["seeds"][1] == (first["seeds"][0] + 1) % 2**32
    for encoded in first["images"]:
        png = base64.b64decode(encoded)
        again = http.post("/generate", content=extract(png).model_dump_json(), headers=JSON | PNG)
        assert again.content == png


def test_a_recipe_makes_the_same_bytes_beside_other_requests(http: httpx.Client, service_url: str) -> None:
    png = http.post("/generate", json={**APPLE, "steps": 8}, headers=PNG).content
    others = [{"prompt": "cat", "steps": 25}, {"prompt": "dog", "steps": 20, "guidance_scale": 1.0, "scheduler": "lcm"}]
    with ThreadPoolExecutor(2) as pool:
        replies = pool.map(lambda body: httpx.post(f"{service_url}/generate", json=body, timeout=60), others)
        again = http.post("/generate", content=extract(png).model_dump_json(), headers=JSON | PNG)
        assert [reply.status_code for reply in replies] == [200, 200]
    assert again.content == png


def test_png_bytes_tell_their_seed_and_id(http: httpx.Client) -> None:
    reply = http.post("/generate", json={"prompt": "x", "steps": 1}, headers=PNG | {"x-request-id": "mine-7"})
    assert extract(reply.content).seed == int(reply.headers["x-lorafleet-seed"])
    assert reply.headers.get_list("x-request-id") == ["mine-7"]


def test_openais_own_client(service_url: str) -> None:
    client = openai.OpenAI(base_url=f"{service_url}/v1", api_key="none", max_retries=0)
    assert "emojixl" in [model.id for model in client.models.list()]
    assert client.models.retrieve("emojixl").owned_by == "lorafleet"
    reply = client.images.generate(
        prompt="red apple on a blue background",
        model="emojixl",
        n=2,
        size="96x64",  # type: ignore[arg-type]
        response_format="b64_json",
        quality="high",
        extra_body={"seed": 5, "num_inference_steps": 2, "guidance_scale": 4, "negative_prompt": "x"},
    )
    assert reply.data is not None
    recipes = [extract(base64.b64decode(image.b64_json or "")) for image in reply.data]
    assert [(recipe.seed, recipe.width, recipe.height) for recipe in recipes] == [(5, 96, 64), (6, 96, 64)]
    with pytest.raises(openai.UnprocessableEntityError, match="n must be an integer from 1 to 8, got 0") as error:
        client.images.generate(prompt="x", n=0)
    assert (error.value.param, error.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError, match="known are emojixl"):
        client.images.generate(prompt="x", model="gpt-image-1")


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b"[" * 50_000, JSON, 400),
        (b'{"prompt": "\\udfff"}', JSON, 400),
        (b'{"prompt": "x", "seed": NaN}', JSON, 400),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}, 415),
        (b'{"prompt": "x", "seed": ' + b"9" * 4000 + b"}", JSON, 422),
        (b'{"prompt": ""}', JSON, 422),
        (b'{"prompt": "x", "width": 100}', JSON, 422),
        (b'{"prompt": "x", "scheduler": "none"}', JSON, 422),
        (b'{"prompt": "x", "steps": "20"}', JSON, 422),
        (b'{"prompt": "x", "step": 20}', JSON, 422),
        (b'{"prompt": "x", "base": {"id": "b", "fingerprint": "f"}}', JSON, 409),
        (b'{"prompt": "' + b"x" * 200_000 + b'"}', JSON, 413),
    ],
)
def test_bad_input(http: httpx.Client, content: bytes, headers: dict[str, str], status: int) -> None:
    reply = http.post("/generate", content=content, headers=headers)
    assert reply.status_code == status
    assert reply.json()["error"].keys() >= {"message", "type", "param", "code"}
    assert len(reply.headers.get_list("x-request-id")) == 1


def test_a_body_without_a_stated_length_is_bounded_too(http: httpx.Client) -> None:
    reply = http.post("/generate", content=(b" " * 10_000 for _ in range(100)), headers=JSON)
    assert reply.status_code == 413


def test_wrong_routes_and_methods_are_json_too(http: httpx.Client) -> None:
    assert http.get("/nowhere").json()["error"]["code"] == "route_not_found"
    assert http.get("/generate").json()["error"]["code"] == "method_not_allowed"


def test_more_than_is_accepted_gets_a_429_and_the_rest_is_served(service_url: str) -> None:
    def post(_: int) -> httpx.Response:
        made_anew = {"cache-control": "no-cache"}
        return httpx.post(f"{service_url}/generate", json={**APPLE, "steps": 20}, headers=made_anew, timeout=60)

    with ThreadPoolExecutor(max_workers=10) as pool:
        replies = list(pool.map(post, range(10)))
    refused = [reply for reply in replies if reply.status_code == 429]
    assert refused
    assert {reply.status_code for reply in replies} == {200, 429}
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert refused[0].json()["error"]["code"] == "overloaded"
    assert len({reply.json()["images"][0] for reply in replies if reply.status_code == 200}) == 1


def test_a_passed_deadline_is_a_504_that_asks_not_to_be_retried(http: httpx.Client) -> None:
    start = time.monotonic()
    reply = http.post("/generate", json=HEAVY)
    assert (reply.status_code, reply.headers["x-should-retry"]) == (504, "false")
    assert reply.json()["error"]["code"] == "deadline_exceeded"
    assert time.monotonic() - start < 15 + 4


def test_a_client_that_leaves_hurts_nobody(service_url: str, http: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service_url}/generate", json={**APPLE, "steps": 100}, timeout=0.3)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service_url}/generate", json=HEAVY, timeout=0.3)
    start = time.monotonic()  # the images of those who left are called off
    assert http.post("/generate", json=APPLE).status_code == 200
    assert time.monotonic() - start < 4
    half = socket.create_connection((urlsplit(service_url).hostname, urlsplit(service_url).port))
    half.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{")
    half.close()
    assert http.post("/generate", json=APPLE).status_code == 200


def test_answers_to_made_up_requests_are_as_documented(service_url: str) -> None:
    document = schemathesis.openapi.from_url(f"{service_url}/openapi.json")
    for found in document.get_all_operations():
        operation = found.ok()
        if not any(body.media_type == "application/json" for body in operation.body):
            continue

        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers_as_documented(case: schemathesis.Case) -> None:
            case.call_and_validate()

        answers_as_documented()


def test_a_port_in_use_is_one_sentence(service_url: str) -> None:
    port = urlsplit(service_url).port
    assert port is not None
    with pytest.raises(ConfigError, match=f"port {port} is in use on 127.0.0.1: stop what uses it or pass --port"):
        check_port("127.0.0.1", port)
    with (
        pytest.raises(ConfigError, match="is in use"),
        running_service(ServeSettings.model_validate({"port": port})),
    ):
        pass
