import base64
import json
from collections.abc import Callable

import httpx
import pytest

from lorafleet.client import Client
from lorafleet.core import errors
from lorafleet.core.errors import LorafleetError, by_code
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import BaseRef, Recipe

URL = "http://127.0.0.1:8000"
ANSWER = {
    "id": "gen-1",
    "model": "emojixl",
    "images": [base64.b64encode(b"\x89PNG one").decode(), base64.b64encode(b"\x89PNG two").decode()],
    "seeds": [4, 5],
    "timings": {"total_s": 1.5},
    "warnings": ["the prompt was cut"],
}


def client(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    return Client(URL, transport=httpx.MockTransport(answer), api_key="secret", retries=0)


def test_generate_sends_the_request_and_decodes_the_images() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=ANSWER)

    with client(answer) as connected:
        result = connected.generate(GenerationRequest(prompt="a red apple 🍎", num_images=2, seed=4))
    assert (seen[0].method, seen[0].url.path) == ("POST", "/generate")
    assert seen[0].headers["authorization"] == "Bearer secret"
    body = json.loads(seen[0].content)
    assert GenerationRequest.model_validate(body) == GenerationRequest(prompt="a red apple 🍎", num_images=2, seed=4)
    assert "width" not in body
    assert result.images == [b"\x89PNG one", b"\x89PNG two"]
    assert (result.seeds, result.model, result.id) == ([4, 5], "emojixl", "gen-1")
    assert (result.timings, result.warnings) == ({"total_s": 1.5}, ["the prompt was cut"])


def test_a_recipe_is_sent_whole() -> None:
    recipe = Recipe(
        prompt="x",
        width=64,
        height=64,
        steps=1,
        guidance_scale=1.0,
        scheduler="lcm",
        seed=3,
        base=BaseRef(id="emojixl", fingerprint="f"),
        versions={},
    )

    def answer(request: httpx.Request) -> httpx.Response:
        assert Recipe.model_validate_json(request.content) == recipe
        return httpx.Response(200, json=ANSWER)

    assert client(answer).generate(recipe).seeds == [4, 5]


@pytest.mark.parametrize("kind", by_code().values(), ids=lambda kind: kind.__name__)
def test_each_error_of_the_server_comes_out_as_its_class(kind: type[LorafleetError]) -> None:
    fault = {"message": "steps must be less.", "type": "x", "param": "steps", "code": kind.code}
    with pytest.raises(LorafleetError) as raised:
        client(lambda _: httpx.Response(422, json={"error": fault})).models()
    assert type(raised.value) is kind
    assert (raised.value.message, raised.value.param) == ("steps must be less.", "steps")


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 1.0), (None, 1.0)])
def test_overload_says_when_to_come_back(header: str | None, seconds: float) -> None:
    fault = {"error": {"message": "full.", "code": "overloaded", "param": None, "type": "x"}}
    response = httpx.Response(429, json=fault, headers={"retry-after": header} if header else {})
    with pytest.raises(errors.Overloaded) as raised:
        client(lambda _: response).models()
    assert raised.value.retry_after_s == seconds


@pytest.mark.parametrize(
    ("response", "kind", "message"),
    [
        (httpx.Response(200, json={"images": []}), LorafleetError, "does not answer like a Lorafleet"),
        (httpx.Response(200, json={**ANSWER, "images": ["?"]}), LorafleetError, "does not answer like a Lorafleet"),
        (httpx.Response(200, text="<html>"), LorafleetError, "does not answer like a Lorafleet"),
        (httpx.Response(502, text="<html>bad gateway"), LorafleetError, "answered 502 Bad Gateway and no reason"),
        (httpx.Response(404, json={"detail": "Not Found"}), LorafleetError, "answered 404 Not Found"),
        (httpx.Response(500, json={"error": {"message": "x.", "code": "new"}}), LorafleetError, "x."),
        (httpx.Response(503, text="starting"), errors.NotReady, "is not ready (503 Service Unavailable)"),
    ],
)
def test_an_answer_that_is_not_ours(response: httpx.Response, kind: type[LorafleetError], message: str) -> None:
    with pytest.raises(kind) as raised:
        client(lambda _: response).generate(GenerationRequest(prompt="x"))
    assert message in raised.value.message


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (httpx.ConnectError("refused"), errors.NotReady, f"no Lorafleet at {URL}: is `lorafleet serve` running?"),
        (httpx.ReadTimeout("slow"), errors.DeadlineExceeded, f"no answer from {URL} within 600 s."),
        (httpx.RemoteProtocolError("cut off"), errors.NotReady, f"the connection to {URL} broke: cut off."),
    ],
)
def test_a_failing_connection_is_one_sentence(failure: Exception, kind: type[LorafleetError], message: str) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        raise failure

    with pytest.raises(kind) as raised:
        client(answer).generate(GenerationRequest(prompt="x"))
    assert raised.value.message == message


def test_no_exception_of_httpx_gets_through() -> None:
    """Every class of httpx that a request can raise is translated."""
    for kind in vars(httpx).values():
        if isinstance(kind, type) and issubclass(kind, httpx.TransportError):
            failure = kind("x")

            def answer(_: httpx.Request, failure: Exception = failure) -> httpx.Response:
                raise failure

            with pytest.raises(LorafleetError):
                client(answer).models()


def test_models_and_readiness() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "emojixl"}]})
        return httpx.Response(200 if request.url.path == "/readyz" else 404)

    assert client(answer).models() == ["emojixl"]
    assert client(answer).ready()
    assert not client(lambda _: httpx.Response(503, text="")).ready()


def test_a_port_nobody_listens_on_is_not_ready() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        with Client(f"http://127.0.0.1:{taken.getsockname()[1]}/") as connected:
            assert not connected.ready()
            with pytest.raises(errors.NotReady, match="is `lorafleet serve` running"):
                connected.models()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "", "http://", "localhost:8000"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(errors.ConfigError, match="must look like http://127.0.0.1:8000"):
        Client(url)
