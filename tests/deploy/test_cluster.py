"""The chart in a cluster's stand-in, by the real helm and kubectl: strict schemas, waiting, changes and back."""

import json
import shutil
import time
from pathlib import Path

import pytest
from charts import PROMISED, Cluster

NAME = "demo-lorafleet"
BLOCKS_S = 3.0


@pytest.mark.parametrize("name", PROMISED)
def test_the_api_server_takes_every_object_of_the_promised_installs(cluster: Cluster, name: str) -> None:
    chart = cluster.chart
    cluster.helm(
        "install", "demo", str(chart.folder), "--values", str(chart.ci(name)), "-n", name, "--create-namespace"
    )
    assert [service["metadata"]["name"] for service in cluster.objects("RayService", name)] == [NAME]
    release = cluster.objects("Secret", name)
    assert sum(len(json.dumps(secret)) for secret in release) < 1 << 20


def test_plain_manifests_are_taken_too(cluster: Cluster, repo: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl beside helm")
    for overlay in ("cpu-demo", "gpu"):
        folder = repo / "deploy" / "k8s" / "overlays" / overlay
        result = cluster.run(kubectl, "apply", "--server-side", "--dry-run=server", "-k", str(folder))
        assert result.returncode == 0, result.stderr
        assert "rayservice.ray.io/lorafleet" in result.stdout


def test_install_waits_for_pictures_then_upgrade_test_rollback_and_uninstall(cluster: Cluster) -> None:
    chart, space = cluster.chart, ("-n", "life")
    values = ("--values", str(chart.ci("cpu-demo")), *space)
    wait = ("--wait", "--timeout", "60s")
    cluster.ready(NAME, "False")
    install = cluster.start("install", "demo", str(chart.folder), *values, "--create-namespace", *wait)
    deadline = time.monotonic() + 60
    while not cluster.objects("RayService", "life") and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(BLOCKS_S)
    assert install.poll() is None  # all is stored, and nothing is ready
    cluster.ready(NAME, "True")
    output, _ = install.communicate(timeout=60)
    assert install.returncode == 0, output
    assert "port-forward svc/demo-lorafleet-serve-svc 8000" in output

    cluster.helm("test", "demo", *space)
    (before,) = cluster.objects("RayService", "life")
    more = ("--set", "adapters[0].name=plush", "--set", "adapters[0].pin=true")
    cluster.helm("upgrade", "demo", str(chart.folder), *values, *more, *wait)
    (after,) = cluster.objects("RayService", "life")
    assert '"name":"plush"' in after["spec"].pop("serveConfigV2")
    assert after["spec"].items() < before["spec"].items()
    cluster.helm("rollback", "demo", "1", *space, *wait)
    (back,) = cluster.objects("RayService", "life")
    assert back["spec"] == before["spec"]

    cluster.helm("uninstall", "demo", *space, *wait)
    assert cluster.objects("RayService", "life") == []
    assert [o["metadata"]["name"] for o in cluster.objects("PersistentVolumeClaim", "life")] == [
        "demo-lorafleet-registry"  # adapters outlive the release
    ]


def test_an_install_that_does_not_get_ready_fails(cluster: Cluster) -> None:
    cluster.ready("late-lorafleet", "False")
    arguments = ("install", "late", str(cluster.chart.folder), "-n", "late", "--create-namespace")
    process = cluster.start(*arguments, "--wait", "--timeout", "4s")
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "late-lorafleet" in output
