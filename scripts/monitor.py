"""Prometheus beside a service on this machine: scrapes it, evaluates the chart's rules, and says what to open.

`make run ARGS="--set metrics_port=9400"` in one terminal, `make monitor` in another.
"""

import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from lorafleet.core.config import home, load_settings
from lorafleet.core.errors import ConfigError
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.launch import check_port

ROOT: Final = Path(__file__).resolve().parent.parent
FILES: Final = ROOT / "deploy/helm/lorafleet/files"
GRAFANA: Final = ROOT / "deploy/monitoring/grafana"
METRICS_PORT: Final = 9400
LOOPBACK: Final = "127.0.0.1"
HOW_TO_INSTALL: Final = (
    "monitor: no prometheus on this machine: apt-get install prometheus, brew install prometheus, or "
    "https://prometheus.io/download, then once more"
)


def prometheus_config(ports: Sequence[int], interval: str) -> dict[str, Any]:
    """What the chart's PodMonitor and PrometheusRule do, for ports of this machine."""
    labels = {"app": "lorafleet", "namespace": "local", "service": "lorafleet"}
    relabel = yaml.safe_load((FILES / "relabel.yaml").read_text("utf-8"))
    return {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(FILES / "rules/*.yaml")],
        "scrape_configs": [
            {
                "job_name": "lorafleet",
                "static_configs": [{"targets": [f"{LOOPBACK}:{port}" for port in ports], "labels": labels}],
                "metric_relabel_configs": [{_snake(key): value for key, value in rule.items()} for rule in relabel],
            }
        ],
    }


def prometheus_command(prometheus: str, config: Path, data: Path, port: int) -> list[str]:
    return [
        prometheus,
        f"--config.file={config}",
        f"--storage.tsdb.path={data}",
        f"--web.listen-address={LOOPBACK}:{port}",
        "--log.level=warn",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="monitor", description=__doc__, add_help=True)
    parser.add_argument("--metrics-port", type=int, help=f"the service's metrics_port [its settings', {METRICS_PORT}]")
    parser.add_argument("--also", type=int, action="append", default=[], help="a training run's watch.metrics_port")
    parser.add_argument("--port", type=int, default=9090, help="where Prometheus listens, 127.0.0.1 only [9090]")
    parser.add_argument("--interval", default="5s", help="between two scrapes [5s]")
    asked = parser.parse_args(arguments)
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        print(HOW_TO_INSTALL, file=sys.stderr)
        return 1
    try:
        scraped = asked.metrics_port or load_settings(ServeSettings).metrics_port or METRICS_PORT
        check_port(LOOPBACK, asked.port)
    except ConfigError as error:
        print(f"monitor: {error.message}", file=sys.stderr)
        return 2
    folder = home() / "monitoring"
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(prometheus_config([scraped, *asked.also], asked.interval), sort_keys=False))
    address = f"http://{LOOPBACK}:{asked.port}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    process = subprocess.Popen(prometheus_command(prometheus, config, folder / "prometheus", asked.port))
    try:
        pages = pages_at(address, process)
        if pages is not None:
            print(f"scraping {LOOPBACK}:{scraped} (a service started with --set metrics_port={scraped}); open")
            print(*what_to_open(address, pages), "Ctrl-C stops it.", sep="\n", flush=True)
        return process.wait()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        process.terminate()
        process.wait()


def pages_at(address: str, process: "subprocess.Popen[bytes]") -> str | None:
    """Where its pages lie, once it is ready: Debian's package has only the classic ones. None if it ended before."""
    while process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{address}/-/ready").is_success:
                classic = f"{address}/classic"
                return classic if httpx.get(f"{classic}/alerts").is_success else address
        time.sleep(0.1)
    return None


def what_to_open(address: str, pages: str) -> list[str]:
    """Lines with links to the Prometheus at `address`, whose pages are at `pages`."""
    lines = [
        f"  {pages}/alerts    alerts; deploy/RUNBOOK.md says what to do about each",
        f"  {pages}/targets   whether the service answers",
        f"  {pages}/graph?g0.expr=lorafleet%3Aimages%3Arate5m&g0.tab=0    images per second",
    ]
    if grafana := shutil.which("grafana-server") or shutil.which("grafana"):
        return [
            *lines,
            f"  http://{LOOPBACK}:3000/dashboards   Grafana, once started by\n    {_grafana_command(grafana, address)}",
        ]
    files = (FILES / "dashboards").relative_to(ROOT)
    return [*lines, f"  no Grafana on this machine; one that you have takes {files}/*.json"]


def _grafana_command(grafana: str, prometheus_url: str) -> str:
    server = grafana if grafana.endswith("-server") else f"{grafana} server"
    settings = {
        "GF_PATHS_PROVISIONING": GRAFANA,
        "GF_SERVER_HTTP_ADDR": LOOPBACK,
        "GF_PATHS_DATA": home() / "monitoring/grafana",
        "LORAFLEET_DASHBOARDS": FILES / "dashboards",
        "LORAFLEET_PROMETHEUS_URL": prometheus_url,
    }
    return " ".join([*(f"{name}={value}" for name, value in settings.items()), server, "--homepath /usr/share/grafana"])


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name)


if __name__ == "__main__":
    sys.exit(main())
