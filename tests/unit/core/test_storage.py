"""What every storage promises, on a folder and through fsspec (in memory); S3 itself is in tests/integration."""

import errno
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from fleets import threads

from lorafleet.core import folder_storage
from lorafleet.core.errors import ConfigError, StorageUnavailable
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.object_storage import ObjectStorage
from lorafleet.core.storage import Storage, open_storage


@pytest.fixture(params=["folder", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "fleet [1]") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/a")


def quiet(done: int, total: int) -> None: ...


def test_what_is_written_is_read_found_and_deleted(storage: Storage) -> None:
    assert storage.find("") == storage.find("a") == {}
    start = time.time()
    storage.write("a/b/one", b"1")
    storage.write("a/b/one", b"11")
    storage.write("ab/two~x", b"2")
    assert storage.read("a/b/one") == b"11"
    assert (storage.read("none"), storage.size("none"), storage.size("a/b/one")) == (None, None, 2)
    assert storage.read_all(["a/b/one", "none", "ab/two~x"]) == {"a/b/one": b"11", "ab/two~x": b"2"}
    assert set(storage.find("a")) == {"a/b/one"}
    assert set(storage.find("")) == {"a/b/one", "ab/two~x"}
    stored = storage.find("a")["a/b/one"]
    assert stored.size_bytes == 2
    assert start - 2 <= stored.modified_s <= time.time() + 2
    storage.delete(["a/b/one", "none"])
    assert storage.find("a") == storage.unfinished() == {}
    assert set(storage.find("")) == {"ab/two~x"}


def test_files_go_up_and_down_with_progress(storage: Storage, tmp_path: Path) -> None:
    data = os.urandom(9 << 20)
    (tmp_path / "up").write_bytes(data)
    steps: list[tuple[int, int]] = []
    storage.upload(tmp_path / "up", "x/file", lambda done, total: steps.append((done, total)))
    assert storage.size("x/file") == len(data)
    assert steps[-1] == (len(data), len(data))
    steps.clear()
    assert storage.download("x/file", tmp_path / "down", lambda done, total: steps.append((done, total)))
    assert (tmp_path / "down").read_bytes() == data
    assert steps[-1] == (len(data), len(data))
    assert steps == sorted(steps)
    assert not storage.download("x/none", tmp_path / "down", quiet)


@pytest.fixture
def folder(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path / "fleet")


def test_an_interrupted_write_leaves_the_old_file(folder: FolderStorage, tmp_path: Path) -> None:
    folder.write("x", b"old")
    (tmp_path / "large").write_bytes(bytes(10 << 20))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.upload(tmp_path / "large", "x", stop)
    assert folder.read("x") == b"old"
    assert [file.name for file in (tmp_path / "fleet").iterdir()] == ["x"]


def test_what_a_killed_write_leaves_is_unfinished(folder: FolderStorage, tmp_path: Path) -> None:
    folder.write("a/x", b"old")
    rest = f"a/{folder_storage.UNFINISHED}k1"
    (tmp_path / "fleet" / rest).write_bytes(b"half")
    assert set(folder.find("")) == {"a/x"}
    assert {path: stored.size_bytes for path, stored in folder.unfinished().items()} == {rest: 4}
    folder.discard(rest)
    assert folder.unfinished() == {}


def test_empty_folders_go_with_their_last_file(folder: FolderStorage, tmp_path: Path) -> None:
    folder.write("a/b/c/x", b"1")
    folder.write("a/y", b"1")
    folder.delete(["a/b/c/x"])
    assert [file.name for file in (tmp_path / "fleet" / "a").iterdir()] == ["y"]
    folder.delete(["a/y"])
    assert (tmp_path / "fleet").is_dir()


def test_writing_while_others_remove_the_empty_folder(folder: FolderStorage) -> None:
    def write_and_delete(name: str) -> None:
        for _ in range(100):
            folder.write(f"a/b/{name}", b"1")
            assert folder.read(f"a/b/{name}") == b"1"
            folder.delete([f"a/b/{name}"])

    threads(*[lambda name=name: write_and_delete(name) for name in "wxyz"])  # type: ignore[misc]


def test_a_listing_does_not_miss_what_stays_while_others_go(folder: FolderStorage) -> None:
    for number in range(50):
        folder.write(f"a/stays-{number}", b"1")
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            folder.write("a/goes", b"1")
            folder.delete(["a/goes"])

    def look() -> None:
        try:
            for _ in range(200):
                assert sum("stays" in path for path in folder.find("a")) == 50
        finally:
            stop.set()

    threads(churn, look)


# --- a store that cannot be used ---


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "is full (No space left on device): free some space there."),
        (errno.EACCES, "denies access (Permission denied): check its permissions and your credentials."),
        (errno.EIO, "cannot be used (Input/output error): check registry.url and that it can be reached."),
    ],
)
def test_a_disk_s_errors_are_one_sentence(
    folder: FolderStorage, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    folder.write("x", b"old")
    monkeypatch.setattr(folder_storage.os, "fsync", fail)
    with pytest.raises(StorageUnavailable) as raised:
        folder.write("x", b"new")
    assert raised.value.message == f"the adapter registry {folder.url} {words}"
    assert folder.read("x") == b"old"
    assert folder.unfinished() == {}


@pytest.mark.parametrize("act", ["read", "size", "find", "write", "upload", "download", "delete"])
def test_every_method_translates(tmp_path: Path, act: str) -> None:
    (tmp_path / "file").write_text("no folder")
    storage = FolderStorage(tmp_path / "file")
    acts: dict[str, Callable[[], object]] = {
        "read": lambda: storage.read("x"),
        "size": lambda: storage.size("x"),
        "find": lambda: storage.find(""),
        "write": lambda: storage.write("x/y", b""),
        "upload": lambda: storage.upload(tmp_path / "file", "x", quiet),
        "download": lambda: storage.download("x", tmp_path / "out", quiet),
        "delete": lambda: storage.delete(["x"]),
    }
    with pytest.raises(StorageUnavailable, match=r"the adapter registry .*/file cannot be used \("):
        acts[act]()


@pytest.mark.parametrize("act", ["read_all", "upload"])
def test_an_s3_that_is_down_is_one_sentence_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    (tmp_path / "file").write_text("x")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        storage = open_storage("s3://fleet/x", endpoint_url=f"http://127.0.0.1:{taken.getsockname()[1]}")
        acts: dict[str, Callable[[], object]] = {
            "read_all": lambda: storage.read_all(["x", "y"]),
            "upload": lambda: storage.upload(tmp_path / "file", "x", quiet),
        }
        start = time.monotonic()
        with pytest.raises(StorageUnavailable, match="s3://fleet/x cannot be used .Could not connect") as raised:
            acts[act]()
    assert time.monotonic() - start < 8  # 0.3 to 1.5 s on an idle machine
    assert "\n" not in raised.value.message


def test_missing_credentials_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StorageUnavailable, match=r"denies access \(Unable to locate credentials\): check its perm"):
        open_storage("s3://fleet", endpoint_url="http://127.0.0.1:9").read("x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file://host/x", "names a host: write file:///path."),
        ("s4://bucket", "cannot be used: Protocol not known: s4"),
        ("s3://", "names no bucket: write s3://bucket/folder."),
    ],
)
def test_a_url_that_cannot_be_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        open_storage(url)
    assert words in raised.value.message
    assert raised.value.param == "registry.url"


def test_paths_and_file_urls_are_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert open_storage("fleet").url == str(tmp_path / "fleet")
    assert open_storage(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    assert open_storage("~/fleet").url == f"{tmp_path}/me/fleet"
    assert isinstance(open_storage("memory://x/y"), ObjectStorage)
