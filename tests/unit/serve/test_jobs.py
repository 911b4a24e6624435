"""Jobs, idempotency keys and the cache, in this process; in memory, and in a real Redis if there is one."""

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from lorafleet.core.errors import JobNotFound, NotReady
from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import Unrecorded
from lorafleet.serve.api import create_app
from lorafleet.serve.cache import MemoryCache, RedisCache
from lorafleet.serve.config import CacheSettings, JobSettings, ServeSettings
from lorafleet.serve.events import Done, Event, Image, Started, Step
from lorafleet.serve.job_store import FIRST, Job, JobStore, MemoryJobs, RedisJobs
from lorafleet.serve.jobs import Jobs
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import GenerationResult, ModelInfo
from lorafleet.serve.work import Work

QUICK = {"prompt": "red apple", "steps": 4, "seed": 7}
SLOW = {"prompt": "x", "steps": 150, "num_images": 8, "width": 256, "height": 256}
Scenario = Callable[[httpx.AsyncClient], Awaitable[None]]


def play(app: FastAPI, scenario: Scenario) -> None:
    """Everything in one event loop, in which jobs go on between requests, from the app's start to its end."""

    async def main() -> None:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://app", timeout=60) as http,
        ):
            await scenario(http)

    asyncio.run(main())


@pytest.fixture(scope="module")
def redis_url(require: Callable[[str], str]) -> Iterator[str]:
    server = require("redis-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    process.terminate()
    process.wait()


@pytest.fixture(params=["memory", "redis"])
def stored(request: pytest.FixtureRequest) -> dict[str, object]:
    """The settings of jobs."""
    if request.param == "memory":
        return {}
    return {"redis_url": request.getfixturevalue("redis_url")}


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    for _ in range(600):
        job: dict[str, Any] = (await http.get(f"/v1/jobs/{job_id}")).json()
        if job["status"] not in ("queued", "running"):
            return job
        await asyncio.sleep(0.05)
    raise AssertionError(job)


def events_of(text: str) -> list[tuple[str, str, dict[str, Any]]]:
    blocks = [dict(line.split(": ", 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    return [(block["id"], block["event"], json.loads(block["data"])) for block in blocks if "data" in block]


def test_a_job_from_beginning_to_end(make_app: Callable[..., FastAPI], stored: dict[str, object]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        plain = (await http.post("/generate", json={**QUICK, "num_images": 2})).json()
        reply = await http.post("/v1/jobs", json={**QUICK, "num_images": 2, "previews": 1})
        job = reply.json()
        assert reply.status_code == 202
        assert reply.headers["location"] == f"/v1/jobs/{job['id']}"
        assert (job["status"], job["progress"], job["images"]) == ("queued", 0.0, [])
        events = events_of((await http.get(f"/v1/jobs/{job['id']}/events")).text)  # stays until the end
        names = [name for _, name, _ in events]
        assert (names[0], names[1], names[-1]) == ("queued", "started", "done")
        assert names.count("step") == 8
        assert len([1 for _, _, data in events if "preview" in data]) == 2
        middle = events[4][0]
        rest = await http.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": middle})
        assert events_of(rest.text) == events[5:]
        nothing = await http.get(f"/v1/jobs/{job['id']}/events", headers={"last-event-id": events[-1][0]})
        assert nothing.text == ""
        job = await ended(http, job["id"])
        assert (job["status"], job["progress"], job["retries"], job["error"]) == ("succeeded", 1.0, 0, None)
        assert [image["b64_json"] for image in job["images"]] == plain["images"]
        assert [image["seed"] for image in job["images"]] == plain["seeds"]
        assert job["timings"]["total_s"] > 0

    play(make_app(jobs=stored), scenario)


def test_a_job_is_called_off_within_a_step(
    make_app: Callable[..., FastAPI], running_pipeline: Pipeline, stored: dict[str, object]
) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        running = (await http.post("/v1/jobs", json=SLOW)).json()["id"]
        waiting = (await http.post("/v1/jobs", json=SLOW)).json()["id"]
        while (await http.get(f"/v1/jobs/{running}")).json()["progress"] == 0:
            await asyncio.sleep(0.02)
        for job_id in (waiting, running, running):
            assert (await http.delete(f"/v1/jobs/{job_id}")).json()["status"] == "cancelled"
        start = time.monotonic()
        while running_pipeline.engine._runs:
            assert time.monotonic() - start < 2
            await asyncio.sleep(0.01)
        for job_id in (waiting, running):
            last = events_of((await http.get(f"/v1/jobs/{job_id}/events")).text)[-1]
            assert last[1] == "cancelled"

    play(make_app(jobs={"running": 1, **stored}), scenario)


def test_bad_jobs(make_app: Callable[..., FastAPI]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        refused = await http.post("/v1/jobs", json={**QUICK, "width": 100})
        assert (refused.status_code, refused.json()["error"]["param"]) == (422, "width")
        for method, path in (("GET", "/v1/jobs/none"), ("GET", "/v1/jobs/x/events"), ("DELETE", "/v1/jobs/none")):
            reply = await http.request(method, path)
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "job_not_found")
        await http.post("/v1/jobs", json=SLOW)
        await asyncio.sleep(0.1)
        full = [await http.post("/v1/jobs", json=SLOW) for _ in range(2)][-1]
        assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
        assert int(full.headers["retry-after"]) >= 1

    play(make_app(jobs={"running": 1, "max_waiting": 1}), scenario)


class LosingBackend:
    """A replica that is lost as often as asked, after the first of two images."""

    def __init__(self, model: ModelInfo, losses: int) -> None:
        self._model, self._losses = model, losses
        self.calls = 0

    async def model(self) -> ModelInfo:
        return self._model

    async def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        self.calls += 1
        assert work.request.seed is not None
        yield Started(0)
        yield Step(0, 1, 1)
        yield Image(0, work.request.seed, b"first")
        if self.calls <= self._losses:
            raise NotReady("the replica went away")
        yield Image(1, work.request.seed + 1, b"second")
        yield Done({"total_s": 1.0}, [])

    async def push(self, name: str, handed_in: str) -> Manifest:
        raise AssertionError

    is_asleep = False


@pytest.mark.parametrize(("losses", "status", "calls"), [(0, "succeeded", 1), (1, "succeeded", 2), (2, "failed", 2)])
def test_a_lost_replica_s_job_is_begun_anew_once(
    running_pipeline: Pipeline, losses: int, status: str, calls: int
) -> None:
    backend = LosingBackend(running_pipeline.model, losses)

    async def scenario(http: httpx.AsyncClient) -> None:
        job_id = (await http.post("/v1/jobs", json={"prompt": "x", "num_images": 2})).json()["id"]
        job = await ended(http, job_id)
        assert (job["status"], job["retries"], backend.calls) == (status, min(losses, 1), calls)
        if status == "succeeded":
            assert [image["index"] for image in job["images"]] == [0, 1]
            assert job["images"][1]["seed"] == job["images"][0]["seed"] + 1
        else:
            assert job["error"]["code"] == "not_ready"

    play(create_app(ServeSettings(), backend), scenario)


def test_another_gateway_knows_jobs_and_goes_on_with_those_left_behind(
    make_app: Callable[..., FastAPI], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafleet.serve.job_store.LEASE_S", 1.0)
    monkeypatch.setattr("lorafleet.serve.jobs.LEASE_S", 1.0)
    monkeypatch.setattr("lorafleet.serve.jobs.LOOK_S", 0.2)
    left: dict[str, str] = {}

    async def first(http: httpx.AsyncClient) -> None:
        left["done"] = (await http.post("/v1/jobs", json=QUICK)).json()["id"]
        await ended(http, left["done"])
        left["open"] = (await http.post("/v1/jobs", json={**QUICK, "steps": 100})).json()["id"]
        await asyncio.sleep(0.2)

    async def second(http: httpx.AsyncClient) -> None:
        done = (await http.get(f"/v1/jobs/{left['done']}")).json()
        assert (done["status"], len(done["images"])) == ("succeeded", 1)
        assert (await ended(http, left["open"]))["status"] == "succeeded"

    play(make_app(jobs={"redis_url": redis_url}), first)
    play(make_app(jobs={"redis_url": redis_url}), second)


class Deaf(MemoryJobs):
    """Loses the first cancellation, as `asyncio.wait_for` of Python 3.11 may do in a store."""

    def __init__(self) -> None:
        super().__init__(JobSettings())
        self.lost = 0

    async def abandoned(self) -> list[Job]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.lost += 1
            if self.lost > 1:
                raise
        return []


def test_a_cancellation_that_a_store_loses_does_not_keep_the_gateway_from_closing() -> None:
    async def main() -> None:
        store = Deaf()
        jobs = Jobs(cast("Any", SimpleNamespace(recorder=Unrecorded())), JobSettings(), 1, store)
        jobs.look_for_abandoned()
        await asyncio.sleep(0.05)
        await asyncio.wait_for(jobs.close(), 4)
        assert store.lost == 1

    asyncio.run(main())


def test_no_redis_is_told_and_hurts_nobody_else(make_app: Callable[..., FastAPI]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/jobs", json=QUICK)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "not_ready")
        assert (await http.post("/generate", json=QUICK)).status_code == 200

    url = "redis://127.0.0.1:9/0"
    play(make_app(jobs={"redis_url": url}, cache={"redis_url": url}), scenario)


@pytest.fixture(params=["memory", "redis"])
def make_store(request: pytest.FixtureRequest) -> Callable[[], JobStore]:
    if request.param == "memory":
        return lambda: MemoryJobs(JobSettings())
    url = request.getfixturevalue("redis_url")
    return lambda: RedisJobs(JobSettings(redis_url=url))


def test_stores_behave_alike(make_store: Callable[[], JobStore]) -> None:
    async def main() -> None:
        store = make_store()
        job = Job(f"job-{time.time_ns()}", 5, {"request": {}})
        with pytest.raises(JobNotFound):
            await store.get(job.id)
        assert [await store.create(job) for _ in range(2)] == [True, False]
        assert await store.get(job.id) == job
        assert await store.read(job.id, FIRST, 0.0) == []
        waiting = asyncio.create_task(store.read(job.id, FIRST, 10.0))
        await asyncio.sleep(0.05)
        assert await store.append(job.id, {"type": "queued"})
        (first,) = await waiting
        assert first[1] == {"type": "queued"}
        assert [await store.attempt(job.id) for _ in range(2)] == [1, 2]
        await store.lease(job.id)
        assert job not in await store.abandoned()
        assert await store.append(job.id, {"type": "cancelled"})
        assert not await store.append(job.id, {"type": "done"})
        assert not await store.append(job.id, {"type": "step"})
        (last,) = await store.read(job.id, first[0], 0.0)
        assert last[1] == {"type": "cancelled"}
        start = time.monotonic()
        assert await store.read(job.id, last[0], 10.0) == []  # nothing will come
        assert time.monotonic() - start < 1
        await store.close()

    asyncio.run(main())


def test_memory_forgets_what_ended_and_only_that() -> None:
    async def main() -> None:
        now = 0.0
        store = MemoryJobs(JobSettings(ttl_s=10, max_bytes=100), clock=lambda: now)
        for name in ("a", "b", "c"):
            await store.create(Job(name, 0, {}))
        await store.append("b", {"type": "image", "png": "x" * 60})
        await store.append("b", {"type": "done"})
        await store.append("c", {"type": "image", "png": "x" * 60})
        await store.append("c", {"type": "done"})
        await store.get("a")
        with pytest.raises(JobNotFound):  # 120 bytes are too many: the one that ended first goes
            await store.get("b")
        await store.get("c")
        now = 11.0
        with pytest.raises(JobNotFound):
            await store.get("c")
        await store.get("a")

    asyncio.run(main())


# ---- one key is one request ----


def test_one_key_is_one_request(make_app: Callable[..., FastAPI]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        key = {"idempotency-key": "mine"}
        body = {"prompt": "x", "steps": 4}  # no seed: each would be another image
        replies = await asyncio.gather(*(http.post("/generate", json=body, headers=key) for _ in range(4)))
        replies.append(await http.post("/generate", json=body, headers=key))
        assert {reply.status_code for reply in replies} == {200}
        assert len({reply.json()["images"][0] for reply in replies}) == 1
        other = await http.post("/generate", json={**body, "steps": 5}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
        apart = await http.post("/generate", json=body, headers={**key, "authorization": "Bearer other"})
        assert apart.json()["images"] != replies[0].json()["images"]
        bad = await http.post("/generate", json=body, headers={"idempotency-key": "x" * 256})
        assert (bad.status_code, bad.json()["error"]["param"]) == (422, "idempotency-key")

    play(make_app(max_queued=0), scenario)


def test_a_key_whose_request_failed_is_free_again(make_app: Callable[..., FastAPI]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        key = {"idempotency-key": "mine"}
        late = await http.post("/generate", json=SLOW, headers=key)
        assert late.status_code == 504
        assert (await http.post("/generate", json=QUICK, headers=key)).status_code == 200

    play(make_app(request_timeout_s=0.5), scenario)


def test_one_key_is_one_job(make_app: Callable[..., FastAPI], stored: dict[str, object]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        key = {"idempotency-key": f"key-{time.time_ns()}"}
        body = {"prompt": "x", "steps": 2}
        jobs = [(await http.post("/v1/jobs", json=body, headers=key)).json()["id"] for _ in range(2)]
        assert jobs[0] == jobs[1]
        other = await http.post("/v1/jobs", json={**body, "steps": 3}, headers=key)
        assert (other.status_code, other.json()["error"]["code"]) == (409, "idempotency_conflict")
        assert (await ended(http, jobs[0]))["status"] == "succeeded"

    play(make_app(jobs=stored), scenario)


# ---- images made before ----


@pytest.mark.parametrize("where", ["memory", "redis"])
def test_what_was_made_with_a_seed_is_not_made_again(
    make_app: Callable[..., FastAPI], where: str, request: pytest.FixtureRequest
) -> None:
    cache = {"redis_url": request.getfixturevalue("redis_url")} if where == "redis" else {}

    async def scenario(http: httpx.AsyncClient) -> None:
        async def ask(headers: dict[str, str] | None = None, **more: object) -> tuple[str, str]:
            body = {"prompt": f"x {where}", "steps": 2, **more}
            reply = await http.post("/generate", json=body, headers=headers)
            return reply.headers["x-lorafleet-cache"], reply.json()["images"][0]

        first = await ask(seed=1)
        again = await ask(seed=1)
        assert (first[0], again[0], first[1] == again[1]) == ("miss", "hit", True)
        assert (await ask(seed=1, width=128))[0] == "hit"  # the base's own size
        for other in ({"seed": 2}, {"seed": 1, "steps": 3}, {"seed": 1, "guidance_scale": 4}, {}, {}):
            assert (await ask(**other))[0] == "miss"
        assert (await ask({"cache-control": "no-cache"}, seed=1))[0] == "miss"
        events = await http.post(
            "/generate", json={"prompt": f"x {where}", "steps": 2, "seed": 1}, headers={"accept": "text/event-stream"}
        )
        assert first[1] in events.text
        assert "event: step" not in events.text

    play(make_app(cache=cache), scenario)


def test_the_cache_can_be_off(make_app: Callable[..., FastAPI]) -> None:
    async def scenario(http: httpx.AsyncClient) -> None:
        for _ in range(2):
            assert (await http.post("/generate", json=QUICK)).headers["x-lorafleet-cache"] == "miss"

    play(make_app(cache={"max_bytes": 0}), scenario)


def test_memory_keeps_what_was_used_last() -> None:
    async def main() -> None:
        cache = MemoryCache(100)

        def result(size: int) -> GenerationResult:
            return GenerationResult([b"x" * size], [1], {})

        for name in ("a", "b"):
            await cache.put(name, result(40))
        await cache.get("a")
        await cache.put("c", result(40))
        await cache.put("huge", result(101))
        assert [name for name in ("a", "b", "c", "huge") if await cache.get(name)] == ["a", "c"]

    asyncio.run(main())


def test_a_broken_entry_is_no_entry(redis_url: str) -> None:
    async def main() -> None:
        cache = RedisCache(CacheSettings(redis_url=redis_url))
        await cache._redis.set("lorafleet:image:f", "{")
        assert await cache.get("f") is None
        await cache.close()

    asyncio.run(main())
