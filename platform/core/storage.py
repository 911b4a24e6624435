"""Where adapters are stored: a folder, or a bucket of an object store.

What every storage promises, and the registry builds on: an object is written whole or not at all, whatever is
interrupted; once written, every later read and listing sees it (S3 says so since 2020; NFS only after its attribute
cache, some seconds). There are no locks and no conditional writes, which not every store has.
"""

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from lorafleet.core.errors import ConfigError, StorageUnavailable

OnProgress = Callable[[int, int], None]
"""Is told (bytes done, bytes in all); may be called in another thread."""
MAX_OBJECT_BYTES: Final = 256 << 20  # of what is read into memory; an index of 10,000 adapters has 6 MB


@dataclass(frozen=True)
class Stored:
    """An object's size, and when it was written by the store's own clock (seconds since 1970)."""

    size_bytes: int
    modified_s: float


class Storage(ABC):
    """Objects by path, `/` between the parts. Safe for several threads and processes.

    Every method raises StorageUnavailable when the store does not answer, refuses, is full or is not there; what an
    interrupted write leaves is seen by `unfinished` only.
    """

    url: str
    is_local = False
    """Whether a read is a matter of microseconds."""

    @abstractmethod
    def read(self, path: str) -> bytes | None:
        """None if there is no such object."""

    @abstractmethod
    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Those that are there."""

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes; None if there is no such object."""

    @abstractmethod
    def find(self, folder: str) -> dict[str, Stored]:
        """All objects below `folder`, those in folders of it too; none if there is no such folder.

        An object that is there from the call's start to its end is in the result, whatever others do meanwhile.
        """

    @abstractmethod
    def write(self, path: str, data: bytes) -> None:
        """Replaces what was there."""

    @abstractmethod
    def upload(self, file: Path, path: str, on_progress: OnProgress) -> None:
        """Replaces what was there."""

    @abstractmethod
    def download(self, path: str, file: Path, on_progress: OnProgress) -> bool:
        """False if there is no such object. Interrupted, `file` holds a part of it."""

    @abstractmethod
    def delete(self, paths: Iterable[str]) -> None:
        """In any order; no error if one is not there."""

    @abstractmethod
    def unfinished(self) -> Mapping[str, Stored]:
        """What interrupted writes left, and what running ones hold, by a name for `discard`."""

    @abstractmethod
    def discard(self, name: str) -> None:
        """Removes one of `unfinished`."""


def open_storage(url: str, *, endpoint_url: str | None = None) -> Storage:
    """A path, a `file:` URL, or what fsspec has a file system for, such as `s3://bucket/folder`. Asks nobody yet.

    `endpoint_url`: of an S3 that is not Amazon's. Raises ConfigError.
    """
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise ConfigError(f"registry.url {url} names a host: write file:///path.", param="registry.url")
        return _folder(Path(unquote(parts.path)))
    if "://" not in url:
        return _folder(Path(url))
    from lorafleet.core.object_storage import ObjectStorage

    return ObjectStorage(url, endpoint_url)


def _folder(path: Path) -> Storage:
    from lorafleet.core.folder_storage import FolderStorage

    return FolderStorage(path.expanduser().absolute())


@contextmanager
def translated(
    where: str, kinds: tuple[type[Exception], ...] = (OSError,), setting: str = "registry.url"
) -> Iterator[None]:
    """The lower library's errors as StorageUnavailable; `setting` is what says where that is."""
    try:
        yield
    except kinds as error:
        raise StorageUnavailable(f"{where} {_reason(error, setting)}.") from error


def _reason(error: Exception, setting: str) -> str:
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines() or [type(error).__name__]
    said = lines[0].strip().rstrip(".:")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return f"is full ({said}): free some space there"
    if isinstance(error, PermissionError) or "credentials" in said.lower():
        return f"denies access ({said}): check its permissions and your credentials"
    return f"cannot be used ({said}): check {setting} and that it can be reached"
