"""Writes deploy/k8s/, plain manifests for `kubectl apply -k`, out of the chart; needs helm (HELM, or on the path).

What all overlays have in common goes to base/, what differs to the overlay. `--check` only compares.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parent.parent
CHART: Final = ROOT / "deploy" / "helm" / "lorafleet"
TARGET: Final = ROOT / "deploy" / "k8s"
OVERLAYS: Final = {"cpu-demo": "cpu-demo-values.yaml", "gpu": "single-gpu-values.yaml"}
HELM_ONLY: Final = ("helm.sh/chart", "app.kubernetes.io/managed-by")
HEAD: Final = "# Written by scripts/manifests.py (`make manifests`) from deploy/helm/lorafleet.\n"

Object = dict[str, Any]


class Dumper(yaml.SafeDumper):
    """Text of several lines as it is written by hand."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


Dumper.add_representer(str, _text)
Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def render(helm: str, values: str) -> list[Object]:
    """The chart's objects as of a release `lorafleet`, without what only Helm uses."""
    command = [helm, "template", "lorafleet", str(CHART), "--no-hooks", "--skip-tests", "--api-versions", "ray.io/v1"]
    command += ["--values", str(CHART / "ci" / values)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    objects = [document for document in yaml.safe_load_all(text) if document]
    for document in objects:
        metadata = document["metadata"]
        for name in HELM_ONLY:
            metadata.get("labels", {}).pop(name, None)
        annotations = metadata.get("annotations", {})
        annotations.pop("helm.sh/resource-policy", None)
        if not annotations:
            metadata.pop("annotations", None)
    return objects


def files(helm: str) -> dict[str, str]:
    """Path below deploy/k8s/ -> text."""
    overlays = {name: render(helm, values) for name, values in OVERLAYS.items()}
    first, *others = overlays.values()
    common = [document for document in first if all(document in objects for objects in others)]
    written = {"base": {"objects.yaml": _dump(common), "kustomization.yaml": _kustomization(["objects.yaml"])}}
    for name, objects in overlays.items():
        own = [document for document in objects if document not in common]
        kustomization = _kustomization(["../../base", "objects.yaml"])
        written[f"overlays/{name}"] = {"objects.yaml": _dump(own), "kustomization.yaml": kustomization}
    return {f"{folder}/{name}": text for folder, texts in written.items() for name, text in texts.items()}


def _dump(objects: list[Object]) -> str:
    return HEAD + yaml.dump_all(objects, Dumper=Dumper, sort_keys=False, width=120)


def _kustomization(resources: list[str]) -> str:
    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": resources}
    return HEAD + yaml.dump(kind, sort_keys=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file is stale")
    is_check = parser.parse_args().check
    helm = os.environ.get("HELM") or shutil.which("helm")
    if helm is None:
        sys.exit("no helm on this machine: install it, or set HELM to where it is")
    wanted = files(helm)
    stale = [name for name, text in wanted.items() if not _same(TARGET / name, text)]
    if is_check and stale:
        sys.exit(f"deploy/k8s is stale ({', '.join(stale)}): run `make manifests`")
    for name in stale:
        (TARGET / name).parent.mkdir(parents=True, exist_ok=True)
        (TARGET / name).write_text(wanted[name])


def _same(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


if __name__ == "__main__":
    main()
