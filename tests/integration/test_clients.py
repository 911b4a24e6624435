"""Clients that others wrote, as they are: openai's and Hugging Face's."""

import base64
import io
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image

from lorafleet.core.generation import AdapterUse
from lorafleet.core.manifest import Manifest
from lorafleet.core.recipe import extract

PROMPT = "red apple on a blue background"
FRESH = {"cache-control": "no-cache"}  # made, not found
EXTRAS = {"seed": 7, "num_inference_steps": 4}


@pytest.fixture
def client(service_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service_url}/v1", api_key="none", max_retries=0, default_headers=FRESH)


@pytest.fixture(scope="module")
def picture(service_url: str) -> bytes:
    body = {"prompt": "yellow star", "steps": 8, "seed": 1}
    return httpx.post(f"{service_url}/generate", json=body, headers={"accept": "image/png"}).content


def decoded(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_openai_streams_partial_images(client: openai.OpenAI) -> None:
    reply = client.images.generate(prompt=PROMPT, extra_body=EXTRAS)
    assert reply.data
    stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=EXTRAS)
    events = list(stream)
    assert [type(event).__name__ for event in events] == ["ImageGenPartialImageEvent"] * 2 + ["ImageGenCompletedEvent"]
    for event in events:
        assert {name for name, part in type(event).model_fields.items() if part.is_required()} <= event.model_fields_set
        assert decoded(base64.b64decode(event.b64_json)).shape == (128, 128, 3)
        assert type(event).model_validate(event.model_dump()) == event
    assert events[-1].b64_json == reply.data[0].b64_json


def test_openai_edits(client: openai.OpenAI, picture: bytes) -> None:
    mask = Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    files = {"image": ("star.png", picture), "mask": ("mask.png", buffer.getvalue())}
    reply = client.images.edit(prompt=PROMPT, n=2, size="auto", extra_body=EXTRAS, **files)  # type: ignore[call-overload]
    assert len(reply.data) == 2
    change = np.abs(decoded(base64.b64decode(reply.data[0].b64_json)) - decoded(picture)).mean(axis=2)
    assert change[:, 80:].mean() < 10
    stream = client.images.edit(
        image=[("star.png", picture)],
        mask=("mask.png", buffer.getvalue()),
        prompt=PROMPT,
        stream=True,
        partial_images=1,
        extra_body=EXTRAS,
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert events[-1].b64_json == reply.data[0].b64_json


def test_openai_uses_adapters(client: openai.OpenAI, picture: bytes, adapter: Manifest) -> None:
    """As the model, or as an extra, which its forms write in a way of their own."""
    assert "bold" in [model.id for model in client.models.list()]
    extra: dict[str, Any] = {**EXTRAS, "adapters": [{"name": "bold", "weight": 0.5}]}
    replies = [
        client.images.generate(prompt=PROMPT, model="bold", extra_body=EXTRAS),
        client.images.generate(prompt=PROMPT, extra_body=extra),
        client.images.edit(image=("star.png", picture), prompt=PROMPT, model="bold", extra_body=EXTRAS),
        client.images.edit(image=("star.png", picture), prompt=PROMPT, extra_body=extra),
    ]
    for reply, weight in zip(replies, (1.0, 0.5, 1.0, 0.5), strict=True):
        assert reply.data
        recipe = extract(base64.b64decode(str(reply.data[0].b64_json)))
        assert recipe.adapters == [AdapterUse(name=f"bold@{adapter.version}", weight=weight)]
    with pytest.raises(openai.NotFoundError, match="bold"):
        client.images.generate(prompt=PROMPT, model="bald")


def test_openai_tells_what_is_wrong(client: openai.OpenAI, picture: bytes) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="image must be a whole PNG, JPEG or WebP picture"):
        client.images.edit(image=("x.png", b"no picture"), prompt="x")
    with pytest.raises(openai.UnprocessableEntityError, match="partial_images must be an integer from 0 to 3") as error:
        client.images.generate(prompt="x", stream=True, partial_images=9)
    assert error.value.param == "partial_images"
    with pytest.raises(openai.NotFoundError, match="known are emojixl"):
        client.images.edit(image=("x.png", picture), prompt="x", model="gpt-image-2")


@pytest.mark.parametrize(
    ("status", "headers", "tries"),
    [(429, {"retry-after": "0.01"}, 3), (503, {"retry-after": "0.01"}, 3), (504, {"x-should-retry": "false"}, 1)],
)
def test_openai_retries_what_we_tell_it_to(
    service_url: str, status: int, headers: dict[str, str], tries: int, count_tries: Callable[..., Any]
) -> None:
    """The headers are those that our errors carry (test_api); what the client makes of them is its own code."""
    http, seen = count_tries(status, headers)
    client = openai.OpenAI(base_url=f"{service_url}/v1", api_key="none", max_retries=2, http_client=http)
    with pytest.raises(openai.APIStatusError):
        client.images.generate(prompt="x")
    assert len(seen) == tries


@pytest.fixture
def count_tries() -> Callable[..., Any]:
    from openai import DefaultHttpxClient

    def make(status: int, headers: dict[str, str]) -> Any:
        seen: list[object] = []

        def answer(request: Any) -> Any:
            seen.append(request)
            error = {"message": "x", "type": "x", "param": None, "code": "x"}
            return transport.Response(status, headers=headers, json={"error": error}, request=request)

        transport = __import__(DefaultHttpxClient.__mro__[1].__module__.split(".")[0])
        return DefaultHttpxClient(transport=transport.MockTransport(answer)), seen

    return make


@pytest.fixture
def hugging_face(service_url: str, monkeypatch: pytest.MonkeyPatch) -> InferenceClient:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it would not call this machine either
    return InferenceClient(model=f"{service_url}/models/emojixl", token="none")


def test_hugging_face_text_to_image(hugging_face: InferenceClient, http: httpx.Client) -> None:
    image = hugging_face.text_to_image(PROMPT, num_inference_steps=4, seed=7, width=96, height=64, guidance_scale=4)
    assert image.size == (96, 64)
    body = {"prompt": PROMPT, "steps": 4, "seed": 7, "width": 96, "height": 64, "guidance_scale": 4}
    ours = http.post("/generate", json=body, headers={"accept": "image/png"}).content
    assert (np.asarray(image).astype(int) == decoded(ours)).all()
    assert extract(ours).width == 96


def test_hugging_face_uses_an_adapter(service_url: str, hugging_face: InferenceClient, adapter: Manifest) -> None:
    plain = hugging_face.text_to_image(PROMPT, num_inference_steps=2, seed=7)
    bold = InferenceClient(model=f"{service_url}/models/bold", token="none")
    assert bold.text_to_image(PROMPT, num_inference_steps=2, seed=7).tobytes() != plain.tobytes()


def test_hugging_face_image_to_image(hugging_face: InferenceClient, picture: bytes) -> None:
    image = hugging_face.image_to_image(picture, prompt=PROMPT, num_inference_steps=4, strength=0.5)
    assert image.size == (128, 128)
    change = np.abs(np.asarray(image).astype(int) - decoded(picture)).mean()
    assert 0 < change < 80


def test_hugging_face_tells_what_is_wrong(hugging_face: InferenceClient) -> None:
    with pytest.raises(HfHubHTTPError) as error:
        hugging_face.text_to_image(PROMPT, num_inference_steps=999)
    assert error.value.response.status_code == 422
    assert "num_inference_steps must be an integer from 1 to 150" in error.value.response.text
