"""What the serving plane promises, seen on a running service: real Ray, real HTTP, emojixl on two CPU cores.

make bench-fleet ARGS="mixed push slow kill scale"      or one of them

mixed   1,000 requests for 20 adapters (Zipf, s = 1.1) on 2 replicas with 4 slots each: every image is compared with
        what one thread alone makes, and the slots' hit rate with that of routing at random and to the least busy
push    adapters that are pushed under load, and used by name in the next request
slow    an S3 from which an adapter takes 5 seconds: what requests for adapters that are here take meanwhile
kill    kill -9 of a replica under load: jobs finish, requests finish or get a 503
scale   one replica to three and back, by a step in load
"""

import argparse
import asyncio
import hashlib
import io
import itertools
import json
import os
import random
import re
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from service import Service, free_port, running_service
from slow_store import BUCKET, slow_s3

from lorafleet.client import AsyncClient
from lorafleet.core.errors import LorafleetError, NotReady, Overloaded
from lorafleet.core.generation import AdapterUse, GenerationRequest
from lorafleet.core.recipe import extract
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.pipeline import Pipeline

ADAPTERS, SKEW, SEEDS = 20, 1.1, 5
SLOTS = 4
ENGINE = {"exact_jobs": 4, "bank": {"slots": SLOTS, "max_rank": 8}}
ADMIN_KEY = "of-a-service-that-lives-for-minutes"
SMALL: dict[str, Any] = {"width": 64, "height": 64}  # where many requests say more than large ones
DOWNLOAD_S = 5.0  # of an adapter from a slow store
METRICS_S = 12.0  # after which Ray has exported what happened
Figures = dict[str, Any]


