"""What Prometheus reads of the running service."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.core.metrics import ALL, REPLICA_LABEL
from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.launch import metrics_urls

APPLE = {"prompt": "red apple on a blue background", "steps": 2, "seed": 7}
HEAVY = {"prompt": "x", "steps": 150, "num_images": 4, "width": 256, "height": 256}
RAYS_OWN = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}
SETTLED_S = 15.0  # a report a second, and a gauge is sampled as often
Scrape = Callable[[], "Samples"]


class Samples:
    """What one scrape says of this project's metrics."""

    def __init__(self, text: str) -> None:
        self.families = {
            family.name: family
            for family in text_string_to_metric_families(text)
            if family.name.startswith("ray_lorafleet_")
        }

    def sum(self, name: str, **labels: str) -> float:
        """Over all series of that name that have these labels."""
        samples = [sample for family in self.families.values() for sample in family.samples]
        return sum(
            sample.value
            for sample in samples
            if sample.name == f"ray_lorafleet_{name}" and labels.items() <= sample.labels.items()
        )


@pytest.fixture
def scrape(service_url: str, metrics_port: int) -> Scrape:
    assert metrics_urls() == [f"http://127.0.0.1:{metrics_port}/metrics"]
    return lambda: Samples(httpx.get(metrics_urls()[0]).text)


@pytest.fixture(scope="module")
def pushed(service_url: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, int]:
    """An adapter's name, the first digits of its version, and its bytes."""
    targets = base_targets(BaseConfig())
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(random_adapter(targets, 0, modules=r"unet\.mid.+attn1.+"), file)
    manifest = open_registry(RegistryConfig()).push("measured", file, check_against(targets))
    return "measured", manifest.version[:12], manifest.size_bytes


def settled(scrape: Scrape, before: Samples, expected: Mapping[tuple[str, tuple[tuple[str, str], ...]], float]) -> None:
    """Waits until each series has grown by what is expected, and says which has not."""
    deadline = time.monotonic() + SETTLED_S
    while True:
        after = scrape()
        grown = {key: after.sum(key[0], **dict(key[1])) - before.sum(key[0], **dict(key[1])) for key in expected}
        if grown == expected or time.monotonic() > deadline:
            assert grown == expected
            return
        time.sleep(0.3)


