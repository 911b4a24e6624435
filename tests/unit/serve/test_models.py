"""Adapters as OpenAI's models, and adapters in OpenAI's bodies: names and errors; images with adapters are made in
tests/integration."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image

from lorafleet.core.manifest import AdapterFacts, Manifest
from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.serve.pipeline import Pipeline


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "registry")


@pytest.fixture
def push(url: str, running_pipeline: Pipeline) -> Callable[..., Manifest]:
    """Puts an adapter in the registry; nobody opens its file here."""
    registry = open_registry(RegistryConfig(url=url))
    fits = running_pipeline.base.fingerprint

    def push(name: str, **facts: object) -> Manifest:
        known = {"format": "peft", "rank": 4, "modules": {"unet": 1}, "fits_fingerprint": fits, **facts}
        return registry.push(name, io.BytesIO(name.encode()), lambda _: AdapterFacts.model_validate(known))

    return push


@pytest.fixture
def http(make_app: Callable[..., FastAPI], client_of: Callable[[FastAPI], Any], url: str) -> Any:
    return client_of(make_app(registry={"url": url}))


def test_adapters_that_fit_are_listed_as_models(http: Any, push: Callable[..., Manifest]) -> None:
    manifest = push("tint")
    push("huge", rank=1024)
    push("foreign", base_fingerprint="0" * 64)
    base, tint = http.get("/v1/models").json()["data"]
    assert (base["id"], base["parent"]) == ("emojixl", None)
    created = int(manifest.pushed_at.timestamp())
    assert tint == {"id": "tint", "object": "model", "created": created, "owned_by": "lorafleet", "parent": "emojixl"}
    assert http.get("/v1/models/tint").json() == tint
    assert http.get("/v1/models/tint@latest").json() == {**tint, "id": "tint@latest"}


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("tnit", 404, "did you mean tint?"),
        ("tint@gone", 404, "tint has no alias gone"),
        ("Not/A/Name", 404, "known are emojixl and the adapters"),
        ("foreign", 409, "foreign was trained on another base"),
    ],
)
def test_a_model_that_cannot_be_served(
    http: Any, push: Callable[..., Manifest], model: str, status: int, words: str
) -> None:
    push("tint")
    push("foreign", base_fingerprint="0" * 64)
    shown = http.get(f"/v1/models/{model}")
    made = http.post("/v1/images/generations", json={"prompt": "x", "model": model})
    for reply in (shown, made):
        assert (reply.status_code, reply.json()["error"]["param"]) == (status, "model")
        assert words in reply.json()["error"]["message"]


def test_without_slots_the_base_is_the_only_model(
    make_app: Callable[..., FastAPI], client_of: Callable[[FastAPI], Any], url: str, push: Callable[..., Manifest]
) -> None:
    push("tint")
    http = client_of(make_app(registry={"url": url}, engine={"bank": None}))
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["emojixl"]
    assert http.get("/v1/models/tint").status_code == 404


def test_a_silent_registry_leaves_the_base(
    make_app: Callable[..., FastAPI], client_of: Callable[[FastAPI], Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    http = client_of(make_app(registry={"url": str(tmp_path / "file" / "registry")}))
    assert [card["id"] for card in http.get("/v1/models").json()["data"]] == ["emojixl"]
    assert http.get("/v1/models/tint").json()["error"]["code"] == "storage_unavailable"


GIVEN = [{"name": "tint", "weight": 0.5}, {"name": "none", "weight": 1}]
COLUMNS = {"adapters[][name]": ["tint", "none"], "adapters[][weight]": ["0.5", "1"]}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"adapters": json.dumps(GIVEN)}, 404, "adapters.1.name"),
        ({"adapters": [json.dumps(item) for item in GIVEN]}, 404, "adapters.1.name"),
        (COLUMNS, 404, "adapters.1.name"),
        ({"adapters[][name]": ["tint", "none"]}, 404, "adapters.1.name"),
        ({**COLUMNS, "adapters[][weight]": ["0.5"]}, 422, "adapters"),
        ({**COLUMNS, "adapters[][weight]": ["0.5", "9"]}, 422, "adapters.1.weight"),
        ({**COLUMNS, "adapters": json.dumps(GIVEN)}, 422, "adapters"),
        ({"adapters": "tint"}, 422, "adapters"),
        ({"adapters[][what]": "tint"}, 422, "adapters.0.name"),
    ],
)
def test_adapters_in_a_form(
    http: Any, push: Callable[..., Manifest], fields: dict[str, Any], status: int, param: str
) -> None:
    push("tint")
    picture = io.BytesIO()
    Image.new("RGB", (64, 64)).save(picture, "PNG")
    files = {"image": ("image.png", picture.getvalue())}
    reply = http.post("/v1/images/edits", data={"prompt": "x", **fields}, files=files)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param), reply.text


def test_adapters_in_json(http: Any, push: Callable[..., Manifest]) -> None:
    push("tint")
    reply = http.post("/v1/images/generations", json={"prompt": "x", "adapters": GIVEN})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "adapters.1.name")
