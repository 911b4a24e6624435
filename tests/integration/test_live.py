"""What changes while the service runs, by the way of `serve deploy` and KubeRay: a new file of Ray Serve's for the same
application. In a process of its own: one process has one Ray."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter

pytestmark = pytest.mark.nightly

APPLICATION = """
from lorafleet.serve.app import build
from lorafleet.serve.config import ServeSettings

def app(args):
    return build(ServeSettings.model_validate(args), replica_gpus=0, replica_threads=1)
"""
DEPLOY = """
import sys
from lorafleet.core.local_ray import prepare_local_ray
folder = prepare_local_ray()
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

port, metrics_port = map(int, sys.argv[1:])
ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=str(folder),
         _metrics_export_port=metrics_port)
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
for line in sys.stdin:
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate_json(line))
    print("taken", flush=True)
"""
ARGS = {
    "base": {"device": "cpu"},
    "cache": {"max_bytes": 0},
    "engine": {"bank": {"slots": 2, "max_rank": 8}},
    "drain_s": 300,
}
LONG = {"prompt": "red apple", "steps": 15}


@dataclass
class Deployed:
    process: subprocess.Popen[str]
    http: httpx.Client
    metrics_url: str

    def deploy(self, replicas: int, **live: object) -> None:
        deployments = [
            {"name": "Gateway", "user_config": live},
            {"name": "Replica", "user_config": live, "num_replicas": replicas},
        ]
        application = {"name": "lorafleet", "import_path": "live_app:app", "args": ARGS, "deployments": deployments}
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"applications": [application]}) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "taken\n"

    def processes(self, deployment: str) -> set[int]:
        pattern = rf"ray::ServeReplica:\w+:{deployment}"
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {child.pid for child in children if re.match(pattern, " ".join(child.cmdline()))}

    def reasons(self) -> list[str] | None:
        """Why it is degraded; None where it is not ready."""
        reply = self.http.get("/readyz")
        return reply.json()["reasons"] if reply.status_code == 200 else None

    def gauge(self, name: str, **labels: str) -> list[float]:
        """Of each replica."""
        families = text_string_to_metric_families(httpx.get(self.metrics_url, timeout=30).text)
        samples = [sample for family in families for sample in family.samples]
        return [
            sample.value
            for sample in samples
            if sample.name == f"ray_lorafleet_{name}" and labels.items() <= sample.labels.items()
        ]

    def statuses(self, count: int) -> Counter[int]:
        """How so many requests at a time end."""
        with ThreadPoolExecutor(count) as pool:
            return Counter(pool.map(lambda seed: self._status({**LONG, "seed": seed}), range(count)))

    def _status(self, body: dict[str, Any]) -> int:
        return self.http.post("/generate", json=body).status_code


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]) -> Iterator[Deployed]:
    folder = tmp_path_factory.mktemp("live")
    (folder / "live_app.py").write_text(APPLICATION)
    port, metrics_port = free_port(), free_port()
    environment = {**os.environ, "PYTHONPATH": str(folder), "RAY_metrics_report_interval_ms": "1000"}
    command = [sys.executable, "-c", DEPLOY, str(port), str(metrics_port)]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as http:
            service = Deployed(process, http, f"http://127.0.0.1:{metrics_port}/metrics")
            service.deploy(2)
            eventually(lambda: service.reasons() == [] and len(service.processes("Replica")) == 2)
            yield service
        assert process.stdin
        process.stdin.close()


def eventually(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if is_so():
                return
        except (httpx.HTTPError, psutil.NoSuchProcess):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_preload_and_limits_change_without_a_restart(deployed: Deployed, tmp_path: Path) -> None:
    targets = base_targets(BaseConfig())
    file = tmp_path / "adapter.safetensors"
    write_adapter(random_adapter(targets, 0, modules=r"unet\.mid.+attn1.+"), file)
    open_registry(RegistryConfig()).push("live", file, check_against(targets))
    before = deployed.processes("Replica"), deployed.processes("Gateway")
    assert deployed.statuses(8) == {200: 8}

    deployed.deploy(2, preload=[{"name": "live", "pin": True}, {"name": "nobody"}], max_queued=0)
    eventually(lambda: deployed.gauge("engine_slots", state="pinned") == [1, 1])
    eventually(lambda: bool(deployed.reasons()))
    assert "nobody is not preloaded" in str(deployed.reasons())
    assert deployed.statuses(8).keys() == {200, 429}

    deployed.deploy(2)
    eventually(lambda: deployed.gauge("engine_slots", state="pinned") == [0, 0] and deployed.reasons() == [])
    assert deployed.statuses(8) == {200: 8}
    assert (deployed.processes("Replica"), deployed.processes("Gateway")) == before


def test_a_replica_that_is_to_go_finishes_its_images(deployed: Deployed) -> None:
    with ThreadPoolExecutor(1) as pool:
        statuses = pool.submit(deployed.statuses, 12)
        eventually(lambda: min(deployed.gauge("replica_requests_in_flight")) > 0)
        deployed.deploy(1)
        eventually(lambda: len(deployed.processes("Replica")) == 1)
        assert statuses.result() == {200: 12}
    assert deployed.statuses(1) == {200: 1}
