"""What the API and the engine's observer record, in this process; tests/integration reads what Ray makes of it."""

import asyncio
import hashlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, MutableMapping
from typing import Any

import pytest
import torch
from fastapi import FastAPI

from lorafleet.core.errors import AdapterUnreadable, GenerationFailed
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import IMAGES, MAX_COUNTED_ADAPTERS, REPLICA_READY
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora import Adapter
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.serve.api import create_app, error_body
from lorafleet.serve.config import EngineSettings, ServeSettings
from lorafleet.serve.engine import Engine, Job, JobAdapter, Observer
from lorafleet.serve.engine_metrics import EngineMetrics
from lorafleet.serve.events import Done, Event, Image, Queued
from lorafleet.serve.metrics import RayRecorder
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.service import Service
from lorafleet.serve.work import Work, WorkAdapter

MakeApp = Callable[..., FastAPI]
QUICK = {"prompt": "red apple", "steps": 2, "seed": 7}
EVENTS = {"accept": "text/event-stream"}
REQUESTS = "gateway_requests_total"


class Failing:
    """A backend that fails after a first word, or at once with something unforeseen."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model

    async def model(self) -> ModelInfo:
        return self._model

    async def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        if not is_detailed:
            raise RuntimeError("of its own")
        yield Queued()
        raise GenerationFailed("no image came out")


def test_each_request_is_counted_once_by_how_it_ended(make_app: MakeApp, client_of: Any, kept: Any) -> None:
    client = client_of(make_app(kept))
    assert client.post("/generate", json=QUICK).status_code == 200
    assert client.post("/generate", json={**QUICK, "width": 1}).status_code == 422
    assert client.request("BREW", "/generate").status_code == 405
    assert client.get("/none/such").status_code == 404
    for i in range(20):
        client.get(f"/v1/jobs/{i}")
    counted = {key: number for key, number in kept.counters.items() if key[0] == REQUESTS}
    assert counted == {
        (REQUESTS, "/generate", "POST", "200", "ok"): 1,
        (REQUESTS, "/generate", "POST", "422", "invalid_value"): 1,
        (REQUESTS, "/generate", "other", "405", "method_not_allowed"): 1,
        (REQUESTS, "unmatched", "GET", "404", "route_not_found"): 1,
        (REQUESTS, "/v1/jobs/{job_id}", "GET", "404", "job_not_found"): 20,
    }
    (seconds,) = kept.observed["gateway_request_seconds", "/generate", "POST", "ok"]
    assert 0.01 < seconds < 30
    assert kept.gauges["gateway_requests_in_flight",] == 0


def test_failures_inside_a_stream_and_of_our_own_are_failures(pipeline: Pipeline, client_of: Any, kept: Any) -> None:
    client = client_of(create_app(ServeSettings(), Failing(pipeline.model), recorder=kept))
    assert "no image came out" in client.post("/generate", json=QUICK, headers=EVENTS).text
    assert client.post("/generate", json=QUICK).status_code == 500
    assert kept.counters[REQUESTS, "/generate", "POST", "500", "generation_failed"] == 1
    assert kept.counters[REQUESTS, "/generate", "POST", "500", "internal_error"] == 1
    assert len(kept.observed["gateway_request_seconds", "/generate", "POST", "error"]) == 2


def test_a_client_that_left_is_no_failure_however_the_server_says_so(make_app: MakeApp, kept: Any) -> None:
    app = make_app(kept)
    left: list[Exception | None] = [None, ConnectionError("nobody listens any more")]  # a message of ASGI's; raised

    async def leave(error: Exception | None) -> None:
        stepped = asyncio.Event()
        body = {"type": "http.request", "body": json.dumps({**QUICK, "steps": 100}).encode(), "more_body": False}
        messages = iter([body])

        async def receive() -> dict[str, Any]:
            if (message := next(messages, None)) is not None:
                return message
            await stepped.wait()
            if error is not None:
                raise error
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if b"event: step" in message.get("body", b""):
                stepped.set()

        headers = [(b"accept", b"text/event-stream"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": headers}
        await app(scope, receive, send)

    async def check() -> None:
        for error in left:
            await leave(error)

    asyncio.run(check())
    assert kept.counters[REQUESTS, "/generate", "POST", "499", "cancelled"] == 2
    assert {key[-1] for key in kept.counters if key[0] == REQUESTS} == {"cancelled"}


def test_what_is_refused_says_why(make_app: MakeApp, client_of: Any, kept: Any) -> None:
    client = client_of(make_app(kept, max_queued=0, jobs={"max_waiting": 0}))
    replies = client.at_once("POST", "/generate", 3, json={**QUICK, "steps": 10})
    refused = sum(reply.status_code == 429 for reply in replies)
    assert refused >= 1
    assert kept.counters["gateway_rejections_total", "queue_full"] == refused
    assert client.post("/v1/jobs", json=QUICK).status_code == 429
    assert kept.counters["gateway_rejections_total", "jobs_full"] == 1


class Quick(Failing):
    """A backend that is done at once."""

    async def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        yield Image(0, 7, b"png")
        yield Done({}, [])


def test_the_versions_that_served_are_told_apart_up_to_a_number(
    pipeline: Pipeline, kept: Any, manifest_of: Callable[[str, str], Manifest]
) -> None:
    def work_with(number: int) -> Work:
        manifest = manifest_of(f"adapter-{number}", hashlib.sha256(str(number).encode()).hexdigest())
        request = GenerationRequest(prompt="x", width=64, height=64, seed=number)
        return Work(request, adapters=(WorkAdapter(manifest, 1.0),))

    async def ask() -> None:
        service = Service(ServeSettings(), Quick(pipeline.model), error_body, kept)
        for number in (*range(MAX_COUNTED_ADAPTERS + 5), 3, MAX_COUNTED_ADAPTERS):
            await service.generate(work_with(number))
        await service.close()

    asyncio.run(ask())
    uses = {key[1:]: count for key, count in kept.counters.items() if key[0] == "gateway_adapter_uses_total"}
    assert len(uses) == MAX_COUNTED_ADAPTERS + 3
    third = ("adapter-3", hashlib.sha256(b"3").hexdigest()[:12])
    assert (uses[*third, "ok"], uses[*third, "cached"]) == (1, 1)
    assert (uses["other", "other", "ok"], uses["other", "other", "cached"]) == (5, 1)
    assert kept.counters["gateway_cache_lookups_total", "hit"] == 2


def test_the_engine_tells_what_it_does(kept: Any) -> None:
    settings = {"exact": False, "row_buckets": (4, 8), "bank": {"slots": 1, "max_rank": 8, "host_bytes": 0}}
    engine = Engine(load_base(BaseConfig(device="cpu")), EngineSettings.model_validate(settings))
    assert engine.bank is not None
    targets = engine.bank.targets
    metrics = EngineMetrics(kept, engine.bank)
    engine.observe(metrics)

    def job(seed: int, adapter: int | None = None, **options: Any) -> Job:
        def load() -> Adapter:
            if adapter == 13:
                raise AdapterUnreadable("unlucky")
            return random_adapter(targets, 0, modules=r"unet\.mid.+attn1.+")

        request = GenerationRequest(prompt="x", width=64, height=64, steps=2)
        adapters = () if adapter is None else (JobAdapter(str(adapter), 1.0, load),)
        return Job(request, seed, adapters=adapters, **options)

    try:
        for jobs in ([job(0), job(1), job(2)], [job(3)], [job(4, 0)], [job(5, 0)], [job(6, 1)], [job(7, 13)]):
            for each in jobs:
                engine.submit(each)
            engine.run_until_idle()
        engine.submit(job(8)).cancel()
        engine.submit(job(9, deadline=0.0))
        engine.run_until_idle()
        metrics.sample()
        metrics.sample()
    finally:
        engine.close()
    images = {key[1]: count for key, count in kept.counters.items() if key[0] == "engine_images_total"}
    assert images == {"ok": 7, "adapter_unreadable": 1, "cancelled": 1, "deadline_exceeded": 1}
    assert kept.observed["engine_step_images",] == [3, 3, *[1] * 8]
    assert kept.observed["engine_step_occupancy_ratio",] == [6 / 8, 6 / 8, *[2 / 4] * 8]
    assert len(kept.observed["engine_step_seconds",]) == 10
    for stage in ("queue", "encode", "denoise", "decode"):
        assert len(kept.observed["engine_stage_seconds", stage]) == 7
    assert len(kept.observed["engine_slot_fill_seconds",]) == 2
    assert kept.counters["engine_slot_hits_total",] == 1
    assert kept.counters["engine_slot_evictions_total",] == 2
    assert kept.counters["engine_slot_fill_failures_total",] == 1
    assert kept.counters["engine_host_hits_total",] == 0
    assert kept.gauges["engine_slots", "total"] == 1
    assert kept.gauges["engine_resident_adapters", "slot"] == 0  # the unlucky one threw the last one out


def test_an_observer_that_fails_hurts_no_image(emojixl: Base, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Observer):
        def step_taken(self, seconds: float, images: int, rows: int, batch_rows: int) -> None:
            raise RuntimeError("of the observer")

    engine = Engine(emojixl)
    engine.observe(Broken())
    handle = engine.submit(Job(GenerationRequest(prompt="x", width=64, height=64, steps=3), 0))
    engine.run_until_idle()
    engine.close()
    assert handle.result(0).image.size == (64, 64)
    assert [record.message for record in caplog.records] == ["an observer of the engine failed; this is told only once"]


def test_a_measurement_that_fails_is_told_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    recorder = RayRecorder()
    sampled = threading.Event()
    recorder.sample(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    recorder.sample(sampled.set)
    recorder.add(IMAGES)  # its label is missing
    recorder.set(REPLICA_READY, 1.0)
    assert sampled.wait(10)
    recorder.close()
    assert [record.message for record in caplog.records] == ["a measurement failed; this is told only once"]


def test_compiled_graphs_are_counted(kept: Any) -> None:
    metrics = EngineMetrics(kept, None)
    metrics.sample()
    before = kept.gauges["engine_compiled_graphs",]
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    metrics.sample()
    assert kept.gauges["engine_compiled_graphs",] == before + 1