def series(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(labels.items())


def quiet(scrape: Scrape) -> Samples:
    """When what other tests did has arrived: nothing changes between two reports."""
    deadline = time.monotonic() + SETTLED_S
    before = scrape()
    while time.monotonic() < deadline:
        time.sleep(2.2)
        now = scrape()
        names = ("gateway_requests_total", "engine_images_total", "engine_step_seconds_count")
        if all(now.sum(name) == before.sum(name) for name in names):
            return now
        before = now
    raise AssertionError("the service does not come to rest")


def test_what_requests_do_is_counted(http: httpx.Client, scrape: Scrape, pushed: tuple[str, str, int]) -> None:
    name, version, size = pushed
    before = quiet(scrape)
    adapted = {**APPLE, "steps": 3, "num_images": 2, "adapters": [{"name": name}]}
    cacheable = {**APPLE, "seed": time.time_ns() % 2**32}
    events = {"accept": "text/event-stream"}

    assert http.post("/generate", json=adapted).status_code == 200
    assert http.post("/generate", json=adapted).status_code == 200
    for expected in ("miss", "hit"):
        reply = http.post("/generate", json=cacheable, headers={"cache-control": "max-age=60"})
        assert reply.headers["x-lorafleet-cache"] == expected
    assert http.post("/generate", json={**APPLE, "steps": 0}).status_code == 422
    assert http.post("/generate", json={**APPLE, "adapters": [{"name": "nobody"}]}).status_code == 404
    assert http.get("/nowhere").status_code == 404
    with http.stream("POST", "/generate", json=HEAVY, headers=events) as reply:
        assert any("event: step" in line for line in reply.iter_lines())  # and leaves
    job = http.post("/v1/jobs", json={**APPLE, "steps": 150, "num_images": 8}).json()["id"]
    while http.get(f"/v1/jobs/{job}").json()["progress"] == 0:
        time.sleep(0.02)
    http.delete(f"/v1/jobs/{job}")
    assert "event: done" in http.get(f"/v1/jobs/{http.post('/v1/jobs', json=APPLE).json()['id']}/events").text

    plain = {"route": "/generate", "method": "POST"}
    settled(
        scrape,
        before,
        {
            series("gateway_requests_total", **plain, status="200", outcome="ok"): 4,
            series("gateway_requests_total", **plain, status="422", outcome="invalid_value"): 1,
            series("gateway_requests_total", **plain, status="404", outcome="adapter_not_found"): 1,
            series("gateway_requests_total", **plain, status="499", outcome="cancelled"): 1,
            series("gateway_requests_total", route="unmatched", outcome="route_not_found"): 1,
            series("gateway_requests_total", route="/v1/jobs", method="POST", status="202"): 2,
            series("gateway_requests_total", route="/v1/jobs/{job_id}", method="DELETE", outcome="ok"): 1,
            series("gateway_request_seconds_count", **plain, result="ok"): 4,
            series("gateway_request_seconds_count", **plain, result="error"): 2,
            series("gateway_request_seconds_bucket", **plain, result="ok", le="300.0"): 4,
            series("gateway_adapter_uses_total", adapter=name, version=version, result="ok"): 2,
            series("gateway_cache_lookups_total", result="hit"): 1,
            series("gateway_cache_lookups_total", result="miss"): 1,
            series("gateway_jobs_accepted_total"): 2,
            series("gateway_jobs_ended_total", result="cancelled"): 1,
            series("gateway_jobs_ended_total", result="ok"): 1,
            # two with the adapter, one cacheable, one that was left, two jobs
            series("router_choices_total"): 6,
            series("router_choices_total", choice="none"): 4,
            series("router_choices_total", choice="cold"): 1,
            series("router_choices_total", choice="slot"): 1,
            series("replica_download_seconds_count", result="ok"): 1,
            series("replica_download_bytes_total"): size,
            series("engine_images_total", outcome="ok"): 2 + 2 + 1 + 1,
            series("engine_images_total", outcome="cancelled"): 4 + 8,
            series("engine_stage_seconds_count", stage="denoise"): 6,
            series("engine_slot_fill_seconds_count"): 1,
            series("engine_slot_hits_total"): 3,
            # and as of now
            series("gateway_requests_in_flight"): 0,
            series("replica_requests_in_flight"): 0,
            series("gateway_jobs", state="running"): 0,
            series("engine_resident_adapters", tier="slot"): 1,
        },
    )


def test_gauges_stay_and_everything_is_as_declared(
    http: httpx.Client, scrape: Scrape, pushed: tuple[str, str, int]
) -> None:
    time.sleep(4)  # longer than Ray keeps a gauge that nobody sets
    samples = scrape()
    assert samples.sum("replica_ready", replica="0") == 1
    assert samples.sum("engine_slots", state="total") == 8
    assert samples.sum("gateway_registry_silent") == 0
    assert samples.sum("engine_host_bytes") > 0
    declared = {f"ray_{metric.name.removesuffix('_total')}": metric for metric in ALL}
    assert samples.families.keys() <= declared.keys()
    for name, family in samples.families.items():
        metric = declared[name]
        assert (family.type, family.documentation) == (metric.kind, metric.description)
        labels = {label for sample in family.samples for label in sample.labels} - RAYS_OWN
        assert {label for label in labels if not label.startswith("otel_")} - {"le"} == {*metric.labels, REPLICA_LABEL}
        bounds = {float(sample.labels["le"]) for sample in family.samples if "le" in sample.labels}
        assert bounds - {float("inf")} == set(metric.buckets)
        assert {sample.labels[REPLICA_LABEL] for sample in family.samples} == {"0"}


def test_nobody_else_on_the_network_can_scrape(metrics_port: int, service_url: str) -> None:
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    if not tables[0].exists():
        pytest.skip("no /proc on this system")
    listening = [
        address
        for table in tables
        if table.exists()
        for _, address, _, state, *_ in (line.split() for line in table.read_text().splitlines()[1:])
        if state == "0A" and int(address.rpartition(":")[2], 16) == metrics_port
    ]
    assert listening == [f"0100007F:{metrics_port:04X}"]
