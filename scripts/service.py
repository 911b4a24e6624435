"""`lorafleet serve` in a process of its own, for as long as a `with` block; used by smoke, bench and e2e tests."""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

COMMAND = str(Path(sys.executable).with_name("lorafleet"))
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@dataclass
class Service:
    """A running service; `process.stdout` holds what it said once it was ready."""

    url: str
    home: Path
    process: subprocess.Popen[str]
    ready_s: float
    announcement: str


def free_port() -> int:
    """A port that nothing listens on now, below the ones that Ray's own processes take by themselves."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port between 20000 and 30000")


@contextmanager
def running_service(*arguments: str) -> Iterator[Service]:
    """Started on a free port with a home of its own; always stopped, the hard way if it does not go by itself."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as home:
        log = Path(home) / "serve.log"
        start = time.monotonic()
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [COMMAND, "serve", "--port", str(port), *arguments],
                env={**os.environ, "LORAFLEET_HOME": home, "HF_HUB_OFFLINE": "1"},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # Ctrl-C here must reach it through us, once
            )
        try:
            announcement = _read_announcement(process, log)
            url = f"http://127.0.0.1:{port}"
            yield Service(url, Path(home), process, time.monotonic() - start, announcement)
        finally:
            stop(process)


def stop(process: subprocess.Popen[str]) -> int:
    """Ask it to end, wait, and only then insist; its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout:
        process.stdout.close()
    return process.returncode


def _read_announcement(process: subprocess.Popen[str], log: Path) -> str:
    """The two lines that say that it is ready, and the curl line to try."""
    assert process.stdout
    lines = []
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and len(lines) < 2:
        line = process.stdout.readline()  # ends with the process, which gives up by itself
        if not line:
            break
        lines.append(line)
    if len(lines) < 2:
        raise RuntimeError(f"the service did not start:\n{log.read_text()}")
    return "".join(lines)
