"""Requests per second and latency of one service: the pipeline in this process, then the same over HTTP.

`plane_p50_ms` is what HTTP, gateway, routing and the way to the replica and back add: a request's latency less the
`total_s` that the replica tells, seen by a client that does next to nothing itself (http.client of Python). Beside it
stand lorafleet.client, which adds its own time, the gateway alone (/healthz) and a question to a replica by Ray Serve
(/readyz). A service that is started here is measured twice: as it is, and with `direct_ingress=false` behind Ray's
proxy.

make bench-http ARGS="--requests 40 --concurrency 4 --steps 20"
"""

import argparse
import http.client
import json
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol
from urllib.parse import urlsplit

from service import running_service

from lorafleet.client import Client
from lorafleet.core.generation import GenerationRequest

WAYS = {"direct": "direct_ingress=true", "proxy": "direct_ingress=false"}
WITHOUT_WORK = 200  # requests for each of the paths that make no image


class Made(Protocol):
    """Images with the seconds that they took by stage, `total_s` all of them."""

    @property
    def timings(self) -> Mapping[str, float]: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--concurrency", type=int, default=4, help="clients over HTTP; one alone is measured too")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--url", help="a service that is running; left out: one is started and stopped")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    wanted = [
        GenerationRequest(prompt="a red apple on a blue background", seed=seed, steps=options.steps)
        for seed in range(options.requests)
    ]
    figures = {}
    if options.url is None:
        figures["in process, 1 at a time"] = measure(pipeline(), wanted, 1)
        for way, setting in WAYS.items():
            with running_service("--set", "cache.max_bytes=0", "--set", setting) as service:
                found = over_http(service.url, wanted, options.concurrency)
                figures |= {f"{name}, {way}": figure for name, figure in found.items()}
    else:
        figures |= over_http(options.url, wanted, options.concurrency)
    for name, figure in figures.items():
        print(f"{name:<40}" + "  ".join(f"{key} {value:.2f}" for key, value in figure.items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


def pipeline() -> Callable[[GenerationRequest], Made]:
    from lorafleet.sdxl.base import load_base
    from lorafleet.sdxl.config import BaseConfig
    from lorafleet.serve.pipeline import Pipeline

    return Pipeline(load_base(BaseConfig())).generate


def over_http(url: str, wanted: list[GenerationRequest], concurrency: int) -> dict[str, dict[str, float]]:
    figures = {path: without_work(url, path) for path in ("/healthz", "/readyz")}
    generate = plain(url)
    figures |= {f"HTTP, {n} at a time": measure(generate, wanted, n) for n in sorted({1, concurrency})}
    with Client(url) as client:
        return figures | {"lorafleet.client, 1 at a time": measure(client.generate, wanted, 1)}


def plain(url: str) -> Callable[[GenerationRequest], Made]:
    """Asks over one connection per thread."""
    kept = threading.local()

    def generate(request: GenerationRequest) -> Made:
        if not hasattr(kept, "connection"):
            kept.connection = connection_to(url)
        body = request.model_dump_json(exclude_defaults=True)
        kept.connection.request("POST", "/generate", body, {"content-type": "application/json"})
        reply = kept.connection.getresponse()
        content = json.load(reply)
        if reply.status != 200:
            raise SystemExit(f"{reply.status}: {content}")
        return SimpleNamespace(timings=content["timings"])

    return generate


def connection_to(url: str) -> http.client.HTTPConnection:
    address = urlsplit(url)
    return http.client.HTTPConnection(address.hostname or "", address.port)


def without_work(url: str, path: str) -> dict[str, float]:
    latencies_s = []
    connection = connection_to(url)
    for _ in range(WITHOUT_WORK + 1):  # the first one warms up
        start = time.perf_counter()
        connection.request("GET", path)
        reply = connection.getresponse()
        reply.read()
        latencies_s.append(time.perf_counter() - start)
        if reply.status != 200:
            raise SystemExit(f"{path}: {reply.status}")
    ordered_s = sorted(latencies_s[1:])
    return {
        "plane_p50_ms": 1000 * statistics.median(ordered_s),
        "plane_p95_ms": 1000 * ordered_s[int(0.95 * len(ordered_s))],
    }


def measure(
    generate: Callable[[GenerationRequest], Made], wanted: list[GenerationRequest], concurrency: int
) -> dict[str, float]:
    """Figures of all requests, after one that warms everything up."""
    generate(wanted[0])

    def timed(request: GenerationRequest) -> tuple[float, float]:
        """Seconds in all, and those of them that are not the replica's."""
        start = time.perf_counter()
        made = generate(request)
        seconds = time.perf_counter() - start
        return seconds, seconds - made.timings["total_s"]

    start = time.perf_counter()
    if concurrency == 1:
        # In a thread of its own torch would get a second OpenMP pool; both spin, and a step takes twice as long.
        times = list(map(timed, wanted))
    else:
        with ThreadPoolExecutor(concurrency) as pool:
            times = list(pool.map(timed, wanted))
    total_s = time.perf_counter() - start
    latencies_s, plane_s = sorted(seconds for seconds, _ in times), sorted(plane for _, plane in times)
    return {
        "requests/s": len(wanted) / total_s,
        "median_s": statistics.median(latencies_s),
        "p95_s": latencies_s[min(len(latencies_s) - 1, int(0.95 * len(latencies_s)))],
        "max_s": latencies_s[-1],
        "plane_p50_ms": 1000 * statistics.median(plane_s),
        "plane_p95_ms": 1000 * plane_s[min(len(plane_s) - 1, int(0.95 * len(plane_s)))],
    }


if __name__ == "__main__":
    main()
