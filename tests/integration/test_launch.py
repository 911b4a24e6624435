"""How a start fails when only the replica can see why. In a process of its own: one process has one Ray."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

START = """
import sys
from lorafleet.core.config import load_settings
from lorafleet.core.errors import LorafleetError
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.launch import serve_forever

try:
    serve_forever(load_settings(ServeSettings, overrides=sys.argv[1:]), on_ready=print)
except LorafleetError as error:
    sys.exit(error.message)
"""


def start(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", START, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.nightly
def test_what_hinders_the_replica_comes_out_as_one_sentence(free_port: Callable[[], int]) -> None:
    result = start(f"port={free_port()}", "base.device=cuda", "replica_gpus=0")
    assert result.returncode == 1
    assert result.stderr.startswith("base.device is cuda, but torch")
    assert result.stderr.endswith("set base.device=cpu, or install a CUDA build of torch\n")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_base_that_is_not_there_is_told_before_ray_starts(free_port: Callable[[], int]) -> None:
    result = start(f"port={free_port()}", "base.id=/nowhere/at/all")
    assert (result.returncode, result.stderr, result.stdout) == (1, "no base model folder /nowhere/at/all\n", "")


def test_no_ray_at_the_given_address_is_told_at_once(free_port: Callable[[], int]) -> None:
    result = start(f"port={free_port()}", "ray_address=127.0.0.1:9")
    assert result.returncode == 1
    assert result.stderr.startswith("no Ray cluster answers at ray_address=127.0.0.1:9: ")


@pytest.mark.parametrize(("setting", "count"), [("registry.samples=true", 2), ("registry.samples=false", 0)])
def test_a_first_start_of_emojixl_puts_its_sample_adapters_into_the_registry(
    setting: str, count: int, free_port: Callable[[], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before Ray starts, which it does not here."""
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path / "home"))
    assert start(f"port={free_port()}", "ray_address=127.0.0.1:9", setting).returncode == 1
    lists = [str(Path(sys.executable).with_name("lorafleet")), "adapters", "list", "--json"]
    done = subprocess.run(lists, capture_output=True, text=True, timeout=120, check=True)
    assert len(json.loads(done.stdout)["adapters"]) == count


def test_ray_imported_too_early_to_get_a_token_is_told(free_port: Callable[[], int]) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", "import ray\n" + START, f"port={free_port()}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith("ray was imported before it could be given an access token: ")
