"""`make monitor`, up to where Prometheus begins."""

import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import monitor
import pytest
import yaml


def test_without_prometheus_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert monitor.main([]) == 1
    assert "apt-get install prometheus" in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert monitor.main(["--port", str(port)]) == 2
    assert f"port {port} is in use on 127.0.0.1" in capsys.readouterr().err


def test_it_says_what_to_open_and_ends_with_its_prometheus(
    require: Callable[[str], str], repo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("prometheus")
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    monkeypatch.setenv("LORAFLEET_METRICS_PORT", "9444")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(repo / "scripts/monitor.py"), "--port", str(port), "--also", "9401"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            told = list(iter(process.stdout.readline, "Ctrl-C stops it.\n"))
            links = re.findall(rf"http://127\.0\.0\.1:{port}\S+", "".join(told))
            assert len(links) == 3
            assert [httpx.get(link).status_code for link in links] == [200] * 3
        finally:
            process.terminate()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))  # the Prometheus has gone too
    written = yaml.safe_load((tmp_path / "monitoring/prometheus.yaml").read_text())
    assert written["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:9444", "127.0.0.1:9401"]


def test_a_grafana_is_told_where_the_prometheus_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    told = "\n".join(monitor.what_to_open("http://127.0.0.1:19090", "http://127.0.0.1:19090/classic"))
    assert "http://127.0.0.1:19090/classic/alerts" in told
    assert "LORAFLEET_PROMETHEUS_URL=http://127.0.0.1:19090" in told
