"""`make monitor`, up to where Prometheus begins."""

import shutil
import socket
from pathlib import Path

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


def test_it_scrapes_what_the_settings_say_and_tells_what_to_open(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    monkeypatch.setenv("LORAFLEET_METRICS_PORT", "9444")
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/true")
    assert monitor.main(["--port", "19090", "--also", "9401"]) == 0
    written = yaml.safe_load((tmp_path / "monitoring/prometheus.yaml").read_text())
    assert written["scrape_configs"][0]["static_configs"][0]["targets"] == ["127.0.0.1:9444", "127.0.0.1:9401"]
    told = capsys.readouterr().out
    assert "http://127.0.0.1:19090/alerts" in told
    assert "LORAFLEET_PROMETHEUS_URL=http://127.0.0.1:19090" in told
