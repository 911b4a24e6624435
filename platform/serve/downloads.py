"""Adapter files on their way from the registry to this machine's disk."""

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

from lorafleet.core.manifest import Manifest
from lorafleet.core.metrics import DOWNLOAD_BYTES, DOWNLOAD_SECONDS, Recorder, Unrecorded
from lorafleet.core.registry import Registry

THREADS: Final = 8


class Download:
    """One file on its way. `done_bytes`: as of now. `file` has its place, or what hindered it."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.done_bytes = 0
        self.file: Future[Path]


class Downloads:
    """Each version is downloaded once, however many wait for it. Safe for several threads."""

    def __init__(self, registry: Registry, recorder: Recorder | None = None) -> None:
        self._registry = registry
        self._recorder = recorder or Unrecorded()
        self._lock = threading.Lock()
        self._running: dict[str, Download] = {}
        self._threads = ThreadPoolExecutor(THREADS, "download")

    def start(self, manifest: Manifest) -> Download:
        """Begins it, or joins it. A file that is here already is there at once."""
        with self._lock:
            download = self._running.get(manifest.version)
            if download is None:
                download = self._running[manifest.version] = Download(manifest)
                download.file = self._threads.submit(self._pull, download)
            return download

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _pull(self, download: Download) -> Path:
        def on_progress(done: int, _: int) -> None:
            download.done_bytes = done

        start, result = time.monotonic(), "error"
        try:
            file = self._registry.pull(download.manifest, on_progress=on_progress)
            result = "ok"
            return file
        finally:
            if download.done_bytes or result == "error":  # else it was here already
                self._recorder.observe(DOWNLOAD_SECONDS, time.monotonic() - start, result=result)
                self._recorder.add(DOWNLOAD_BYTES, download.done_bytes)
            with self._lock:
                del self._running[download.manifest.version]
