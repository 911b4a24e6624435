"""Objects as files below a folder: a disk, or a volume that several machines mount.

Not fsspec's own local files: those are written in place (or, with `autocommit=False`, moved from the temporary folder,
perhaps from another disk), and its listing loses a whole folder when one file of it vanishes meanwhile.
"""

import errno
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from lorafleet.core.storage import MAX_OBJECT_BYTES, OnProgress, Storage, Stored, translated

UNFINISHED: Final = ".unfinished-"  # no name or version starts with a dot
CHUNK_BYTES: Final = 4 << 20
MKDIR_ATTEMPTS: Final = 100


class FolderStorage(Storage):
    """A file is written beside its place, flushed to the disk, and renamed."""

    is_local = True

    def __init__(self, root: Path) -> None:
        """`root` need not exist yet."""
        self.url = str(root)
        self._root = root
        self._was_there = False

    def read(self, path: str) -> bytes | None:
        with self._translated():
            try:
                with (self._root / path).open("rb") as file:
                    return file.read(MAX_OBJECT_BYTES)
            except FileNotFoundError:
                self._check_root()
                return None

    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        return {path: data for path in paths if (data := self.read(path)) is not None}

    def size(self, path: str) -> int | None:
        with self._translated():
            try:
                return (self._root / path).stat().st_size
            except FileNotFoundError:
                self._check_root()
                return None

    def find(self, folder: str) -> dict[str, Stored]:
        with self._translated():
            found = {path: stored for path, stored in self._walk(folder) if UNFINISHED not in path}
            if not found:
                self._check_root()
            return found

    def write(self, path: str, data: bytes) -> None:
        with self._translated(), _Unfinished(self._root / path) as file:
            file.write(data)

    def upload(self, file: Path, path: str, on_progress: OnProgress) -> None:
        with self._translated(), file.open("rb") as source, _Unfinished(self._root / path) as target:
            _copy(source, target, on_progress)

    def download(self, path: str, file: Path, on_progress: OnProgress) -> bool:
        with self._translated():
            try:
                source = (self._root / path).open("rb")
            except FileNotFoundError:
                self._check_root()
                return False
            with source, file.open("wb") as target:
                _copy(source, target, on_progress)
        return True

    def delete(self, paths: Iterable[str]) -> None:
        with self._translated():
            for path in paths:
                file = self._root / path
                file.unlink(missing_ok=True)
                with suppress(OSError):  # the folders above are not empty, or not ours to remove
                    for folder in file.parents[: len(Path(path).parts) - 1]:
                        folder.rmdir()

    def unfinished(self) -> Mapping[str, Stored]:
        with self._translated():
            return {path: stored for path, stored in self._walk("") if UNFINISHED in path}

    def discard(self, name: str) -> None:
        self.delete([name])

    def _walk(self, folder: str) -> Iterator[tuple[str, Stored]]:
        try:
            entries = os.scandir(self._root / folder)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir():
                    yield from self._walk(path)
                    continue
                try:
                    found = entry.stat()
                except FileNotFoundError:
                    continue
                yield path, Stored(found.st_size, found.st_mtime)

    def _check_root(self) -> None:
        """Tells a folder that is gone, such as a volume that was unmounted, from one without such an object."""
        is_there = self._root.is_dir()
        if self._was_there and not is_there:
            raise FileNotFoundError(errno.ENOENT, "it is not there any more")
        self._was_there = is_there

    def _translated(self) -> AbstractContextManager[None]:
        return translated(f"the adapter registry {self.url}")


class _Unfinished:
    """A file that takes the place of `target` when the block ends without an error, and is gone otherwise."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> BinaryIO:
        folder = self._target.parent
        for left in reversed(range(MKDIR_ATTEMPTS)):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                number, name = tempfile.mkstemp(prefix=UNFINISHED, dir=folder)
                break
            except (FileNotFoundError, FileExistsError):  # a delete has just removed the empty folder
                if not left:
                    raise
        self._path = Path(name)
        self._file = os.fdopen(number, "wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if kind is None:
                    self._file.flush()
                    os.fchmod(self._file.fileno(), 0o644)  # others, such as the service's user, read it
                    os.fsync(self._file.fileno())
            if kind is None:
                self._path.replace(self._target)
        finally:
            self._path.unlink(missing_ok=True)


def _copy(source: BinaryIO, target: BinaryIO, on_progress: OnProgress) -> None:
    total, done = os.fstat(source.fileno()).st_size, 0
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        done += len(chunk)
        on_progress(done, total)
