"""The API in this process over the real pipeline: all of the service but Ray."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import Metric, Recorder
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.serve.api import create_app
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Event
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.service import Backend
from lorafleet.serve.work import Work


class Kept:
    """A Recorder that keeps what it gets, by a metric and its labels' values in the declared order."""

    def __init__(self) -> None:
        self.counters = Counter[tuple[str, ...]]()
        self.gauges: dict[tuple[str, ...], float] = {}
        self.observed: dict[tuple[str, ...], list[float]] = {}

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        if amount:
            self.counters[self._key(metric, "counter", labels)] += amount  # type: ignore[assignment] # may be a float

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        self.gauges[self._key(metric, "gauge", labels)] = value

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        self.observed.setdefault(self._key(metric, "histogram", labels), []).append(value)

    @staticmethod
    def _key(metric: Metric, kind: str, labels: dict[str, str]) -> tuple[str, ...]:
        assert metric.kind == kind
        assert labels.keys() == set(metric.labels)
        return (metric.name.removeprefix("lorafleet_"), *(labels[label] for label in metric.labels))


@pytest.fixture
def kept() -> Kept:
    return Kept()


class LocalBackend:
    """One pipeline with its engine in a thread, as a replica has it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def model(self) -> ModelInfo:
        return self._pipeline.model

    def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        return self._pipeline.stream(work, deadline=time.monotonic() + timeout_s, is_detailed=is_detailed)

    async def push(self, name: str, handed_in: str) -> Manifest:
        return await asyncio.to_thread(self._pipeline.push, name, handed_in)

    is_asleep = False


@pytest.fixture(scope="session")
def manifest_of() -> Callable[[str, str], Manifest]:
    """Of an adapter that nobody looks into, by its name and version."""

    def make(name: str, version: str) -> Manifest:
        return Manifest(
            format="peft",
            rank=4,
            modules={"unet": 1},
            fits_fingerprint="f",
            name=name,
            version=version,
            size_bytes=1,
            pushed_at=datetime(2026, 1, 1, tzinfo=UTC),
        )

    return make


@pytest.fixture(scope="session")
def emojixl() -> Base:
    return load_base(BaseConfig(device="cpu"))


@pytest.fixture(scope="session")
def pipeline() -> Iterator[Pipeline]:
    """On a base of its own: an engine takes parts of its base over until it is closed."""
    pipeline = Pipeline(load_base(BaseConfig(device="cpu")))
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="session")
def running_pipeline() -> Iterator[Pipeline]:
    """Its engine has a thread and a base of its own."""
    pipeline = Pipeline(load_base(BaseConfig(device="cpu"))).start()
    yield pipeline
    pipeline.close()


@pytest.fixture
def backend_of() -> type[LocalBackend]:
    return LocalBackend


@pytest.fixture
def make_app(running_pipeline: Pipeline) -> Callable[..., FastAPI]:
    def make(recorder: Recorder | None = None, backend: Backend | None = None, **settings: object) -> FastAPI:
        """Without a cache, unless it is set: what a test asks for is made."""
        settings = {"cache": {"max_bytes": 0}, **settings}
        backend = backend or LocalBackend(running_pipeline)
        return create_app(ServeSettings.model_validate(settings), backend, recorder=recorder)

    return make


class Client:
    """httpx against an app in this process, for tests that are not async."""

    def __init__(self, app: FastAPI) -> None:
        self._transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.at_once(method, path, 1, **options)[0]

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)

    def at_once(self, method: str, path: str, times: int, **options: Any) -> list[httpx.Response]:
        async def send() -> list[httpx.Response]:
            async with httpx.AsyncClient(transport=self._transport, base_url="http://app", timeout=60) as client:
                return await asyncio.gather(*(client.request(method, path, **options) for _ in range(times)))

        return asyncio.run(send())


@pytest.fixture
def client_of() -> type[Client]:
    return Client


@pytest.fixture
def client(make_app: Callable[..., FastAPI]) -> Client:
    return Client(make_app())