@dataclass(frozen=True)
class Running:
    service: Service
    metrics_url: str
    client: AsyncClient

    def total(self, name: str, **labels: str) -> float:
        """A metric's sum over all series that have these labels."""
        families = text_string_to_metric_families(httpx.get(self.metrics_url, timeout=10).text)
        samples = [sample for family in families for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == f"ray_lorafleet_{name}" and labels.items() <= sample.labels.items()
        )

    def replicas(self) -> list[psutil.Process]:
        """The replicas' processes."""
        found = []
        for process in psutil.Process(self.service.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if re.match(r"ray::ServeReplica:\w+:Replica", " ".join(process.cmdline())):
                    found.append(process)
        return found


@asynccontextmanager
async def serving(registry: str, *settings: str, retries: int = 0) -> AsyncIterator[Running]:
    port = free_port()
    given = [
        f"registry.url={registry}",
        "base.device=cpu",
        f"engine={json.dumps(ENGINE)}",
        "cache.max_bytes=0",
        "max_queued=1000",
        f"metrics_port={port}",
        f"admin_key={ADMIN_KEY}",
        "replica_cpus=0.5",
        *settings,
    ]
    with running_service(*itertools.chain.from_iterable(("--set", each) for each in given)) as service:
        async with AsyncClient(service.url, api_key=ADMIN_KEY, retries=retries) as client:
            yield Running(service, f"http://127.0.0.1:{port}/metrics", client)


@contextmanager
def fleet() -> Iterator[tuple[Registry, list[str]]]:
    """A registry with adapters that change images plainly, each in its own way."""
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder:
        registry = open_registry(RegistryConfig(url=f"{folder}/registry"))
        names = [f"style-{number:02}" for number in range(ADAPTERS)]
        for number, name in enumerate(names):
            registry.push(name, lora(Path(folder), number), check_against(TARGETS))
        yield registry, names


def lora(folder: Path, seed: int) -> Path:
    file = folder / f"{seed}.safetensors"
    write_adapter(random_adapter(TARGETS, seed), file)
    return file


def asked(name: str | None, seed: int, steps: int = 2, **more: Any) -> GenerationRequest:
    adapters = [] if name is None else [AdapterUse(name=name)]
    prompt = "a red apple on a blue background"
    return GenerationRequest(prompt=prompt, seed=seed, steps=steps, adapters=adapters, **more)


def pixels(png: bytes) -> str:
    return hashlib.sha256(Image.open(io.BytesIO(png)).convert("RGB").tobytes()).hexdigest()


async def mixed(requests: int, concurrency: int) -> Figures:
    with fleet() as (registry, names):
        rng = random.Random(0)  # noqa: S311 (no secret)
        weights = [1 / (place + 1) ** SKEW for place in range(ADAPTERS)]
        wanted = [(rng.choices(names, weights)[0], rng.randrange(SEEDS)) for _ in range(requests)]
        truth = alone(registry, sorted(set(wanted)))
        by_policy = {
            policy: await _mixed(registry, wanted, truth, concurrency, f"routing.policy={policy}")
            for policy in ("affinity", "least_busy", "random")
        }
    return {"different_images": len(set(truth.values())), **by_policy}


def alone(registry: Registry, wanted: list[tuple[str, int]]) -> dict[tuple[str, int], str]:
    """What one thread makes of each request, one after the other."""
    torch.set_num_threads(1)
    pipeline = Pipeline(load_base(BaseConfig(device="cpu")), EngineSettings.model_validate(ENGINE), registry)
    return {(name, seed): pixels(pipeline.generate(asked(name, seed, **SMALL)).images[0]) for name, seed in wanted}


async def _mixed(
    registry: Registry,
    wanted: list[tuple[str, int]],
    truth: dict[tuple[str, int], str],
    concurrency: int,
    *settings: str,
) -> Figures:
    versions = {name: registry.resolve(name).manifest.version for name, _ in wanted}
    async with serving(registry.url, "replicas=2", *settings) as running:

        async def one(name: str, seed: int) -> tuple[bool, float]:
            start = time.perf_counter()
            png = (await running.client.generate(asked(name, seed, **SMALL))).images[0]
            seconds = time.perf_counter() - start
            is_right = pixels(png) == truth[name, seed] and versions[name] in str(extract(png).adapters)
            return is_right, seconds

        start = time.perf_counter()
        done = await at_most(concurrency, [lambda name=name, seed=seed: one(name, seed) for name, seed in wanted])
        seconds = time.perf_counter() - start
        await asyncio.sleep(METRICS_S)
        hits = running.total("engine_slot_hits_total")
        fills = running.total("engine_slot_fill_seconds_count")
        choices = {
            choice: running.total("router_choices_total", choice=choice)
            for choice in ("slot", "host", "spread", "cold", "none")
        }
    latencies_s = sorted(seconds for _, seconds in done)
    return {
        "requests": len(done),
        "wrong_images": sum(not is_right for is_right, _ in done),
        "requests_per_s": round(len(done) / seconds, 1),
        "slot_hit_rate": round(hits / (hits + fills), 3),
        "slot_fills": fills,
        "router_choices": choices,
        "p50_s": round(statistics.median(latencies_s), 2),
        "p99_s": round(latencies_s[int(0.99 * len(latencies_s))], 2),
    }


async def push(requests: int, concurrency: int) -> Figures:
    """`requests`: adapters to push."""
    with fleet() as (registry, names), tempfile.TemporaryDirectory() as folder:
        files = {f"fresh-{number}": lora(Path(folder), 1000 + number) for number in range(requests)}
        async with serving(registry.url, "replicas=2") as running, httpx.AsyncClient(timeout=60) as http:
            failures: list[LorafleetError] = []

            async def load() -> None:
                for number in itertools.count():
                    try:
                        await running.client.generate(asked(names[number % ADAPTERS], number))
                    except LorafleetError as error:
                        failures.append(error)

            tasks = [asyncio.create_task(load()) for _ in range(concurrency)]
            await asyncio.sleep(5)
            pushing_s, first_s, known_s = [], [], []
            for name, file in files.items():
                start = time.perf_counter()
                reply = await http.post(
                    f"{running.service.url}/v1/adapters",
                    data={"name": name},
                    files={"file": file.read_bytes()},
                    headers={"authorization": f"Bearer {ADMIN_KEY}"},
                )
                reply.raise_for_status()
                pushing_s.append(time.perf_counter() - start)
                for seconds, use in ((first_s, name), (known_s, names[0])):
                    start = time.perf_counter()
                    png = (await running.client.generate(asked(use, 1))).images[0]
                    seconds.append(time.perf_counter() - start)
                    assert [each.name.partition("@")[0] for each in extract(png).adapters] == [use]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    later_s = [first - known for first, known in zip(first_s, known_s, strict=True)]
    return {
        "pushes": len(files),
        "failures_of_the_load": len(failures),
        "push_s": _spread(pushing_s),
        "first_use_s": _spread(first_s),
        "use_of_one_in_a_slot_s": _spread(known_s),
        "first_use_later_by_s": _spread(later_s),
    }


async def slow(requests: int, concurrency: int) -> Figures:
    """`requests`: while nothing is downloaded, and then more while `concurrency` adapters are on their way."""
    here, away = [f"here-{n}" for n in range(3)], [f"away-{n}" for n in range(concurrency)]
    with slow_s3("/adapters/away-", DOWNLOAD_S) as store, tempfile.TemporaryDirectory() as folder:
        registry = open_registry(RegistryConfig(url=f"s3://{BUCKET}/registry", endpoint_url=store.origin))
        for number, name in enumerate((*here, *away)):
            registry.push(name, lora(Path(folder), number), check_against(TARGETS))
        settings = (f"registry.endpoint_url={store.url}", "registry.fresh_s=3600", "replicas=2")
        async with serving(registry.url, *settings) as running:

            async def timed(name: str, seed: int) -> float:
                start = time.perf_counter()
                await running.client.generate(asked(name, seed))
                return time.perf_counter() - start

            for number in range(4):  # until both replicas have them
                await at_most(12, [lambda name=name, n=number: timed(name, n) for name in 4 * here])
            before_s = [await timed(here[number % len(here)], number) for number in range(requests)]
            downloads = [asyncio.create_task(first_use(running.service.url, name)) for name in away]
            await asyncio.sleep(0.5)
            meanwhile_s = []
            while not any(task.done() for task in downloads):
                meanwhile_s.append(await timed(here[len(meanwhile_s) % len(here)], len(meanwhile_s)))
            firsts = await asyncio.gather(*downloads)
    return {
        "downloads_at_once": len(away),
        "before_s": _spread(before_s),
        "meanwhile_s": {**_spread(meanwhile_s), "requests": len(meanwhile_s)},
        "first_use_of_those_on_their_way_s": _spread([seconds for seconds, _ in firsts]),
        "told_of_the_first": [name for name, _ in itertools.groupby(event["type"] for event in firsts[0][1])],
        "its_bytes_as_told": [event["done_bytes"] for event in firsts[0][1] if event["type"] == "downloading"],
    }


async def first_use(url: str, name: str) -> tuple[float, list[dict[str, Any]]]:
    """Seconds, and the events that were told."""
    start = time.perf_counter()
    headers, body = {"accept": "text/event-stream"}, asked(name, 0).model_dump()
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{url}/generate", json=body, headers=headers) as reply,
    ):
        lines = [line async for line in reply.aiter_lines()]
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert events[-1]["type"] == "done", events[-1]
    return time.perf_counter() - start, events


