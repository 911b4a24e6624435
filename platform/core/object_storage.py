"""Objects in a bucket, through fsspec: S3 and what speaks its protocol, and every other store that fsspec knows."""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import fsspec
from fsspec.callbacks import Callback

from lorafleet.core.errors import ConfigError, StorageUnavailable
from lorafleet.core.storage import MAX_OBJECT_BYTES, OnProgress, Storage, Stored, translated

CONNECT_TIMEOUT_S: Final = 5
READ_TIMEOUT_S: Final = 30
THREADS: Final = 16


class ObjectStorage(Storage):
    """Uploads become visible when they are whole; that is what object stores do, with large ones in parts too."""

    def __init__(self, url: str, endpoint_url: str | None = None) -> None:
        """Credentials come from where the store's own library looks (for S3 `AWS_*`, `~/.aws`, the machine's role).

        Raises ConfigError for a URL that fsspec has no file system for.
        """
        self.url = url
        self._is_s3 = url.startswith(("s3://", "s3a://"))
        options = s3_options(endpoint_url) if self._is_s3 else {}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **options)
            if self._is_s3:
                self._fs.retries = 2  # botocore tries each twice: a registry that is down is known within seconds
            self._errors = errors_of(self._is_s3)
        except ImportError as error:
            hint = 'pip install "lorafleet[s3]"' if self._is_s3 else str(error)
            raise ConfigError(f"registry.url {url} needs a library: {hint}.", param="registry.url") from error
        except ValueError as error:
            raise ConfigError(f"registry.url {url} cannot be used: {error}.", param="registry.url") from error
        if not self._root.strip("/"):
            raise ConfigError(f"registry.url {url} names no bucket: write s3://bucket/folder.", param="registry.url")
        self._root = self._root.rstrip("/")

    def read(self, path: str) -> bytes | None:
        with self._translated():
            try:
                # with a range s3fs asks once; without, for the size first
                return bytes(self._fs.cat_file(self._at(path), start=0, end=MAX_OBJECT_BYTES))
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None

    def read_all(self, paths: Iterable[str]) -> dict[str, bytes]:
        listed = list(paths)
        with self._translated():
            places = [self._at(path) for path in listed]
            ends = [MAX_OBJECT_BYTES] * len(places)
            found = self._fs.cat_ranges(places, [0] * len(places), ends, on_error="return") if places else []
            answers = dict(zip(listed, found, strict=True))
            for error in answers.values():
                if isinstance(error, FileNotFoundError):
                    self._check_bucket(error)
                elif isinstance(error, BaseException):
                    raise error
        return {path: bytes(data) for path, data in answers.items() if not isinstance(data, BaseException)}

    def size(self, path: str) -> int | None:
        with self._translated():
            try:
                return int(self._fs.info(self._at(path))["size"])
            except FileNotFoundError as error:
                self._check_bucket(error)
                return None

    def find(self, folder: str) -> dict[str, Stored]:
        with self._translated():
            try:
                found = self._fs.find(self._at(folder) if folder else self._root, detail=True)
            except FileNotFoundError as error:
                self._check_bucket(error)
                return {}
        return {self._path(name): _stored(info) for name, info in found.items()}

    def write(self, path: str, data: bytes) -> None:
        with self._translated():
            self._fs.pipe_file(self._at(path), data)

    def upload(self, file: Path, path: str, on_progress: OnProgress) -> None:
        with self._translated():
            self._fs.put_file(str(file), self._at(path), callback=_callback(on_progress))

    def download(self, path: str, file: Path, on_progress: OnProgress) -> bool:
        with self._translated():
            try:
                self._fs.get_file(self._at(path), str(file), callback=_callback(on_progress))
            except FileNotFoundError as error:
                self._check_bucket(error)
                return False
        return True

    def delete(self, paths: Iterable[str]) -> None:
        """Not by S3's delete of many at once: s3fs does not say which of them failed."""

        def delete_one(path: str) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._at(path))

        with self._translated(), ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(delete_one, paths))

    def unfinished(self) -> Mapping[str, Stored]:
        """S3 keeps, and bills, the parts of an upload that nobody finished; other stores show nothing."""
        if not self._is_s3:
            return {}
        bucket, _, prefix = self._root.partition("/")
        with self._translated():
            uploads = self._fs.list_multipart_uploads(bucket)
        found = {}
        for upload in uploads:
            if upload["Key"].startswith(f"{prefix}/" if prefix else ""):
                found[f"{upload['Key']}?uploadId={upload['UploadId']}"] = Stored(0, upload["Initiated"].timestamp())
        return found

    def discard(self, name: str) -> None:
        key, _, upload = name.rpartition("?uploadId=")
        bucket = self._root.partition("/")[0]
        with self._translated(), suppress(FileNotFoundError):
            self._fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload)

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _path(self, name: str) -> str:
        return name.strip("/").removeprefix(self._root.strip("/")).strip("/")

    def _check_bucket(self, error: BaseException) -> None:
        """An object that is not there is an answer, a bucket that is not there is a wrong setting."""
        cause: BaseException | None = error
        while cause is not None:
            response = getattr(cause, "response", None) or {}
            if response.get("Error", {}).get("Code") == "NoSuchBucket":
                raise StorageUnavailable(
                    f"the adapter registry {self.url} has no bucket: create it or correct registry.url."
                ) from error
            cause = cause.__cause__ or cause.__context__

    @contextmanager
    def _translated(self) -> Iterator[None]:
        with translated(f"the adapter registry {self.url}", self._errors):
            yield


def s3_options(endpoint_url: str | None) -> dict[str, Any]:
    """Of s3fs: a store that is down is known within seconds, and a listing is asked for anew."""
    retries = {"max_attempts": 2, "mode": "standard"}
    timeouts = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S}
    options: dict[str, Any] = {"use_listings_cache": False, "config_kwargs": {**timeouts, "retries": retries}}
    return options | ({"endpoint_url": endpoint_url} if endpoint_url else {})


def errors_of(is_s3: bool) -> tuple[type[Exception], ...]:
    """What a request may end with; OSError is what fsspec makes of an answer."""
    if not is_s3:
        return (OSError,)
    from aiohttp import ClientError as ConnectionFailed
    from botocore.exceptions import BotoCoreError, ClientError

    return (OSError, TimeoutError, ConnectionFailed, BotoCoreError, ClientError)


def _callback(on_progress: OnProgress) -> Callback:
    return Callback(hooks={"progress": lambda total, done, **_: on_progress(done, total or done)})


def _stored(info: Mapping[str, Any]) -> Stored:
    written = info.get("LastModified") or info.get("mtime") or info.get("created")
    modified_s = written.timestamp() if isinstance(written, datetime) else float(written or 0.0)
    return Stored(int(info["size"] or 0), modified_s)
