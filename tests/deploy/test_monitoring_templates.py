"""What the chart makes of the rules, the dashboards and the monitor."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monitor
import pytest
import yaml

CHART = Path("deploy/helm/lorafleet")
OPERATOR = ("PodMonitor", "PrometheusRule")
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def render(repo: Path, require: Callable[[str], str]) -> Render:
    """The monitoring objects of `helm template` with these values, on a cluster that has these kinds."""
    helm = require("helm")

    def template(*values: str, kinds: tuple[str, ...] = OPERATOR) -> list[dict[str, Any]]:
        command = [helm, "template", "demo", str(repo / CHART), "--namespace", "ml", "--set", "monitoring.enabled=true"]
        command += ["--api-versions", "ray.io/v1", "--api-versions", "monitoring.coreos.com/v1"]
        for kind in kinds:
            command += ["--api-versions", f"monitoring.coreos.com/v1/{kind}"]
        for value in values:
            command += ["--set-json", value]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        objects = [each for each in yaml.safe_load_all(done.stdout) if each]
        return [
            each for each in objects if each["apiVersion"].startswith("monitoring") or "dashboard" in str(each)[:500]
        ]

    return template


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in objects if each["kind"] == kind]


def test_one_monitor_of_pods_and_none_of_services(render: Render) -> None:
    objects = render('monitoring.podMonitor.labels.release="prometheus"')
    assert of_kind(objects, "ServiceMonitor") == []
    (pods,) = of_kind(objects, "PodMonitor")
    assert pods["metadata"]["labels"]["release"] == "prometheus"
    assert [endpoint["port"] for endpoint in pods["spec"]["podMetricsEndpoints"]] == ["metrics", "as-metrics"]
    local = monitor.prometheus_config([1], "1s")["scrape_configs"][0]["metric_relabel_configs"]
    for endpoint in pods["spec"]["podMetricsEndpoints"]:
        rules = [{monitor._snake(key): value for key, value in rule.items()} for rule in endpoint["metricRelabelings"]]
        assert rules == local
        made = {rule["targetLabel"]: rule.get("replacement") for rule in endpoint["relabelings"]}
        assert made["app"] == "lorafleet"
        assert {"service", "ray_cluster", "ray_node_type"} <= made.keys()


def test_rules_are_the_files_with_the_values_put_in(
    render: Render, repo: Path, tmp_path: Path, require: Callable[[str], str]
) -> None:
    files = sorted((repo / CHART / "files/rules").glob("*.yaml"))
    written = [group for file in files for group in yaml.safe_load(file.read_text())["groups"]]
    (plain,) = of_kind(render(), "PrometheusRule")
    base = "monitoring.prometheusRule."
    (changed,) = of_kind(
        render(
            f"{base}slo.availability=0.95",
            f"{base}slo.latencyTarget=0.99",
            f"{base}slo.latencySeconds=7.5",
            f'{base}runbookBaseUrl="https://wiki.example/runbook"',
        ),
        "PrometheusRule",
    )
    rules = {
        rule.get("record") or rule["alert"]: rule for group in changed["spec"]["groups"] for rule in group["rules"]
    }
    assert rules["lorafleet:slo_availability:objective"]["expr"] == "vector(0.95)"
    assert rules["lorafleet:slo_latency:objective"]["expr"] == "vector(0.99)"
    assert 'le="7.5"' in rules["lorafleet:slow_requests:ratio_rate1h"]["expr"]
    url = rules["LorafleetNoData"]["annotations"]["runbook_url"]
    assert url == "https://wiki.example/runbook#no-data"
    assert plain["spec"]["groups"] == written
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(changed["spec"]))
    assert subprocess.run([require("promtool"), "check", "rules", file], capture_output=True).returncode == 0


def test_dashboards_are_labelled_and_whole(render: Render, repo: Path) -> None:
    maps = of_kind(render('monitoring.dashboards.folder="Pictures"'), "ConfigMap")
    files = {file.name: json.loads(file.read_text()) for file in (repo / CHART / "files/dashboards").iterdir()}
    assert len(maps) == len(files) == 5
    for each in maps:
        assert each["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert each["metadata"]["annotations"]["grafana_folder"] == "Pictures"
        ((name, content),) = each["data"].items()
        assert json.loads(content)["uid"] == files[name.removeprefix("lorafleet-")]["uid"]


@pytest.mark.parametrize(
    ("values", "kinds", "sentence"),
    [
        ((), ("PrometheusRule",), "monitoring.podMonitor.enabled needs prometheus-operator's PodMonitor"),
        ((), ("PodMonitor",), "monitoring.prometheusRule.enabled needs prometheus-operator's PrometheusRule"),
        (
            ("monitoring.prometheusRule.slo.latencySeconds=8",),
            OPERATOR,
            "latencySeconds=8 is not measured: set one of 0.05",
        ),
        (("monitoring.prometheusRule.slo.availability=99.9",), OPERATOR, "availability"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    render: Render, values: tuple[str, ...], kinds: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(AssertionError, match=sentence):
        render(*values, kinds=kinds)
