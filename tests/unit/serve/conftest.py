"""The API in this process over the real pipeline: all of the service but Ray."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.serve.api import create_app
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import GenerationResult, ModelInfo


class LocalBackend:
    """One pipeline in one thread, as a replica has it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def model(self) -> ModelInfo:
        return self._pipeline.model

    async def generate(self, request: GenerationRequest, timeout_s: float) -> GenerationResult:
        deadline = time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: self._pipeline.generate(request, deadline=deadline))


@pytest.fixture(scope="session")
def emojixl() -> Base:
    return load_base(BaseConfig(device="cpu"))


@pytest.fixture(scope="session")
def pipeline(emojixl: Base) -> Pipeline:
    return Pipeline(emojixl)


@pytest.fixture
def make_app(pipeline: Pipeline) -> Callable[..., FastAPI]:
    def make(**settings: object) -> FastAPI:
        return create_app(ServeSettings.model_validate(settings), LocalBackend(pipeline))

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
