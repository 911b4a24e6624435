"""The chart, rendered by the real helm and installed into a stand-in for an API server."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from charts import Chart, Cluster, Object

STARTS_S = 120.0


@pytest.fixture(scope="session")
def chart(require: Callable[[str], str], repo: Path) -> Chart:
    return Chart(require("helm"), repo / "deploy" / "helm" / "lorafleet")


@pytest.fixture(scope="session")
def rendered(chart: Chart) -> Callable[[str], list[Object]]:
    """The objects of one of the promised installs."""
    return cache(lambda name: chart.render(ci=name))


@pytest.fixture(scope="session")
def kube_tools(require: Callable[[str], str]) -> Path:
    return Path(require("kube"))


@pytest.fixture(scope="session")
def cluster(chart: Chart, kube_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With KubeRay's, prometheus-operator's and the Gateway API's CRDs, at the newest version of Kubernetes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("cluster")
    config = folder / "kubeconfig"
    command = [sys.executable, "kube_emulator.py", "--port", str(port), "--kube-version", "1.37"]
    command += ["--crds", str(kube_tools.parent / "crds"), "--kubeconfig-out", str(config)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=kube_tools, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + STARTS_S
    try:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/version").close()
                break
            time.sleep(0.1)
        else:
            pytest.fail((folder / "log").read_text())
        yield Cluster(chart, url, {"KUBECONFIG": str(config), "NO_PROXY": "127.0.0.1", "HELM_CACHE_HOME": str(folder)})
    finally:
        process.terminate()
        process.wait()
