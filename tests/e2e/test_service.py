"""`lorafleet serve` as a person runs it: one real service for the whole module, stopped by its last test."""

import base64
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from PIL import Image
from playwright.sync_api import sync_playwright
from service import COMMAND, Service, free_port, running_service, stop

from lorafleet.core.recipe import CHUNK, extract

# A root user has no sandbox; the others keep the browser from calling home.
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


WAYS = [pytest.param("true", id="direct"), pytest.param("false", id="behind a proxy", marks=pytest.mark.nightly)]


@pytest.fixture(scope="module", params=WAYS)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    way = f"direct_ingress={request.param}"
    with running_service("--set", "replica_threads=1", "--set", way) as running:  # see tests/conftest.py
        yield running


def lorafleet(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def processes_of(home: Path) -> list[str]:
    """Command lines of the processes that were started with this home."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(home).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it ended, or is not ours
    return found


def test_the_printed_curl_line_works(service: Service, require: Callable[[str], str], tmp_path: Path) -> None:
    require("curl")
    assert service.url in service.announcement.splitlines()[0]
    line = service.announcement.splitlines()[1].strip()
    subprocess.run(shlex.split(line), cwd=tmp_path, check=True, timeout=120)
    assert extract(tmp_path / "apple.png").seed == 1


@pytest.mark.nightly
def test_the_readme_s_commands_work(service: Service, repo: Path, tmp_path: Path) -> None:
    readme = (repo / "README.md").read_text()
    commands = re.findall(r"^(?:\.venv/bin/)?lorafleet generate .*$", readme, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        arguments = shlex.split(command, comments=True)[1:]
        if "--local" not in arguments:
            arguments += ["--url", service.url]
        done = lorafleet(*arguments, cwd=tmp_path)
        assert done.returncode == 0, (command, done)
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as image:
            assert image.size == (128, 128)
    assert len(list(tmp_path.glob("*.png"))) >= len(commands)


def test_a_recipe_makes_the_same_image_again(service: Service, tmp_path: Path) -> None:
    prompt = 'two "pizzas" 🍕\non a blue background'
    flags = ["--steps", "3", "--scheduler", "euler_a", "--negative-prompt", "blurry"]
    assert lorafleet("generate", prompt, *flags, "--url", service.url, cwd=tmp_path).returncode == 0
    first = (tmp_path / "out.png").read_bytes()
    with Image.open(tmp_path / "out.png") as image:
        recipe = image.info[CHUNK]
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{service.url}/generate", content=recipe.encode(), headers=headers, timeout=60)
    assert base64.b64decode(answer.json()["images"][0]) == first
    assert lorafleet("generate", "--recipe", "out.png", "--local", "-o", "here.png", cwd=tmp_path).returncode == 0
    assert extract(tmp_path / "here.png") == extract(first)
    assert extract(first).prompt == prompt

    foreign = recipe.replace(extract(first).base.fingerprint, "0" * 64)
    refused = httpx.post(f"{service.url}/generate", content=foreign.encode(), headers=headers, timeout=60)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "recipe_mismatch")


def test_a_size_off_the_grid_is_the_server_s_sentence(service: Service, tmp_path: Path) -> None:
    done = lorafleet("generate", "x", "--width", "65", "--url", service.url, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("lorafleet: width must be ")
    assert not (tmp_path / "out.png").exists()


def test_a_port_in_use_is_one_sentence(service: Service, tmp_path: Path) -> None:
    port = urlsplit(service.url).port
    done = lorafleet("serve", "--port", str(port), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"lorafleet: port {port} is in use")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", [{}, {"model_index.json": "{"}, {"model_index.json": '{"_class_name": "Flux"}'}])
def test_an_unreadable_model_folder_is_one_sentence(content: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    for name, text in content.items():
        (folder / name).write_text(text)
    done = lorafleet("serve", "--set", f"base.id={folder}", cwd=tmp_path)
    assert done.returncode == 1
    assert str(folder) in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_the_docs_page_needs_no_other_host(service: Service, require: Callable[[str], str], tmp_path: Path) -> None:
    browser_path = require("browser")
    asked, failed = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_FLAGS)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
        page.goto(f"{service.url}/docs")
        page.get_by_text("/v1/images/generations").wait_for(timeout=20_000)
        page.screenshot(path=tmp_path / "docs.png")
        browser.close()
    assert [url for url in asked if not url.startswith((service.url, "data:"))] == []
    assert failed == []


@pytest.mark.nightly
def test_ctrl_c_during_the_start_ends_everything(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [COMMAND, "serve", "--port", str(free_port())],
        env={**os.environ, "LORAFLEET_HOME": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr
    assert process.stderr.readline().startswith("starting")
    time.sleep(3.0)  # in the middle of Ray's start
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert processes_of(tmp_path) == []


def test_sigterm_ends_everything_cleanly(service: Service) -> None:
    if Path("/proc/self/environ").exists():
        assert len(processes_of(service.home)) > 1
    assert stop(service.process) == 0
    assert processes_of(service.home) == []
    parts = urlsplit(service.url)
    with socket.socket() as probe:
        assert probe.connect_ex((parts.hostname, parts.port)) != 0
    log = (service.home / "serve.log").read_text()
    assert "Traceback" not in log, log


@pytest.mark.nightly
def test_nobody_asks_nothing_runs_and_the_first_request_starts_a_replica() -> None:
    settings = ("min_replicas=0", "max_replicas=1", "downscale_delay_s=2", "upscale_delay_s=0")
    with running_service(*(word for setting in settings for word in ("--set", f"scaling.{setting}"))) as service:

        def replicas() -> int:
            return sum(":Replica" in command for command in processes_of(service.home))

        deadline = time.monotonic() + 60
        while replicas():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with httpx.Client(base_url=service.url, timeout=120) as http:
            for _ in range(5):
                assert http.get("/readyz").json()["status"] == "ready"
                time.sleep(1)
            assert not replicas()  # to ask whether it is ready wakes nobody
            assert http.post("/generate", json={"prompt": "red apple", "steps": 2}).status_code == 200
            assert replicas() == 1