async def kill(requests: int, concurrency: int) -> Figures:
    """`requests`: jobs, and as many requests whose answers are waited for."""
    with fleet() as (registry, names):
        async with serving(registry.url, "replicas=2", "jobs.running=8") as running:
            outcomes: Counter[str] = Counter()

            async def one(number: int) -> None:
                try:
                    await running.client.generate(asked(names[number % ADAPTERS], number, steps=10))
                    outcomes["done"] += 1
                except (NotReady, Overloaded) as error:
                    outcomes[f"{error.code} (503, retryable)"] += 1
                except LorafleetError as error:
                    outcomes[f"{error.code}: {error.message}"] += 1

            jobs = [
                await running.client.submit(asked(names[number % ADAPTERS], number, steps=10))
                for number in range(requests)
            ]
            waiting = asyncio.create_task(at_most(concurrency, [lambda n=n: one(n) for n in range(requests)]))
            await asyncio.sleep(4)
            victim = running.replicas()[0]
            os.kill(victim.pid, signal.SIGKILL)
            killed_at = time.perf_counter()
            unready_s, ready_again_s = 0.0, None
            while ready_again_s is None and time.perf_counter() - killed_at < 120:
                if not await running.client.ready():
                    unready_s = time.perf_counter() - killed_at
                if len(running.replicas()) == 2 and running.total("replica_ready") == 2:
                    ready_again_s = time.perf_counter() - killed_at
                await asyncio.sleep(0.5)
            await waiting
            states = [await ended(running.client, job.id) for job in jobs]
            return {
                "requests": dict(outcomes),
                "jobs": dict(Counter(state.status for state in states)),
                "jobs_begun_anew": sum(state.retries for state in states),
                "most_retries_of_a_job": max(state.retries for state in states),
                "not_ready_for_s": round(unready_s, 1),
                "two_ready_replicas_after_s": ready_again_s and round(ready_again_s, 1),
            }


