"""serveConfigV2 of the chart on a Ray without Kubernetes, handed over as KubeRay does it: by Ray's REST API."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from lorafleet.core.errors import ConfigError
from lorafleet.serve.deploy import app

STARTS_S = 240.0
IMAGE = {"prompt": "a red apple on a blue background", "seed": 1, "steps": 2}


def free_port() -> int:
    for port in random.sample(range(20_000, 32_000), 100):  # below are those that Ray gives its workers
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("100 ports in use")


@pytest.fixture
def config(repo: Path) -> dict[str, Any]:
    """Of the plain manifests, which are held to be the chart's elsewhere; only where it listens is our own."""
    manifest = repo / "deploy" / "k8s" / "overlays" / "cpu-demo" / "objects.yaml"
    documents = yaml.safe_load_all(manifest.read_text())
    (service,) = [document for document in documents if document["kind"] == "RayService"]
    found: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert found["http_options"] == {"host": "0.0.0.0", "port": 8000}
    found["http_options"] = {"host": "127.0.0.1", "port": free_port()}
    return found


@pytest.fixture
def ray_api() -> Iterator[httpx.Client]:
    """Ray's dashboard of a head node of our own, to which KubeRay speaks."""
    port = free_port()
    home = Path(os.environ["LORAFLEET_HOME"])
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus", "2"]
    command += ["--node-ip-address", "127.0.0.1", "--port", str(free_port()), "--dashboard-port", str(port)]
    command += ["--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())]
    command += ["--object-store-memory", str(256 << 20), "--temp-dir", str(home / "ray"), "--disable-usage-stats"]
    environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=STARTS_S) as client:
        try:
            wait_until(lambda: process.poll() is not None or client.get("/api/version").is_success)
            assert process.poll() is None
            yield client
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_until(holds: Any) -> None:
    deadline = time.monotonic() + STARTS_S
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if holds():
                return
        time.sleep(0.2)
    raise AssertionError("not in time")


def replicas(api: httpx.Client) -> dict[str, str]:
    """Deployment -> its replica's id, once the application runs."""
    seen: dict[str, str] = {}

    def is_running() -> bool:
        application = api.get("/api/serve/applications/").json()["applications"].get("lorafleet", {})
        assert application.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), application["message"]
        deployments = application.get("deployments", {})
        for name, deployment in deployments.items():
            seen[name] = " ".join(replica["replica_id"] for replica in deployment["replicas"])
        return application.get("status") == "RUNNING"

    wait_until(is_running)
    return seen


def put(api: httpx.Client, config: dict[str, Any]) -> None:
    answer = api.put("/api/serve/applications/", json=config)
    assert answer.is_success, answer.text


@pytest.mark.nightly
def test_the_charts_config_serves_and_adapters_and_limits_reach_the_same_replicas(
    config: dict[str, Any], ray_api: httpx.Client
) -> None:
    put(ray_api, config)
    before = replicas(ray_api)
    assert before.keys() == {"Gateway", "Replica"}
    with httpx.Client(base_url=f"http://127.0.0.1:{config['http_options']['port']}", timeout=60) as service:
        wait_until(lambda: service.get("/readyz").is_success)
        picture = service.post("/generate", json=IMAGE, headers={"accept": "image/png"})
        assert picture.content.startswith(b"\x89PNG")

        for deployment in config["applications"][0]["deployments"]:
            live = {"preload": [{"name": "plush", "pin": True}], "max_queued": 0, "request_timeout_s": 0.001}
            deployment["user_config"] = live
        put(ray_api, config)
        wait_until(lambda: "plush is not preloaded" in service.get("/readyz").text)
        assert service.post("/generate", json=IMAGE, headers={"cache-control": "no-cache"}).status_code in (429, 504)
    assert replicas(ray_api) == before


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"port": 8001}, "port has no place in args: http_options.port of this file says it"),
        ({"preload": []}, "preload has no place in args: user_config of the deployments Gateway and Replica says it"),
        ({"engine": {"max_bacth": 2}}, "unknown setting engine.max_bacth (from the arguments); did you mean engine."),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        app(args)
    assert caught.value.message.startswith(sentence)
