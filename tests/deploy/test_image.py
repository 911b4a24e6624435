"""The images, built for real and run as their own user on a root filesystem that is read-only. Needs root and buildah.

Options for buildah (a wheel folder's `--volume`, `--build-arg`) are taken from IMAGE_OPTIONS.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.nightly

STARTS_S = 600.0
# What a container runtime does with `readOnlyRootFilesystem` and two emptyDirs, in a mount namespace of its own.
ENTER = """
set -eu
root=$1; user=$2; shift 2
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -o remount,bind,ro "$root"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o uid=1000,gid=1000 tmpfs "$root/var/lib/lorafleet"
exec chroot --userspec="$user" "$root" /usr/bin/env -i "$@"
"""


class Image:
    """A built image, unpacked at `root`."""

    def __init__(self, root: Path, config: dict[str, Any]) -> None:
        self.root = root
        self.config = config

    def command(self, *arguments: str) -> list[str]:
        enter = ["unshare", "--mount", "--propagation", "private", "bash", "-c", ENTER, "enter", str(self.root)]
        return [*enter, self.config["User"], *self.config["Env"], *arguments]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments), capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def build(require: Callable[[str], str], repo: Path) -> Iterator[Callable[[str], Image]]:
    tools = Path(require("kube"))
    require("buildah")
    storage = Path(os.environ.get("IMAGES", "/tmp/stand-in-images")) / "storage.conf"
    environment = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage)}
    containers: list[str] = []

    def buildah(*arguments: str) -> str:
        command = ["buildah", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    def make(target: str) -> Image:
        tag = f"localhost/lorafleet-{target}:test"
        options = shlex.split(os.environ.get("IMAGE_OPTIONS", ""))
        subprocess.run([str(tools / "build_image.sh"), str(repo), tag, "--target", target, *options], check=True)
        containers.append(buildah("from", "--pull-never", tag))
        config = json.loads(buildah("inspect", "--type", "image", tag))["OCIv1"]["config"]
        return Image(Path(buildah("mount", containers[-1])), config)

    yield make
    for container in containers:
        buildah("rm", container)


def assert_is_as_promised(image: Image) -> None:
    assert image.config["User"] == "1000:1000"
    assert image.config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert image.run("touch", "/opt/lorafleet/x").stderr.strip().endswith("Read-only file system")
    assert image.run("touch", "/tmp/x", "/var/lib/lorafleet/x").returncode == 0
    assert image.run("bash", "-lc", "wget --version && lorafleet version").returncode == 0
    assert image.run("bash", "-c", "command -v gcc cc make").returncode != 0
    assert list(image.root.glob("root/.ray")) == []


def test_serve_answers_as_its_user_on_a_read_only_root(build: Callable[[str], Image]) -> None:
    image = build("serve")
    assert_is_as_promised(image)
    bytes_there = int(subprocess.check_output(["du", "-sb", str(image.root)], text=True).split()[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    command = image.command(*image.config["Entrypoint"], "serve", "--port", str(port), "--set", "base.device=cpu")
    process = subprocess.Popen(command)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            while time.monotonic() < started + STARTS_S and process.poll() is None:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/readyz").is_success:
                        break
                time.sleep(0.1)
            print(f"{bytes_there / 1e6:.0f} MB; ready after {time.monotonic() - started:.1f} s")
            body = {"prompt": "a red apple on a blue background", "seed": 1}
            picture = client.post("/generate", json=body, headers={"accept": "image/png"})
            assert picture.content.startswith(b"\x89PNG")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def test_ui_has_the_page_s_library_and_no_torch(build: Callable[[str], Image]) -> None:
    image = build("ui")
    assert_is_as_promised(image)
    assert image.run("python", "-c", "import gradio, lorafleet.client").returncode == 0
    assert image.run("python", "-c", "import torch").returncode != 0
