"""Systems that answer over HTTP: what they are asked, asked again, and what is said when they fail."""

import base64
import io
import json
from collections.abc import Callable

import httpx
import pytest
from PIL import Image

from lorafleet.core.errors import DataUnreadable, GenerationFailed, InvalidRequest, LorafleetError, NotReady
from lorafleet.core.generation import AdapterUse
from lorafleet.eval import endpoint as module
from lorafleet.eval.config import RunConfig
from lorafleet.eval.endpoint import Endpoint
from lorafleet.eval.plan import Job, Sampling
from lorafleet.eval.systems import System

JOB = Job("k" * 64, 0, 0, "a red apple", "", 7)
SAMPLING = Sampling(20, 5.0, "euler", 128, 128)
LORAFLEET = System("api", "lorafleet", "http://one", {}, uses=(AdapterUse(name="plush", weight=0.5),))
OPENAI = System("dalle", "openai", "http://one", {}, model="dall-e-3")

Handler = Callable[[httpx.Request], httpx.Response]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited for."""
    found: list[float] = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def picture(request: httpx.Request) -> httpx.Response:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "PNG")
    return httpx.Response(200, json={"data": [{"b64_json": base64.b64encode(stream.getvalue()).decode()}]})


def endpoint(system: System, handler: Handler, retries: int = 2) -> Endpoint:
    config = RunConfig(endpoint_retries=retries)
    return Endpoint(system, config, api_key="secret", transport=httpx.MockTransport(handler))


def test_a_lorafleet_gets_the_very_seed_and_sampling() -> None:
    asked: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return picture(request)

    drawn = endpoint(LORAFLEET, handler).draw(JOB, SAMPLING)
    assert drawn.image.getpixel((0, 0)) == (255, 0, 0)
    body = json.loads(asked[0].content)
    assert asked[0].headers["authorization"] == "Bearer secret"
    assert (body["prompt"], body["seed"], body["num_inference_steps"], body["size"]) == (
        "a red apple",
        7,
        20,
        "128x128",
    )
    assert body["adapters"] == [{"name": "plush", "weight": 0.5}]


def test_other_services_get_only_what_openai_knows() -> None:
    bodies: list[dict[str, object]] = []

    def handler(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return picture(request)

    endpoint(OPENAI, handler).draw(JOB, Sampling(20, 5.0, "euler", None, None))
    assert bodies == [{"prompt": "a red apple", "n": 1, "model": "dall-e-3", "response_format": "b64_json"}]


def test_a_busy_service_is_asked_again_when_it_says_so(waits: list[float]) -> None:
    answers = [httpx.Response(429, headers={"retry-after": "3"}), httpx.Response(503)]
    drawn = endpoint(LORAFLEET, lambda request: answers.pop(0) if answers else picture(request)).draw(JOB, SAMPLING)
    assert drawn.image.size == (4, 4)
    assert waits == [3.0, 6.0]


def _unreachable(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("connection refused")


@pytest.mark.parametrize(
    ("handler", "error", "says"),
    [
        (_unreachable, NotReady, "http://one cannot be reached: connection refused"),
        (
            lambda _: httpx.Response(400, json={"error": {"message": "no such size"}}),
            InvalidRequest,
            "400: no such size",
        ),
        (lambda _: httpx.Response(500, text="oops"), GenerationFailed, "500: oops"),
        (lambda _: httpx.Response(503), GenerationFailed, "503"),
        (lambda _: httpx.Response(200, json={"data": []}), DataUnreadable, "holds no picture"),
        (lambda _: httpx.Response(200, json={"data": [{"b64_json": "AAAA"}]}), DataUnreadable, "holds no picture"),
    ],
)
def test_a_failure_names_system_prompt_and_reason(handler: Handler, error: type[LorafleetError], says: str) -> None:
    with pytest.raises(error) as raised:
        endpoint(LORAFLEET, handler).draw(JOB, SAMPLING)
    assert raised.value.message.startswith("system api, prompt 'a red apple'")
    assert says in raised.value.message
    assert "secret" not in raised.value.message
