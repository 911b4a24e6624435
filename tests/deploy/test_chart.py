"""What the chart renders: valid, acceptable to KubeRay, safe, and stable where a change would cost a GPU cluster."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import PROMISED, Chart, Object
from kuberay import problems

Rendered = Callable[[str], list[Object]]

# What a scanner such as kubesec or checkov would ask for and these pods do not have, with the reason.
EXPLAINED = {
    ("ray-head", "probes"): "KubeRay adds its own to Ray containers that have none",
    ("ray-worker", "probes"): "KubeRay adds its own to Ray containers that have none",
    ("ray-job-submitter", "probes"): "it runs to its end",
    ("weights", "probes"): "it runs to its end",
    ("generate", "probes"): "it runs to its end",
    ("serve-head", "token"): "the autoscaler in the head pod asks the API server for worker pods",
}


def kind(objects: list[Object], name: str) -> list[Object]:
    return [document for document in objects if document["kind"] == name]


def pods(document: Any) -> Iterator[tuple[dict[str, str], Object]]:
    """(labels, spec) of every pod and pod template within an object."""
    if isinstance(document, dict):
        if "containers" in document.get("spec", {}):
            yield document["metadata"].get("labels", {}), document["spec"]
        for value in document.values():
            yield from pods(value)
    if isinstance(document, list):
        for value in document:
            yield from pods(value)


def test_lint_is_strict_and_finds_nothing(chart: Chart) -> None:
    values = [word for name in PROMISED for word in ("--values", str(chart.ci(name)))]
    result = chart.run("lint", "--strict", str(chart.folder), *values[:2])
    assert result.returncode == 0, result.stdout
    assert "[WARNING]" not in result.stdout


def test_what_is_generated_from_the_values_and_the_chart_is_fresh(chart: Chart, repo: Path) -> None:
    for script in ("chart_docs.py", "manifests.py"):
        command = [sys.executable, str(repo / "scripts" / script), "--check"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", PROMISED)
def test_kuberay_accepts_the_promised_installs(rendered: Rendered, name: str) -> None:
    ray = [document for document in rendered(name) if document["apiVersion"].startswith("ray.io/")]
    assert [problems(document) for document in ray] == [[] for _ in ray]
    (service,) = kind(ray, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    assert yaml.safe_load(service["spec"]["serveConfigV2"])["proxy_location"] == "EveryNode"


def test_built_in_kinds_are_valid_on_the_oldest_version(rendered: Rendered, kube_tools: Path) -> None:
    sys.path.insert(0, str(kube_tools))
    from kube_objects import Validator  # type: ignore[import-not-found]

    validator = Validator("1.31")
    for name in PROMISED:
        for document in rendered(name):
            group = document["apiVersion"].split("/")[0]
            if "." not in group or (group.endswith(".k8s.io") and not group.startswith("gateway.")):
                wrong = validator.errors(validator.normalised(document), None)
                assert wrong == [], f"{name}: {document['kind']} {document['metadata']['name']}"


def findings(objects: list[Object]) -> Iterator[tuple[str, str]]:
    """(container or component, what is wrong) of the kind that policy scanners call high."""
    for document in objects:
        for labels, spec in pods(document):
            component = labels["app.kubernetes.io/component"]
            if spec.get("hostNetwork") or spec.get("hostPID") or spec.get("hostIPC"):
                yield component, "host namespaces"
            if any("hostPath" in volume for volume in spec.get("volumes", [])):
                yield component, "hostPath"
            if spec.get("automountServiceAccountToken") is not False:
                yield component, "token"
            if spec.get("enableServiceLinks") is not False:
                yield component, "service links"
            if spec["securityContext"].get("runAsNonRoot") is not True or spec["securityContext"]["runAsUser"] < 1:
                yield component, "root"
            for container in [*spec["containers"], *spec.get("initContainers", [])]:
                yield from ((container["name"], what) for what in container_findings(container))
            for container in spec["containers"]:
                if "readinessProbe" not in container or "livenessProbe" not in container:
                    yield container["name"], "probes"


def container_findings(container: Object) -> Iterator[str]:
    security, resources = container["securityContext"], container["resources"]
    if security.get("privileged") or security["allowPrivilegeEscalation"] or not security["runAsNonRoot"]:
        yield "privileges"
    if security["capabilities"] != {"drop": ["ALL"]}:
        yield "capabilities"
    if not security["readOnlyRootFilesystem"]:
        yield "root filesystem"
    if security["seccompProfile"] != {"type": "RuntimeDefault"}:
        yield "seccomp"
    if not {"cpu", "memory"} <= resources["requests"].keys() or "memory" not in resources["limits"]:
        yield "resources"
    if container["image"].endswith(":latest") or ":" not in container["image"].rpartition("/")[2]:
        yield "image"
    for variable in container.get("env", []):
        if "value" in variable and any(word in variable["name"] for word in ("PASSWORD", "SECRET", "TOKEN", "_KEY")):
            yield "secret in the clear"


def test_no_finding_of_a_policy_scan_is_unexplained(chart: Chart, rendered: Rendered) -> None:
    everything = {
        "redis": {"internal": {"enabled": True, "existingSecret": "redis"}},
        "ui": {"enabled": True},
        "train": {"jobs": [{"name": "a", "data": "s3://b/c"}]},
        "eval": {"jobs": [{"name": "a", "args": ["run"]}]},
        "serve": {"autoscaler": {"enabled": True}},
    }
    objects = [document for name in PROMISED for document in rendered(name)] + chart.render(everything)
    found = set(findings(objects))
    assert found == EXPLAINED.keys()
    assert not kind(objects, "Secret")
    assert not kind(objects, "ClusterRole")


def test_every_pod_is_denied_what_no_policy_allows(rendered: Rendered) -> None:
    for name in PROMISED:
        policies = kind(rendered(name), "NetworkPolicy")
        (deny,) = [policy for policy in policies if policy["metadata"]["name"].endswith("-deny")]
        assert "ingress" not in deny["spec"]
        selector = deny["spec"]["podSelector"]["matchLabels"].items()
        for labels, _ in pods(rendered(name)):
            assert selector <= labels.items()
        serving = [
            rule["ports"]
            for policy in policies
            for rule in policy["spec"].get("ingress", [])
            if not any("podSelector" in peer and "matchExpressions" in peer["podSelector"] for peer in rule["from"])
        ]
        assert {port["port"] for ports in serving for port in ports} <= {8000, 8080, 8265, 44217, 44227}
        for policy in policies:
            for rule in policy["spec"].get("ingress", []):
                if any(port["port"] == 8265 for port in rule.get("ports", [])):
                    assert rule["from"] == [
                        {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-operator"}}}
                    ]


def ray_service(objects: list[Object]) -> Object:
    (service,) = kind(objects, "RayService")
    return service


def test_the_autoscaler_is_held_to_the_same_security_and_sees_the_gpus(rendered: Rendered) -> None:
    cluster = ray_service(rendered("multi-gpu-s3"))["spec"]["rayClusterConfig"]
    options = cluster["autoscalerOptions"]
    assert (options["version"], options["securityContext"]["readOnlyRootFilesystem"]) == ("v2", True)
    (group,) = cluster["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 8)
    assert group["rayStartParams"] == {"num-gpus": "1"}
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert group["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_a_mig_slice_counts_as_a_gpu_of_ray(chart: Chart) -> None:
    values = yaml.safe_load(chart.ci("single-gpu").read_text())
    values["serve"]["worker"]["gpu"]["resource"] = "nvidia.com/mig-3g.40gb"
    (group,) = ray_service(chart.render(values))["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["rayStartParams"]["num-gpus"] == "1"
    assert group["template"]["spec"]["containers"][0]["resources"]["requests"]["nvidia.com/mig-3g.40gb"] == "1"


def test_fault_tolerance_takes_its_password_from_a_secret(rendered: Rendered) -> None:
    service = ray_service(rendered("ha"))
    options = service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == "redis.storage.svc:6379"
    assert options["redisPassword"] == {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    (pod,) = [spec for labels, spec in pods(service) if labels["app.kubernetes.io/component"] == "serve-worker"]
    environment = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
    jobs = "redis://:$(JOBS_REDIS_PASSWORD)@redis.storage.svc:6379/1"
    assert environment["LORAFLEET_JOBS__REDIS_URL"]["value"] == jobs
    assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]["value"] == "285"
    assert pod["terminationGracePeriodSeconds"] == 300


def test_another_version_of_the_chart_is_the_same_cluster(chart: Chart, tmp_path: Path) -> None:
    copy = tmp_path / "lorafleet"
    shutil.copytree(chart.folder, copy)
    text = (copy / "Chart.yaml").read_text()
    assert "version: 0.1.0" in text
    (copy / "Chart.yaml").write_text(text.replace("\nversion: 0.1.0", "\nversion: 0.2.7"))
    before = ray_service(chart.render(ci="ha"))
    after = ray_service(Chart(chart.helm, copy).render(ci="ha"))
    assert after["metadata"]["labels"]["helm.sh/chart"] == "lorafleet-0.2.7"
    assert json.dumps(before["spec"]) == json.dumps(after["spec"])


def test_adapters_and_limits_change_what_the_running_cluster_is_told_and_nothing_else(
    chart: Chart, rendered: Rendered
) -> None:
    values = yaml.safe_load(chart.ci("multi-gpu-s3").read_text())
    values["adapters"].append({"name": "sketch", "pin": False})
    values["serve"]["limits"] = {"maxQueued": 7, "requestTimeoutSeconds": 60}
    before, after = rendered("multi-gpu-s3"), chart.render(values)
    old, new = ray_service(before), ray_service(after)
    assert [o for o in before if o is not old] == [o for o in after if o is not new]
    old_config, new_config = (yaml.safe_load(service["spec"]["serveConfigV2"]) for service in (old, new))
    for service in (old, new):
        service["spec"] = {**service["spec"], "serveConfigV2": ""}
    assert json.dumps(old) == json.dumps(new)
    for deployment in new_config["applications"][0]["deployments"]:
        live = deployment.pop("user_config")
        assert live["max_queued"] == 7
        assert [adapter["name"] for adapter in live["preload"]] == ["plush@production", "sketch"]
    for deployment in old_config["applications"][0]["deployments"]:
        del deployment["user_config"]
    assert old_config == new_config


def test_a_changed_training_run_is_a_new_one(chart: Chart, rendered: Rendered) -> None:
    values = yaml.safe_load(chart.ci("multi-gpu-s3").read_text())
    values["train"]["jobs"][0]["settings"]["loop"]["steps"] = 3000
    old, new = (kind(objects, "RayJob") for objects in (rendered("multi-gpu-s3"), chart.render(values)))
    assert [a["metadata"]["name"] == b["metadata"]["name"] for a, b in zip(old, new, strict=True)] == [True, False]


def test_a_runs_words_reach_the_command_line_as_they_are(chart: Chart) -> None:
    values = {"eval": {"jobs": [{"name": "a", "args": ["show", "--note", "it's $HOME; rm -rf /"]}]}}
    (script,) = [o["data"]["run.sh"] for o in kind(chart.render(values), "ConfigMap") if "run.sh" in o["data"]]
    echoed = subprocess.run(
        ["bash", "-c", script.replace("exec lorafleet", "printf '%s\\n'")], capture_output=True, text=True, check=True
    )
    assert echoed.stdout.splitlines() == ["eval", "show", "--note", "it's $HOME; rm -rf /"]
