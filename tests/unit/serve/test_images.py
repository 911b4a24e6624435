"""Pictures in: JSON, OpenAI's forms and events, Hugging Face's shapes."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from PIL import Image

from lorafleet.core.recipe import extract

PROMPT = {"prompt": "red apple on a blue background"}
QUICK = {**PROMPT, "steps": 4, "seed": 7}


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def pixels(data: bytes) -> Any:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def picture() -> bytes:
    x, y = np.meshgrid(np.arange(128), np.arange(128))
    return png(Image.fromarray(np.stack([x * 2, y * 2, x + y], axis=-1).astype(np.uint8)))


@pytest.fixture(scope="module")
def left_half() -> bytes:
    mask = Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    return png(mask)


def error_of(reply: httpx.Response) -> tuple[int, object]:
    return reply.status_code, reply.json()["error"]["param"]


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.headers["content-type"].startswith("text/event-stream")
    blocks = [block.splitlines() for block in reply.text.strip().split("\n\n")]
    events = [json.loads(lines[-1].removeprefix("data: ")) for lines in blocks]
    assert [lines[0] for lines in blocks] == [f"event: {event.get('type', 'error')}" for event in events]
    return events


def test_an_image_from_a_picture_and_its_recipe(client: Any, picture: bytes) -> None:
    body = {**QUICK, "init_image": b64(picture), "strength": 0.5}
    made = client.post("/generate", json=body, headers={"accept": "image/png"}).content
    recipe = extract(made)
    assert recipe.start is not None
    assert recipe.start.strength == 0.5
    again = {**recipe.model_dump(mode="json"), "init_image": b64(picture)}
    assert client.post("/generate", json=again, headers={"accept": "image/png"}).content == made
    missing = client.post("/generate", json=recipe.model_dump(mode="json"))
    assert error_of(missing) == (422, "init_image")
    other = {**again, "init_image": b64(png(Image.new("RGB", (128, 128))))}
    assert error_of(client.post("/generate", json=other)) == (409, "init_image")


def test_strength_says_how_much_stays(client: Any, picture: bytes) -> None:
    def distance(strength: float) -> float:
        body = {**QUICK, "steps": 10, "init_image": b64(picture), "strength": strength}
        made = client.post("/generate", json=body, headers={"accept": "image/png"}).content
        return float(np.abs(pixels(made) - pixels(picture)).mean())

    assert distance(0.1) < distance(0.5) < distance(1.0)


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"mask": "aaaa"}, 422, "mask"),
        ({"strength": 0.5}, 422, "strength"),
        ({"init_image": "aaa"}, 422, "init_image"),
        ({"init_image": b64(b"no picture")}, 422, "init_image"),
        ({"init_image": ""}, 422, "init_image"),
        ({"init_image": 3}, 422, "init_image"),
        ({"init_image": "aaaa", "strength": 1.5}, 422, "strength"),
    ],
)
def test_bad_pictures_in_json(client: Any, more: dict[str, object], status: int, param: str) -> None:
    assert error_of(client.post("/generate", json={**QUICK, **more})) == (status, param)


def edit(client: Any, files: Any, **fields: object) -> httpx.Response:
    data = {**PROMPT, "num_inference_steps": "4", "seed": "7", **fields}
    reply: httpx.Response = client.post("/v1/images/edits", files=files, data=data)
    return reply


@pytest.mark.parametrize("name", ["image", "image[]"])
def test_an_edit_draws_only_where_the_mask_is_transparent(
    client: Any, picture: bytes, left_half: bytes, name: str
) -> None:
    files = [(name, ("a.png", picture, "image/png")), ("mask", ("m.png", left_half, "image/png"))]
    reply = edit(client, files, n="2", size="auto", response_format="b64_json").json()
    assert (len(reply["data"]), reply["size"]) == (2, "128x128")
    for image in reply["data"]:
        change = np.abs(pixels(base64.b64decode(image["b64_json"])) - pixels(picture)).mean(axis=2)
        assert change[:, 80:].mean() < 15 < change[:, :48].mean()


def test_an_edit_as_events(client: Any, picture: bytes) -> None:
    plain = edit(client, {"image": picture}, strength="0.9").json()
    events = events_of(edit(client, {"image": picture}, strength="0.9", stream="true", partial_images="1"))
    assert [event["type"] for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert events[-1]["b64_json"] == plain["data"][0]["b64_json"]


def test_a_generation_as_events(client: Any) -> None:
    body = {**PROMPT, "num_inference_steps": 8, "seed": 7, "size": "64x96", "quality": "high"}
    plain = client.post("/v1/images/generations", json=body).json()
    events = events_of(client.post("/v1/images/generations", json={**body, "stream": True, "partial_images": 3}))
    assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]
    for event in events:
        with Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))) as image:
            assert image.size == (64, 96)
        assert (event["size"], event["quality"], event["background"]) == ("64x96", "high", "opaque")
    assert events[-1]["b64_json"] == plain["data"][0]["b64_json"]
    assert events[-1]["usage"]["total_tokens"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"n": "0"}, 422, "n"),
        ({"n": "many"}, 422, "n"),
        ({"stream": "perhaps"}, 422, "stream"),
        ({"strength": "nan"}, 422, "strength"),
        ({"size": "1x1"}, 422, "size"),
        ({"size": "999x999"}, 422, "size"),
        ({"model": "gpt-image-1"}, 404, "model"),
        ({"nonsense": "1"}, 422, "nonsense"),
        ({"mask": "text"}, 422, "mask"),
        ({"prompt": ["a", "b"]}, 422, "prompt"),
    ],
)
def test_bad_fields_in_a_form(client: Any, picture: bytes, fields: dict[str, object], status: int, param: str) -> None:
    assert error_of(edit(client, {"image": picture}, **fields)) == (status, param)


def test_bad_files_in_a_form(client: Any, picture: bytes) -> None:
    assert error_of(edit(client, {"mask": picture})) == (422, "image")
    assert error_of(edit(client, [("image", picture), ("image[]", picture)])) == (422, "image")
    assert error_of(edit(client, {"image": picture, "other": picture})) == (422, "other")
    assert error_of(edit(client, {"image": b"no picture"})) == (422, "image")
    assert error_of(edit(client, {"image": picture, "mask": picture})) == (422, "mask")


def test_bodies_that_are_no_form(make_app: Callable[..., FastAPI], client_of: Any, picture: bytes) -> None:
    client = client_of(make_app(max_body_bytes=4096))
    path = "/v1/images/edits"
    assert client.post(path, json=PROMPT).status_code == 415
    for content, kind in (
        (b"nonsense", "multipart/form-data; boundary=x"),
        (b"--x\r\nbroken", "multipart/form-data; boundary=x"),
        (b"", "multipart/form-data"),
        (b"--x\r\n\r\nz\r\n--x--", "multipart/form-data; boundary=x; charset=zlib"),
    ):
        reply = client.post(path, content=content, headers={"content-type": kind})
        assert (reply.status_code, reply.json()["error"]["code"]) in ((400, "malformed_json"), (422, "invalid_value"))
    assert edit(client, {"image": b"x" * 5000}).status_code == 413
    assert edit(client, [("image", b"x")] * 21).status_code == 400


def test_hugging_faces_shapes(client: Any, picture: bytes) -> None:
    plain = client.post("/generate", json=QUICK, headers={"accept": "image/png"}).content
    parameters = {"num_inference_steps": 4, "seed": 7}
    reply = client.post("/models/emojixl", json={"inputs": PROMPT["prompt"], "parameters": parameters})
    assert (reply.content, reply.headers["content-type"]) == (plain, "image/png")
    expected = client.post("/generate", json={**QUICK, "init_image": b64(picture)}, headers={"accept": "image/png"})
    body = {"inputs": b64(picture), "parameters": {**parameters, **PROMPT}}
    assert client.post("/models/emojixl", json=body).content == expected.content
    body["parameters"]["target_size"] = {"width": 64, "height": 64}
    assert pixels(client.post("/models/emojixl", json=body).content).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("other/model", {"inputs": "x"}, 404, "model"),
        ("emojixl", {}, 422, "inputs"),
        ("emojixl", {"inputs": " "}, 422, "inputs"),
        ("emojixl", {"inputs": "x", "parameters": 3}, 422, "parameters"),
        ("emojixl", {"inputs": "x", "parameters": {"num_inference_steps": 0}}, 422, "parameters.num_inference_steps"),
        ("emojixl", {"inputs": "x", "parameters": {"width": 100}}, 422, "parameters.width"),
        ("emojixl", {"inputs": "x", "parameters": {"strength": 1}}, 422, "parameters.strength"),
        ("emojixl", {"inputs": "?", "parameters": {"prompt": "x"}}, 422, "inputs"),
    ],
)
def test_hugging_face_refusals(client: Any, path: str, body: dict[str, object], status: int, param: str) -> None:
    assert error_of(client.post(f"/models/{path}", json=body)) == (status, param)
