"""`lorafleet doctor`: what this machine has, and what to do about what is missing."""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

import typer

from lorafleet.cli.options import ConfigFile, Json, Overrides, serve_settings
from lorafleet.core.errors import LorafleetError

if TYPE_CHECKING:
    from lorafleet.serve.config import ServeSettings

GIB = 1 << 30
MIN_MEMORY_BYTES = 3 * GIB  # the service with emojixl takes about 2 GiB
MIN_DISK_BYTES = 2 * GIB
OPTIONAL_TOOLS = {
    "chromium": "only the browser tests need it: install the package chromium",
    "helm": "only deploying to Kubernetes needs it: see https://helm.sh",
}


@dataclass(frozen=True)
class Check:
    """One line: `fail` means the service cannot run, `warn` that something will be slow or left out."""

    name: str
    state: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def doctor(config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False) -> None:
    """Check that the service can run here; exit code 1 if it cannot."""
    failed = False
    found = []
    for check in _checks(serve_settings(config, overrides)):
        failed |= check.state == "fail"
        found.append(check)
        if not as_json:
            typer.echo(_line(check))
    if as_json:
        typer.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in found]}, ensure_ascii=False))
    if failed:
        raise typer.Exit(1)


def _line(check: Check) -> str:
    remedy = f"\n{'':22}-> {check.remedy}" if check.remedy else ""
    return f"{check.state:<5} {check.name:<15} {check.found}{remedy}"


def _checks(settings: "ServeSettings") -> Iterator[Check]:
    yield _python()
    yield _memory()
    yield from (_library(name) for name in ("diffusers", "transformers", "ray"))
    yield _torch()
    yield _base(settings)
    yield _port(settings)
    yield _home()
    yield _xformers()
    for tool, remedy in OPTIONAL_TOOLS.items():
        path = shutil.which(tool)
        yield Check(tool, "ok", path) if path else Check(tool, "warn", "not found", remedy)


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check("python", "ok", f"{version} at {sys.executable}")


def _memory() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{cores} cores, {memory / GIB:.0f} GiB of memory"
    if memory < MIN_MEMORY_BYTES:
        return Check("machine", "warn", found, f"the service wants {MIN_MEMORY_BYTES / GIB:.0f} GiB")
    return Check("machine", "ok", found)


def _library(name: str) -> Check:
    try:
        return Check(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "fail", "not installed", 'pip install "lorafleet[serve]"')


def _torch() -> Check:
    try:
        import torch
    except ImportError as error:
        return Check("torch", "fail", str(error), 'pip install "lorafleet[serve]"')
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpus = torch.cuda.device_count()
        return Check(
            "torch",
            "ok",
            f"{torch.__version__}, {gpus} x {properties.name}, {properties.total_memory / GIB:.0f} GiB",
        )
    if torch.backends.mps.is_available():
        return Check("torch", "ok", f"{torch.__version__} on Apple's GPU (mps)")
    return Check("torch", "ok", f"{torch.__version__} on the CPU: enough for emojixl, too slow for the real SDXL")


def _base(settings: "ServeSettings") -> Check:
    try:
        from lorafleet.sdxl.base import load_base

        base = load_base(settings.base)
    except LorafleetError as error:
        return Check("base model", "fail", error.message, "set base.id to a model folder or hub id that is there")
    except ImportError as error:
        return Check("base model", "fail", f"cannot be loaded: {error}", 'pip install "lorafleet[serve]"')
    return Check("base model", "ok", f"{base.id} on {base.device}, fingerprint {base.fingerprint}")


def _port(settings: "ServeSettings") -> Check:
    from lorafleet.serve.launch import check_port

    try:
        check_port(settings.host, settings.port)
    except LorafleetError as error:
        return Check("port", "warn", error.message)
    return Check("port", "ok", f"{settings.port} on {settings.host} is free")


def _home() -> Check:
    from lorafleet.core.config import home

    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Check("home", "fail", f"{folder}: {error.strerror}", "set LORAFLEET_HOME to a folder you can write to")
    found = f"{folder}, {free / GIB:.0f} GiB free"
    if free < MIN_DISK_BYTES:
        return Check("home", "warn", found, f"leave {MIN_DISK_BYTES / GIB:.0f} GiB for caches, or set LORAFLEET_HOME")
    return Check("home", "ok", found)


def _xformers() -> Check:
    try:
        return Check("xformers", "ok", metadata.version("xformers"))
    except metadata.PackageNotFoundError:
        return Check("xformers", "warn", "not installed", 'only GPUs can use it: pip install "lorafleet[gpu]"')
