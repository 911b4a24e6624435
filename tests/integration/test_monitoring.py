"""A real Prometheus on the running service: what dashboards show and alerts look at arrives."""

import concurrent.futures
import contextlib
import functools
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import monitor
import pytest
import yaml

from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.metrics import tell_scores
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.train.metrics import GAUGES, served_metrics

ELSEWHERE = {
    "kuberay_": "the KubeRay operator's, which runs in a cluster only",
    "ray_node_gpus_": "Ray tells it of machines with a GPU only",
    "ray_node_gram_": "Ray tells it of machines with a GPU only",
}
"""What no service on a machine without GPU can have, by how names begin, and why."""
RARE = {
    "ray_lorafleet_gateway_job_retries_total": "appears when a replica is lost",
    "ray_lorafleet_engine_slot_evictions_total": "appears when slots are short",
    "ray_lorafleet_engine_slot_fill_failures_total": "appears when a file cannot be used",
    "ray_lorafleet_engine_host_hits_total": "appears when an adapter comes back to a slot",
    'ray_lorafleet_replica_download_seconds_count{result="error"}': "appears when the registry fails",
    'ray_lorafleet_gateway_adapter_uses_total{namespace=~".*", service=~".*", result="error"}': "appears with an error",
}
"""Counters that Ray has only once they counted something (it takes no 0), and what a short load need not do."""
SETTLED_S = 120.0
APPLE = {"prompt": "red apple on a blue background", "steps": 2, "seed": 7}
SCORES = {"base": 70.0, "watched": 71.5}
UNSEEDED = {**APPLE, "seed": None}  # made anew each time, where one with a seed comes from the cache
BUSY = {**APPLE, "steps": 20}


