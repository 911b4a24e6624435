"""One service for the whole session: real Ray, real HTTP, the embedded base."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from lorafleet.client import Client
from lorafleet.core.manifest import Manifest
from lorafleet.sdxl.adapter_file import base_targets
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.launch import running_service

RAY_REPORTS_EVERY_MS = "RAY_metrics_report_interval_ms"
ADMIN_KEY = "open-sesame-open-sesame"
SETTINGS = {
    # By Ray's proxy, as in a cluster; the other way: tests/e2e, and all of these in `make nightly`.
    "direct_ingress": os.environ.get("SERVICE_WAY") == "direct",
    "max_queued": 2,
    "request_timeout_s": 15.0,
    "replica_cpus": 0.2,
    "max_body_bytes": 100_000,
    "admin_key": ADMIN_KEY,
}


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    def find() -> int:
        for port in random.sample(range(10_000, 32_000), 100):  # below where the kernel gives Ray's own ports from
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
                return port
        raise AssertionError("100 ports in use")

    return find


@pytest.fixture(scope="session")
def jobs(free_port: Callable[[], int]) -> Iterator[dict[str, object]]:
    """Settings that keep jobs in a Redis, if there is one on this machine; without, in memory."""
    server = shutil.which("redis-server")
    if server is None:
        yield {}
        return
    port = free_port()
    command = [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    yield {"redis_url": f"redis://127.0.0.1:{port}/0"}
    process.terminate()
    process.wait()


@pytest.fixture(scope="session")
def metrics_port(free_port: Callable[[], int]) -> int:
    return free_port()


class Collector:
    """Takes OTLP over HTTP: every span that came, with its service's name."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[tuple[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                sent = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for resource in sent.resource_spans:
                    (service,) = (a.value.string_value for a in resource.resource.attributes if a.key == "service.name")
                    collector.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="session")
def aws_credentials() -> Iterator[None]:
    """Any that moto's server takes; set before Ray starts, whose workers inherit them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "test"), ("SECRET_ACCESS_KEY", "test"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        yield


@pytest.fixture(scope="session")
def service_url(
    aws_credentials: None,
    free_port: Callable[[], int],
    metrics_port: int,
    jobs: dict[str, object],
    collector: Collector,
) -> Iterator[str]:
    os.environ[RAY_REPORTS_EVERY_MS] = "1000"  # instead of 10000; less it cannot be
    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "300"  # milliseconds until spans are sent
    own = {"port": free_port(), "metrics_port": metrics_port, "base": {"device": "cpu"}, "jobs": jobs}
    told = {"log_level": "info", "log_format": "json", "tracing": {"otlp_endpoint": collector.url}}
    settings = ServeSettings.model_validate({**SETTINGS, **own, **told})
    with running_service(settings) as address:
        yield address


@pytest.fixture(scope="session")
def http(service_url: str) -> Iterator[httpx.Client]:
    """What it asks for is made, not found."""
    with httpx.Client(base_url=service_url, timeout=60, headers={"cache-control": "no-cache"}) as client:
        yield client


@pytest.fixture(scope="session")
def admin(service_url: str) -> Iterator[Client]:
    """Our own client, which may change adapters."""
    with Client(service_url, api_key=ADMIN_KEY) as client:
        yield client


@pytest.fixture(scope="session")
def adapter(admin: Client, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """One that changes pictures plainly, pushed over HTTP."""
    file = tmp_path_factory.mktemp("adapter") / "bold.safetensors"
    write_adapter(
        random_adapter(base_targets(BaseConfig()), 5, ranks=(4,), modules=r"unet\..+attn[12].+", strength=2.0), file
    )
    return admin.adapters.push("bold", file)
