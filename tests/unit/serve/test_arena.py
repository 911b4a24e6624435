"""The arena over HTTP: blind pairs, votes, ratings, the export, and pairs made on the spot by two versions."""

import base64
import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from PIL import Image

from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.arena.records import Entrant
from lorafleet.core.arena.store import open_store
from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import BankConfig, EngineSettings
from lorafleet.serve.pipeline import Pipeline

KEY = "open-sesame-open-sesame"
ADMIN = {"authorization": f"Bearer {KEY}"}


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(text: str) -> str:
    with Image.open(io.BytesIO(base64.b64decode(text))) as image:
        assert image.info == {}
        return "red" if image.getpixel((0, 0)) == (255, 0, 0) else "blue"


def error(reply: Any) -> tuple[int, str, str | None]:
    found = reply.json()["error"]
    return reply.status_code, found["code"], found["param"]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/arena.sqlite"


@pytest.fixture
def http(make_app: Callable[..., FastAPI], client_of: Callable[[FastAPI], Any], url: str) -> Any:
    return client_of(make_app(arena={"url": url}, admin_key=KEY))


@pytest.fixture
def filled(url: str) -> str:
    """The store's URL, with one pair of a red picture by base and a blue one by plush@v1."""
    store = open_store(ArenaConfig(url=url))
    store.add("emoji", [Entrant("base", "a cat", 1, png("red"), 21.0), Entrant("plush@v1", "a cat", 1, png("blue"))])
    store.close()
    return url


def test_a_rater_compares_blind_and_the_vote_counts_for_the_version(http: Any, filled: str) -> None:
    reply = http.get("/v1/arena/pair")
    assert reply.headers["cache-control"] == "no-store"
    assert not [word for word in ("base", "plush", "v1", "red") if word in reply.text]
    pair = reply.json()
    assert {colour_of(pair["left"]), colour_of(pair["right"])} == {"red", "blue"}
    assert (pair["prompt"], pair["remaining"]) == ("a cat", 1)
    choice = "left" if colour_of(pair["left"]) == "blue" else "right"
    ballot = {"session": pair["session"], "pair": pair["pair"], "choice": choice}
    voted = http.post("/v1/arena/votes", json=ballot)
    assert (voted.status_code, voted.json()["choice"]) == (201, choice)
    assert error(http.post("/v1/arena/votes", json=ballot)) == (409, "already_voted", None)
    assert error(http.get(f"/v1/arena/pair?session={pair['session']}"))[:2] == (404, "pair_not_found")

    ratings = http.get("/v1/arena/ratings").json()
    assert [each["system"] for each in ratings["systems"]] == ["plush@v1", "base"]
    assert [(each["wins"], each["mean_clip"]) for each in ratings["systems"]] == [(1, None), (0, 21.0)]
    as_csv = http.get("/v1/arena/ratings?format=csv&pool=emoji")
    assert as_csv.headers["content-type"].startswith("text/csv")
    assert [row["system"] for row in csv.DictReader(io.StringIO(as_csv.text))] == ["plush@v1", "base"]

    assert error(http.get("/v1/arena/votes"))[:2] == (401, "invalid_admin_key")
    exported = http.get("/v1/arena/votes", headers=ADMIN)
    (row,) = csv.DictReader(io.StringIO(exported.text))
    assert (row[choice], row["winner"], row["prompt"]) == ("plush@v1", "plush@v1", "a cat")
    assert pair["session"] not in exported.text
    assert pair["pair"] not in exported.text  # who has yet to vote on it must not look it up


def test_what_is_wrong_is_named(http: Any, filled: str) -> None:
    nobody = "0" * 32
    pair = http.get("/v1/arena/pair").json()
    ballot = {"session": pair["session"], "pair": pair["pair"], "choice": "left"}
    for change, expected in (
        ({"choice": "middle"}, (422, "invalid_value", "choice")),
        ({"session": "me"}, (422, "invalid_value", "session")),
        ({"session": nobody}, (404, "session_not_found", "session")),
        ({"pair": nobody}, (404, "pair_not_found", "pair")),
        ({"winner": "base"}, (422, "invalid_value", "winner")),
    ):
        assert error(http.post("/v1/arena/votes", json={**ballot, **change})) == expected
    assert error(http.get("/v1/arena/pair?session=me")) == (422, "invalid_value", "session")
    assert error(http.get(f"/v1/arena/pair?session={nobody}")) == (404, "session_not_found", "session")
    assert error(http.get("/v1/arena/pair?pool=coco")) == (404, "pair_not_found", "pool")
    assert error(http.get("/v1/arena/ratings?format=xml")) == (422, "invalid_value", "format")
    assert error(http.get(f"/v1/arena/ratings?pool={'x' * 201}")) == (422, "invalid_value", "pool")


