"""Adapter files on this machine's disk, by version: a version's bytes never change, so a file that is here is right."""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from lorafleet.core.errors import AdapterTooLarge
from lorafleet.core.storage import translated

CHUNK_BYTES: Final = 4 << 20
INCOMING: Final = ".incoming-"
INCOMING_LIFE_S: Final = 24 * 3600.0


class AdapterCache:
    """`<folder>/<version>.safetensors`. Safe for several threads and processes; raises StorageUnavailable for its disk.

    Above `max_bytes` the files that were not asked for longest are removed. Who has one open reads on; who is given a
    path opens it soon.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self._max_bytes = max_bytes

    def get(self, version: str, size_bytes: int) -> Path | None:
        """The version's file, if it is here."""
        file = self._file(version)
        with self._translated():
            try:
                if file.stat().st_size != size_bytes:
                    return None
                file.touch()
            except FileNotFoundError:
                return None
        return file

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """An empty folder on the cache's disk, gone when the block ends."""
        with self._translated():
            self.folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=INCOMING, dir=self.folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def receive(self, source: BinaryIO, file: Path, max_bytes: int) -> tuple[str, int]:
        """Copies `source` into `file`; its version and size in bytes. Raises AdapterTooLarge as soon as it is."""
        digest, size = hashlib.sha256(), 0
        with self._translated(), file.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                size += len(chunk)
                if size > max_bytes:
                    raise AdapterTooLarge(
                        f"the adapter file is larger than the {max_bytes} bytes that the registry takes: train a lower "
                        "rank, store it as float16, or raise registry.max_adapter_bytes.",
                        param="file",
                    )
                digest.update(chunk)
                target.write(chunk)
        return digest.hexdigest(), size

    def add(self, file: Path, version: str) -> Path:
        """Moves a file of an `incoming` folder to its place, whole for whoever looks."""
        place = self._file(version)
        with self._translated():
            file.replace(place)
            self._trim(keep=place)
        return place

    def _trim(self, keep: Path) -> None:
        files = _stats(self.folder.glob("*.safetensors"))
        spare = sum(found.st_size for found in files.values()) - self._max_bytes
        for file in sorted(files.keys() - {keep}, key=lambda file: files[file].st_mtime):
            if spare <= 0:
                break
            file.unlink(missing_ok=True)
            spare -= files[file].st_size
        for folder, found in _stats(self.folder.glob(f"{INCOMING}*")).items():
            if time.time() - found.st_mtime > INCOMING_LIFE_S:  # of a process that was killed
                shutil.rmtree(folder, ignore_errors=True)

    def _file(self, version: str) -> Path:
        return self.folder / f"{version}.safetensors"

    def _translated(self) -> AbstractContextManager[None]:
        return translated(f"the adapter cache {self.folder}", setting="LORAFLEET_HOME")


def sha256(file: Path) -> str:
    """Of a file's content, 64 hex digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stats(paths: Iterable[Path]) -> dict[Path, os.stat_result]:
    """Of those that are there: other processes remove some."""
    found = {}
    for path in paths:
        with suppress(FileNotFoundError):
            found[path] = path.stat()
    return found