async def ended(client: AsyncClient, job_id: str) -> Any:
    while (state := await client.job(job_id)).status in ("queued", "running"):
        await asyncio.sleep(0.3)
    return state


async def scale(requests: int, concurrency: int) -> Figures:
    """`requests`: seconds of load."""
    scaling = {
        "min_replicas": 1,
        "max_replicas": 3,
        "backlog_s": 1.0,
        "upscale_delay_s": 2.0,
        "downscale_delay_s": 5.0,
    }
    with fleet() as (registry, names):
        async with serving(registry.url, f"scaling={json.dumps(scaling)}") as running:
            outcomes: Counter[str] = Counter()
            seen: list[tuple[float, int]] = []
            start = time.perf_counter()
            is_over = False

            async def load(number: int) -> None:
                while not is_over:
                    try:
                        await running.client.generate(asked(names[number % ADAPTERS], number, steps=10))
                        outcomes["done"] += 1
                    except LorafleetError as error:
                        outcomes[f"{error.code}: {error.message}"] += 1

            async def watch() -> None:
                while True:
                    count = len(running.replicas())
                    if not seen or seen[-1][1] != count:
                        seen.append((round(time.perf_counter() - start, 1), count))
                    await asyncio.sleep(0.5)

            watching = asyncio.create_task(watch())
            tasks = [asyncio.create_task(load(number)) for number in range(concurrency)]
            await asyncio.sleep(requests)
            is_over = True
            await asyncio.gather(*tasks)
            quiet_at = time.perf_counter() - start
            while seen[-1][1] > 1 and time.perf_counter() - start < quiet_at + 120:
                await running.client.generate(asked(names[0], 0))  # a trickle: none may fail while replicas go
                outcomes["done"] += 1
                await asyncio.sleep(1)
            watching.cancel()
    return {"outcomes": dict(outcomes), "replicas_at_s": seen, "load_ended_at_s": round(quiet_at, 1)}


async def at_most(concurrency: int, calls: list[Callable[[], Awaitable[Any]]]) -> list[Any]:
    places = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with places:
            return await call()

    return await asyncio.gather(*(one(call) for call in calls))


def _spread(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 3), "max": round(max(seconds), 3)}


SCENARIOS: dict[str, tuple[Callable[[int, int], Awaitable[Figures]], int, int]] = {
    "mixed": (mixed, 1000, 32),
    "push": (push, 10, 4),
    "slow": (slow, 30, 2),
    "kill": (kill, 24, 6),
    "scale": (scale, 60, 24),
}
TARGETS = base_targets(BaseConfig())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    parser.add_argument("--requests", type=int, help="instead of the scenario's own number")
    parser.add_argument("--concurrency", type=int, help="instead of the scenario's own number")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    figures = {}
    for name in options.scenarios:
        scenario, requests, concurrency = SCENARIOS[name]
        figures[name] = asyncio.run(scenario(options.requests or requests, options.concurrency or concurrency))
        print(json.dumps({name: figures[name]}, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