class SilentFiles(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        return


class Prometheus:
    def __init__(self, address: str) -> None:
        self._http = httpx.Client(base_url=address)
        self.close = self._http.close

    def wait_until_ready(self) -> None:
        for _ in range(300):
            with contextlib.suppress(httpx.TransportError):
                if self._http.get("/-/ready").status_code == 200:
                    return
            time.sleep(0.1)
        raise AssertionError("Prometheus does not start")

    def get(self, path: str, **params: str) -> Any:
        reply = self._http.get(f"/api/v1/{path}", params=params)
        assert reply.status_code == 200, f"{params}: {reply.text}"
        return reply.json()["data"]

    def has(self, expr: str) -> bool:
        """Within the last half minute, as a graph would show it: of a node, Ray tells every five seconds only."""
        now = time.time()
        return bool(self.get("query_range", query=expr, start=str(now - 30), end=str(now), step="1")["result"])

    def value(self, expr: str) -> float:
        (one,) = self.get("query", query=expr)["result"]
        return float(one["value"][1])

    def own(self, name: str) -> float:
        """One of Prometheus's numbers about itself."""
        return float(re.search(rf"^{name} (\S+)$", self._http.get("/metrics").text, re.MULTILINE)[1])  # type: ignore[index]


@pytest.fixture(scope="module")
def prometheus(
    service_url: str,
    metrics_port: int,
    free_port: Callable[[], int],
    require: Callable[[str], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Prometheus]:
    program, folder = require("prometheus"), tmp_path_factory.mktemp("prometheus")
    train_port, port = free_port(), free_port()
    training = served_metrics(train_port)
    training.numbers(dict.fromkeys(GAUGES, 0.5), 1)
    scored = {name: SimpleNamespace(scores={"clip": SimpleNamespace(mean=mean)}) for name, mean in SCORES.items()}
    results: Any = SimpleNamespace(suite=SimpleNamespace(name="held-out"), systems=scored)
    tell_scores(results, EvalConfig(metrics_file=folder / "scores/metrics"))
    pages = functools.partial(SilentFiles, directory=str(folder / "scores"))
    scores = ThreadingHTTPServer(("127.0.0.1", 0), pages)  # in node_exporter's place
    threading.Thread(target=scores.serve_forever, daemon=True).start()
    config = folder / "prometheus.yaml"
    ports = [metrics_port, train_port, scores.server_port]
    config.write_text(yaml.safe_dump(monitor.prometheus_config(ports, "1s")))
    process = subprocess.Popen(monitor.prometheus_command(program, config, folder / "data", port))
    server = Prometheus(f"http://127.0.0.1:{port}")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()
        process.terminate()
        process.wait()
        training.close()
        scores.shutdown()
        scores.server_close()


@pytest.fixture(scope="module")
def adapter(service_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    targets = base_targets(BaseConfig())
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(random_adapter(targets, 1, modules=r"unet\.mid.+attn1.+"), file)
    open_registry(RegistryConfig()).push("watched", file, check_against(targets))
    return "watched"


def load(http: httpx.Client, adapter: str) -> None:
    """A bit of everything, for about a second."""
    for content, status in (
        (APPLE, 200),
        ({**UNSEEDED, "adapters": [{"name": adapter}]}, 200),
        ({**APPLE, "adapters": [{"name": "nobody"}]}, 404),
        ({**APPLE, "steps": 0}, 422),
    ):
        assert http.post("/generate", json=content).status_code == status
    http.post("/generate", json=APPLE, headers={"cache-control": "max-age=60"})
    job = http.post("/v1/jobs", json=APPLE).json()["id"]
    assert "event: done" in http.get(f"/v1/jobs/{job}/events").text
    with concurrent.futures.ThreadPoolExecutor(6) as clients:
        statuses = list(clients.map(lambda _: http.post("/generate", json=BUSY).status_code, range(6)))
    assert set(statuses) <= {200, 429, 504}


def substituted(expr: str) -> str:
    """A panel's query as Grafana sends it."""
    for name, value in {
        "$__rate_interval": "1m",
        "$namespace": ".*",
        "$service": ".*",
        "$suite": ".*",
        "$adapter": ".*",
    }.items():
        expr = expr.replace(name, value)
    assert "$" not in expr
    return expr


def watched(expr: str) -> str:
    """An alert's expression with a value whether it would fire or not: each comparison says 0 or 1, what is looked for
    in the past is looked for a second ago, and what should not be absent is counted."""
    parts = re.split(r"(\{[^}]*\})", expr)
    parts[::2] = [re.sub(r"(>=|<=|==|!=|>|<)", r"\1 bool", part) for part in parts[::2]]
    return re.sub(r"offset \d+[mdh]", "offset 1s", "".join(parts)).replace("absent(", "count(")


def excuse(expr: str) -> str | None:
    names = re.findall(r"[a-z_][\w:]*", expr.replace("(ray_)?", ""))
    for start, why in ELSEWHERE.items():
        if any(name.startswith(start) for name in names):
            return why
    return next((why for selector, why in RARE.items() if selector in expr), None)


def asked(repo: Path) -> dict[str, str]:
    """What each panel and each alert asks for."""
    files = repo / "deploy/helm/lorafleet/files"
    found = {}
    for board in sorted((files / "dashboards").glob("*.json")):
        for panel in json.loads(board.read_text())["panels"]:
            for target in panel.get("targets") or []:
                found[f"{board.stem}: {panel['title']} {target['refId']}"] = substituted(target["expr"])
    for file in sorted((files / "rules").glob("*.yaml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "alert" in rule:
                    found[rule["alert"]] = watched(rule["expr"])
    return found


def test_every_panel_and_every_alert_has_data(
    http: httpx.Client, prometheus: Prometheus, adapter: str, repo: Path
) -> None:
    missing = asked(repo)
    assert len(missing) > 100
    deadline = time.monotonic() + SETTLED_S
    while time.monotonic() < deadline:
        load(http, adapter)
        missing = {where: expr for where, expr in missing.items() if not prometheus.has(expr)}
        if all(excuse(expr) for expr in missing.values()):
            break
    assert {where: expr for where, expr in missing.items() if not excuse(expr)} == {}
    elsewhere = [expr for expr in missing.values() if excuse(expr) in ELSEWHERE.values()]
    assert len(elsewhere) <= 5  # two of KubeRay, three of GPUs


def test_rules_are_evaluated_and_scrapes_are_whole(prometheus: Prometheus) -> None:
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert {rule["health"] for rule in rules} == {"ok"}, [rule for rule in rules if rule["health"] != "ok"]
    assert {target["health"] for target in prometheus.get("targets")["activeTargets"]} == {"up"}
    # dropping WorkerId makes no two series one
    assert prometheus.own("prometheus_target_scrapes_sample_duplicate_timestamp_total") == 0
    assert not prometheus.has('{WorkerId!=""}')
    assert not prometheus.has('ALERTS{alertname="LorafleetNoData", alertstate="firing"}')


def test_what_clients_get_wrong_does_not_burn_the_budget(http: httpx.Client, prometheus: Prometheus) -> None:
    for _ in range(5):
        assert http.post("/generate", json={**APPLE, "steps": 0}).status_code == 422
    assert prometheus.value('sum(ray_lorafleet_gateway_requests_total{status=~"4.."})') > 0
    errors = prometheus.value('sum(rate(ray_lorafleet_gateway_requests_total{status=~"5.."}[5m])) or vector(0)')
    ratio = prometheus.value("lorafleet:request_errors:ratio_rate5m")
    assert ratio == pytest.approx(errors / prometheus.value("lorafleet:requests:rate5m"), abs=0.05)
