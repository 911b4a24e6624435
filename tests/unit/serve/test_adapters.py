"""The registry over HTTP: pushed, listed, shown, named, deleted; and the service while the registry is silent."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from lorafleet.core.errors import NotReady
from lorafleet.core.manifest import Manifest
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import Targets
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import BankConfig, EngineSettings
from lorafleet.serve.pipeline import PROGRESS_S, Pipeline

KEY = "open-sesame-open-sesame"
ADMIN = {"authorization": f"Bearer {KEY}"}
LIMIT = 2_000_000


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fleet") / "registry"


@pytest.fixture(scope="module")
def registry(url: Path) -> Registry:
    return open_registry(RegistryConfig(url=str(url)))


@pytest.fixture(scope="module")
def pipeline(registry: Registry) -> Iterator[Pipeline]:
    settings = EngineSettings(bank=BankConfig(slots=2, max_rank=8))
    pipeline = Pipeline(load_base(BaseConfig(device="cpu")), settings, registry).start()
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module")
def targets(pipeline: Pipeline) -> Targets:
    assert pipeline.engine.bank is not None
    return pipeline.engine.bank.targets


@pytest.fixture
def lora(targets: Targets, tmp_path: Path) -> Callable[[int], bytes]:
    def lora(seed: int) -> bytes:
        file = tmp_path / f"{seed}.safetensors"
        write_adapter(random_adapter(targets, seed, ranks=(2,), modules=r"unet\.mid.+attn[12].+", strength=2.0), file)
        return file.read_bytes()

    return lora


@pytest.fixture
def http(
    make_app: Callable[..., FastAPI],
    backend_of: Callable[[Pipeline], Any],
    client_of: Callable[[FastAPI], Any],
    pipeline: Pipeline,
    url: Path,
) -> Any:
    registry = {"url": str(url), "max_adapter_bytes": LIMIT}
    return client_of(make_app(backend=backend_of(pipeline), admin_key=KEY, registry=registry))


def push(http: Any, name: str, content: bytes) -> Any:
    return http.post("/v1/adapters", data={"name": name}, files={"file": content}, headers=ADMIN)


def image(http: Any, name: str | None = None) -> bytes:
    adapters = [] if name is None else [{"name": name}]
    asked = {"prompt": "a red apple", "seed": 1, "steps": 2, "width": 64, "height": 64, "adapters": adapters}
    reply = http.post("/generate", json=asked, headers={"accept": "image/png"})
    assert reply.status_code == 200, reply.text
    return bytes(reply.content)


def error(reply: Any) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_an_adapter_is_pushed_used_named_and_deleted(http: Any, lora: Callable[[int], bytes], url: Path) -> None:
    first, second = lora(1), lora(2)
    pushed = push(http, "plush", first)
    assert pushed.status_code == 201
    old = pushed.json()
    assert (old["name"], old["version"], old["rank"]) == ("plush", hashlib.sha256(first).hexdigest(), 2)
    drawn = image(http, "plush")
    assert drawn != image(http)
    new = push(http, "plush", second).json()
    assert image(http, "plush") != drawn
    assert image(http, f"plush@{old['version'][:8]}") != image(http, "plush")

    named = http.request(
        "PUT", "/v1/adapters/plush/aliases/production", json={"version": old["version"]}, headers=ADMIN
    )
    assert named.json() == {"name": "plush", "alias": "production", "versions": {old["version"]: 1.0}}
    shares = {"versions": {old["version"][:12]: 3, new["version"]: 1.0}}
    http.request("PUT", "/v1/adapters/plush/aliases/split", json=shares, headers=ADMIN)
    (entry,) = http.get("/v1/adapters").json()["data"]
    assert (entry["version"], entry["versions"]) == (old["version"], [new["version"], old["version"]])
    assert entry["aliases"] == {
        "latest": {new["version"]: 1.0},
        "production": {old["version"]: 1.0},
        "split": {old["version"]: 0.75, new["version"]: 0.25},
    }
    shown = http.get("/v1/adapters/plush@latest").json()
    assert shown["version"] == new["version"]
    assert [each["version"] for each in shown["versions"]] == entry["versions"]
    assert shown["aliases"] == entry["aliases"]

    assert error(http.request("DELETE", "/v1/adapters/plush", headers=ADMIN)) == (409, "adapter_in_use")
    for alias in ("production", "split"):
        gone = http.request("DELETE", f"/v1/adapters/plush/aliases/{alias}", headers=ADMIN)
        assert gone.json() == {"name": "plush", "alias": alias, "versions": {}}
    deleted = http.request("DELETE", f"/v1/adapters/plush@{old['version'][:8]}", headers=ADMIN)
    assert deleted.json() == {"deleted": [f"plush@{old['version']}"]}
    assert http.request("DELETE", "/v1/adapters/plush", headers=ADMIN).json() == {
        "deleted": [f"plush@{new['version']}"]
    }
    assert error(http.get("/v1/adapters/plush")) == (404, "adapter_not_found")
    assert not list(url.glob("incoming/*"))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (401, "invalid_admin_key")),
        ({"authorization": "Bearer open-sesame-open-sesamf"}, (401, "invalid_admin_key")),
        ({"authorization": f"Basic {KEY}"}, (401, "invalid_admin_key")),
    ],
)
def test_changes_need_the_admin_key(http: Any, headers: dict[str, str], expected: tuple[int, str]) -> None:
    for method, path in (
        ("POST", "/v1/adapters"),
        ("DELETE", "/v1/adapters/plush"),
        ("PUT", "/v1/adapters/plush/aliases/production"),
        ("DELETE", "/v1/adapters/plush/aliases/production"),
    ):
        reply = http.request(method, path, headers=headers)
        assert error(reply) == expected
        assert reply.headers["www-authenticate"] == "Bearer"
        assert KEY not in reply.text


def test_without_an_admin_key_adapters_are_not_changed_over_http(client: Any) -> None:
    reply = client.post("/v1/adapters", headers=ADMIN)
    assert error(reply) == (403, "admin_key_unset")
    assert "set admin_key" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("form", "expected", "words"),
    [
        ({"data": {"name": "x"}, "files": {"file": b"no safetensors"}}, (422, "adapter_unreadable"), "safetensors"),
        ({"data": {"name": "x"}, "files": {"file": bytes(LIMIT + 1)}}, (413, "adapter_too_large"), f"{LIMIT} bytes"),
        ({"data": {"name": "x"}, "files": {"file": bytes(2 * LIMIT)}}, (413, "adapter_too_large"), f"{LIMIT} bytes"),
        ({"data": {"name": "Not A Name"}, "files": {"file": b""}}, (422, "invalid_value"), "name must"),
        ({"data": {"name": "../x"}, "files": {"file": b""}}, (422, "invalid_value"), "name must"),
        ({"files": {"file": b""}}, (422, "invalid_value"), "name is missing"),
        ({"files": {"name": (None, "x")}}, (422, "invalid_value"), "file must be one file, got 0"),
        ({"files": [("name", (None, "x")), ("file", b"a"), ("file", b"b")]}, (422, "invalid_value"), "got 2"),
        ({"data": {"name": "x", "file": "text"}, "files": {"other": b""}}, (422, "invalid_value"), "file"),
        ({"json": {"name": "x"}}, (415, "unsupported_media_type"), "multipart/form-data"),
    ],
)
def test_a_bad_push_leaves_nothing(
    http: Any, url: Path, form: dict[str, Any], expected: tuple[int, str], words: str
) -> None:
    reply = http.post("/v1/adapters", headers=ADMIN, **form)
    assert error(reply) == expected
    assert words in reply.json()["error"]["message"]
    assert not list(url.glob("adapters/x*"))
    assert not list(url.glob("incoming/*"))


def test_an_adapter_of_another_architecture_is_refused(http: Any, targets: Targets, tmp_path: Path) -> None:
    import torch

    name = next(name for name in targets.linears if name.startswith("unet.mid"))
    made = Adapter({name: LowRank(torch.ones(2, 7), torch.ones(9, 2), 2.0)}, name="alien")
    write_adapter(made, tmp_path / "alien.safetensors")
    assert error(push(http, "alien", (tmp_path / "alien.safetensors").read_bytes())) == (409, "adapter_incompatible")


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("plush/aliases/latest", {"version": "abcdef"}, "latest is what was pushed last"),
        ("plush/aliases/abcdef", {"version": "abcdef"}, "not look like a version"),
        ("plush/aliases/x", {}, "give version or versions"),
        ("plush/aliases/x", {"version": "abcdef", "versions": {"abcdef": 1}}, "give version or versions"),
        ("plush/aliases/x", {"versions": {"abcdef": -1}}, "versions.abcdef"),
        ("Plush/aliases/x", {"version": "abcdef"}, "an adapter's name must match"),
    ],
)
def test_a_bad_alias(http: Any, path: str, body: dict[str, Any], words: str) -> None:
    reply = http.request("PUT", f"/v1/adapters/{path}", json=body, headers=ADMIN)
    assert reply.status_code == 422
    assert words in reply.json()["error"]["message"]


def test_a_silent_registry_degrades_the_service(
    make_app: Callable[..., FastAPI],
    backend_of: Callable[[Pipeline], Any],
    client_of: Callable[[FastAPI], Any],
    pipeline: Pipeline,
    tmp_path: Path,
) -> None:
    """A folder that is a file does not answer."""
    (tmp_path / "file").write_text("")
    http = client_of(
        make_app(backend=backend_of(pipeline), admin_key=KEY, registry={"url": str(tmp_path / "file" / "x")})
    )
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
    assert "registry" in ready.json()["reasons"][0]
    assert image(http)
    asked = {"prompt": "x", "adapters": [{"name": "plush"}]}
    assert error(http.post("/generate", json=asked)) == (503, "storage_unavailable")
    assert error(http.get("/v1/adapters")) == (503, "storage_unavailable")
    assert error(push(http, "plush", b"")) == (503, "storage_unavailable")


def test_what_is_resident_is_served_while_the_registry_is_silent(
    http: Any, lora: Callable[[int], bytes], url: Path
) -> None:
    push(http, "resident", lora(5))
    drawn = image(http, "resident")
    url.rename(url.with_name("away"))
    url.write_text("")
    try:
        assert image(http, "resident") == drawn
        assert http.get("/readyz").json()["status"] == "degraded"
    finally:
        url.unlink()
        url.with_name("away").rename(url)
    assert image(http, "resident") == drawn


def test_who_waits_for_a_download_is_told_and_holds_nobody_else_up(
    http: Any, lora: Callable[[int], bytes], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(http, "here", lora(6))
    size = push(http, "away", lora(7)).json()["size_bytes"]
    image(http, "here")
    begun, may_end, pull = threading.Event(), threading.Event(), registry.pull

    def slow(manifest: Manifest, **options: Any) -> Path:
        if manifest.name == "away" and not begun.is_set():
            options["on_progress"](size // 2, size)
            begun.set()
            assert may_end.wait(30)
        return pull(manifest, **options)

    monkeypatch.setattr(registry, "pull", slow)
    body = {"prompt": "x", "seed": 1, "steps": 1, "width": 64, "height": 64, "adapters": [{"name": "away"}]}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(http.post, "/generate", json=body, headers={"accept": "text/event-stream"})
        assert begun.wait(30)
        time.sleep(PROGRESS_S)  # until it is told
        for _ in range(3):
            image(http, "here")
        assert not waiting.done()
        may_end.set()
        lines = waiting.result().text.splitlines()
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert told[1] == {"type": "downloading", "adapter": "away", "done_bytes": size // 2, "total_bytes": size}
    names = [event["type"] for event in told if event["type"] != "downloading"]
    assert names == ["queued", "started", "step", "image", "done"]


def test_a_service_without_a_replica_is_ready_if_the_next_request_starts_one(
    make_app: Callable[..., FastAPI], client_of: Callable[[FastAPI], Any]
) -> None:
    class Asleep:
        is_asleep = True

        async def model(self) -> None:
            raise NotReady("asleep: asking would wake it")

    assert client_of(make_app(backend=Asleep())).get("/readyz").json() == {"status": "ready", "reasons": []}
