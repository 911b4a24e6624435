"""Files of a data set, through fsspec: a disk, S3, or what else it knows."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, BinaryIO, Final, cast

import fsspec

from lorafleet.core.errors import ConfigError, DataNotFound, DataUnreadable
from lorafleet.core.object_storage import errors_of, s3_options
from lorafleet.core.storage import translated

THREADS: Final = 16


class Files:
    """Reads below `url`, which may be a folder or one file. Safe for several threads; can be pickled."""

    def __init__(self, url: str, endpoint_url: str | None = None) -> None:
        """Asks nobody yet. Raises ConfigError for a URL that fsspec has no file system for."""
        self.url = url
        self._endpoint_url = endpoint_url
        self._is_s3 = url.startswith(("s3://", "s3a://"))
        options = s3_options(endpoint_url) if self._is_s3 else {}
        try:
            self._fs, root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            hint = 'pip install "lorafleet[s3]"' if self._is_s3 else str(error)
            raise ConfigError(f"data {url} needs a library: {hint}.", param="data") from error
        except ValueError as error:
            raise ConfigError(f"data {url} cannot be used: {error}.", param="data") from error
        self._root = root.rstrip("/") or root
        self._errors = errors_of(self._is_s3)

    def __reduce__(self) -> tuple[object, ...]:
        return Files, (self.url, self._endpoint_url)

    def list(self) -> list[str]:
        """All files below the URL, sorted, as paths below it; hidden ones are left out. The file's own name where the
        URL is one file. Raises DataNotFound."""
        with self.translated():
            try:
                found: Mapping[str, Any] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                found = {}
            if not found and not self._fs.exists(self._root):
                raise DataNotFound(f"there is no folder or file {self.url}: check the path.", param="data")
        if set(found) == {self._root}:  # one file
            self._root, _, name = self._root.rpartition("/")
            self.url = self.url.rstrip("/").rpartition("/")[0] or "."
            return [name]
        names = (name.removeprefix(self._root).lstrip("/") for name in found)
        return sorted(name for name in names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/")))

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes from `start` to before `end`. Raises DataUnreadable where there is no such file, StorageUnavailable."""
        with self.translated():
            try:
                return bytes(self._fs.cat_file(self._at(name), start=start, end=end))
            except FileNotFoundError:
                raise DataUnreadable(f"{name} is not in {self.url} any more: start again.", param="data") from None

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """Several at once, which a bucket answers faster than one after the other."""
        listed = list(names)
        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(listed, pool.map(self.read, listed), strict=True))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """To seek and read in. The lower library's errors as StorageUnavailable."""
        with self.translated(), self._fs.open(self._at(name), "rb") as file:
            yield cast(BinaryIO, file)

    @contextmanager
    def translated(self) -> Iterator[None]:
        with translated(f"the data {self.url}", self._errors, "the path or URL"):
            yield

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name
