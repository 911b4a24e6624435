"""Helm and the chart, and a cluster's stand-in, as the tests use them."""

import json
import os
import subprocess
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Object = dict[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MONITORING = ("", "/PodMonitor", "/PrometheusRule")
APIS = ("ray.io/v1", "gateway.networking.k8s.io/v1", *(f"monitoring.coreos.com/v1{kind}" for kind in MONITORING))
PROMISED = ("cpu-demo", "single-gpu", "multi-gpu-s3", "ha")


@dataclass(frozen=True)
class Chart:
    """The chart at `folder`, as helm sees it; `values` are names of files in ci/, `sets` go to --set."""

    helm: str
    folder: Path

    def run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [self.helm, *arguments]
        return subprocess.run(command, capture_output=True, text=True, input=stdin, timeout=300, check=False)

    def template(
        self, values: Object | None = None, *, ci: str | None = None, apis: tuple[str, ...] = APIS, name: str = "demo"
    ) -> subprocess.CompletedProcess[str]:
        files = ["--values", str(self.ci(ci))] if ci else []
        known = [word for api in apis for word in ("--api-versions", api)]
        given = ["--values", "-"] if values is not None else []
        return self.run("template", name, str(self.folder), *files, *known, *given, stdin=yaml.safe_dump(values or {}))

    def render(self, values: Object | None = None, *, ci: str | None = None) -> list[Object]:
        result = self.template(values, ci=ci)
        assert result.returncode == 0, result.stderr
        return [document for document in yaml.load_all(result.stdout, LOADER) if document]

    def ci(self, name: str) -> Path:
        return self.folder / "ci" / f"{name}-values.yaml"


@dataclass
class Cluster:
    """A running API server stand-in, and helm and kubectl that speak to it."""

    chart: Chart
    url: str
    environment: dict[str, str] = field(repr=False)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=180, check=False, env={**os.environ, **self.environment}
        )

    def helm(self, *arguments: str) -> str:
        result = self.run(self.chart.helm, *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.chart.helm, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **self.environment},
        )

    def objects(self, kind: str, namespace: str | None = None) -> list[Object]:
        with urllib.request.urlopen(f"{self.url}/_emulator/objects") as response:
            found = json.load(response)
        return [o for o in found if o["kind"] == kind and namespace in (None, o["metadata"].get("namespace"))]

    def ready(self, name: str, status: str) -> None:
        address = f"{self.url}/_emulator/ready?kind=RayService&name={name}&status={status}"
        urllib.request.urlopen(urllib.request.Request(address, method="PUT")).close()