def test_a_store_that_is_not_there_is_a_503_and_an_empty_one_a_404(
    make_app: Callable[..., FastAPI], client_of: Callable[[FastAPI], Any], tmp_path: Path, http: Any
) -> None:
    assert error(http.get("/v1/arena/pair"))[:2] == (404, "pair_not_found")
    assert http.get("/v1/arena/ratings").json()["systems"] == []
    (tmp_path / "file").touch()
    broken = client_of(make_app(arena={"url": f"sqlite:///{tmp_path}/file/arena.sqlite"}))
    assert error(broken.get("/v1/arena/ratings"))[:2] == (503, "storage_unavailable")
    (tmp_path / "file").unlink()
    assert broken.get("/v1/arena/ratings").status_code == 200  # it is asked again


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipeline, Path, list[str]]]:
    """A pipeline, its registry's folder, and the versions that plush@split shares requests between."""
    folder = tmp_path_factory.mktemp("fleet")
    registry = open_registry(RegistryConfig(url=str(folder)))
    settings = EngineSettings(bank=BankConfig(slots=2, max_rank=8))
    pipeline = Pipeline(load_base(BaseConfig(device="cpu")), settings, registry).start()
    bank = pipeline.engine.bank
    assert bank is not None
    versions = []
    for seed in (1, 2):
        file = folder / "a.safetensors"
        adapter = random_adapter(bank.targets, seed, ranks=(2,), modules=r"unet\.mid.+attn[12].+", strength=2.0)
        write_adapter(adapter, file)
        with file.open("rb") as stream:
            versions.append(pipeline.push("plush", registry.hand_in(stream)).version)
    registry.alias("plush", "split", dict.fromkeys(versions, 1.0))
    yield pipeline, folder, versions
    pipeline.close()


def test_two_versions_of_a_split_draw_a_pair_and_the_vote_says_which(
    make_app: Callable[..., FastAPI],
    client_of: Callable[[FastAPI], Any],
    backend_of: Callable[[Pipeline], Any],
    split: tuple[Pipeline, Path, list[str]],
    url: str,
) -> None:
    pipeline, folder, versions = split
    app = make_app(backend=backend_of(pipeline), arena={"url": url}, registry={"url": str(folder)}, admin_key=KEY)
    http = client_of(app)
    asked = {"adapter": "plush@split", "prompt": "a red apple", "steps": 1, "seed": 3}
    reply = http.post("/v1/arena/pairs", json=asked)
    assert reply.status_code == 200, reply.text
    pair = reply.json()
    assert "plush" not in reply.text
    assert pair["left"] != pair["right"]
    vote = {"session": pair["session"], "pair": pair["pair"], "choice": "left"}
    assert http.post("/v1/arena/votes", json=vote).status_code == 201
    (row,) = csv.DictReader(io.StringIO(http.get("/v1/arena/votes?pool=live", headers=ADMIN).text))
    assert {row["left"], row["right"]} == {f"plush@{version[:12]}" for version in versions}
    reference = {"name": row["left"], "weight": 1.0}
    drawn = http.post("/generate", json={"prompt": "a red apple", "steps": 1, "seed": 3, "adapters": [reference]})
    named, shown = (
        Image.open(io.BytesIO(base64.b64decode(text))) for text in (drawn.json()["images"][0], pair["left"])
    )
    assert named.tobytes() == shown.tobytes()

    assert http.get("/v1/arena/pair").status_code == 404  # nobody else is shown it
    again = http.post("/v1/arena/pairs", json={**asked, "session": pair["session"]})
    assert again.json()["session"] == pair["session"]
    assert error(http.post("/v1/arena/pairs", json={**asked, "adapter": "plush"})) == (404, "pair_not_found", "adapter")
    assert error(http.post("/v1/arena/pairs", json={**asked, "adapter": "plish"}))[:2] == (404, "adapter_not_found")
