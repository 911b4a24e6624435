"""The registry on a real S3 API over HTTP: moto's server, on this machine's loopback."""

import io
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.adapter_index import CHANGES, SNAPSHOTS
from lorafleet.core.adapter_record import alias_path, file_path, manifest_path, read_all_records
from lorafleet.core.errors import AdapterInUse, AdapterNotFound, AdapterUnreadable, StorageUnavailable
from lorafleet.core.manifest import AdapterFacts, Manifest
from lorafleet.core.object_storage import ObjectStorage
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.core.storage import OnProgress

FACTS = AdapterFacts(format="kohya", rank=8, modules={"unet": 12}, fits_fingerprint="ba5e" * 16)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
        server.stop()


@pytest.fixture
def bucket(endpoint: str) -> str:
    name = f"fleet-{uuid.uuid4().hex[:8]}"
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket=name)
    return name


@pytest.fixture
def storage(endpoint: str, bucket: str) -> ObjectStorage:
    return ObjectStorage(f"s3://{bucket}/some/folder", endpoint)


@pytest.fixture
def fleet(storage: ObjectStorage, tmp_path: Path) -> Registry:
    return Registry(storage, AdapterCache(tmp_path / "cache", 1 << 30))


def check(file: Path) -> AdapterFacts:
    return FACTS


def push(fleet: Registry, name: str, data: bytes = b"weights") -> Manifest:
    return fleet.push(name, io.BytesIO(data), check)


def test_an_adapter_s_life(fleet: Registry, storage: ObjectStorage, endpoint: str, tmp_path: Path) -> None:
    assert fleet.entries() == []
    one, two = push(fleet, "plush", b"1"), push(fleet, "plush", b"2")
    push(fleet, "plusher")
    fleet.promote(f"plush@{one.version[:8]}")
    shares = fleet.alias("plush", "test", {one.version: 1, "latest": 3})
    assert fleet.resolve("plush").manifest == one
    assert fleet.resolve("plush@test", draw=0.99).manifest.version == max(shares)
    assert fleet.pull(two).read_bytes() == b"2"
    assert storage.find("adapters/plush").keys() == {
        *(file_path("plush", each.version) for each in (one, two)),
        *(manifest_path("plush", each.version) for each in (one, two)),
        *(alias_path("plush", alias) for alias in ("latest", "production", "test")),
    }
    other = open_registry(RegistryConfig(url=fleet.url, endpoint_url=endpoint))
    assert [entry.name for entry in other.entries()] == ["plush", "plusher"]
    with pytest.raises(AdapterInUse, match="is in use by the aliases production, test"):
        fleet.delete("plush")
    for alias in ("test", "production"):
        fleet.unalias("plush", alias)
    assert {each.version for each in fleet.delete("plush")} == {one.version, two.version}
    assert storage.find("adapters/plush") == {}
    assert [entry.name for entry in other.entries()] == ["plusher"]
    with pytest.raises(AdapterNotFound, match=r"no adapter plush: did you mean plusher\?"):
        other.resolve("plush")


def test_a_large_file_goes_in_parts(fleet: Registry, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * 101  # s3fs sends files of twice 50 MiB in parts
    steps: list[tuple[int, int]] = []
    (tmp_path / "large.safetensors").write_bytes(data)
    pushed = fleet.push(
        "plush", tmp_path / "large.safetensors", check, on_progress=lambda done, total: steps.append((done, total))
    )
    assert steps[-1] == (len(data), len(data))
    assert len(steps) >= 3
    steps.clear()
    path = fleet.pull(pushed, on_progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == data
    assert steps[-1] == (len(data), len(data))


class Crash(BaseException):
    """The process ends here."""


class CrashingStorage(ObjectStorage):
    """Ends before the n-th write or delete."""

    def __init__(self, url: str, endpoint: str, at: int) -> None:
        super().__init__(url, endpoint)
        self._left = at

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise Crash

    def write(self, path: str, data: bytes) -> None:
        self._count()
        super().write(path, data)

    def upload(self, file: Path, path: str, on_progress: OnProgress) -> None:
        self._count()
        super().upload(file, path, on_progress)

    def delete(self, paths: Iterable[str]) -> None:
        self._count()
        super().delete(paths)


def test_a_crash_at_any_write_leaves_the_old_state_or_the_new(
    fleet: Registry, storage: ObjectStorage, endpoint: str, tmp_path: Path
) -> None:
    is_old = []
    for at in range(1, 7):  # a push writes file, mark, latest, manifest, mark, and deletes a mark
        name = f"plush-{at}"
        old = push(fleet, name, b"old")
        crashing = Registry(CrashingStorage(storage.url, endpoint, at), AdapterCache(tmp_path / "other", 1 << 30))
        with pytest.raises(Crash):
            push(crashing, name, b"new")
        found = fleet.resolve(name).manifest
        assert fleet.pull(found).read_bytes() in (b"old", b"new")
        assert {entry.name: entry for entry in fleet.entries()}[name].manifest == found
        is_old.append(found == old)
    assert is_old == [True, True, True, True, False, False]
    fleet.gc(older_than_s=-60)
    left = set(storage.find(""))
    files = [path for path in left if path.endswith("adapter.safetensors")]
    assert all(path.replace("adapter.safetensors", "manifest.json") in left for path in files)
    assert not [path for path in left if path.startswith(CHANGES)]


def test_gc_ends_uploads_that_nobody_finishes(
    fleet: Registry, storage: ObjectStorage, endpoint: str, bucket: str
) -> None:
    client = boto3.client("s3", endpoint_url=endpoint)
    mine = f"some/folder/{file_path('plush', '1' * 64)}"
    for key in (mine, "somebody/else"):
        upload = client.create_multipart_upload(Bucket=bucket, Key=key)
        client.upload_part(Bucket=bucket, Key=key, UploadId=upload["UploadId"], PartNumber=1, Body=b"part")
    storage.write(file_path("plush", "2" * 64), b"half")
    removed = fleet.gc(older_than_s=-60).removed
    assert len(removed) == 2
    assert removed[0] == file_path("plush", "2" * 64)
    assert removed[1].startswith(mine)
    assert [each["Key"] for each in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == ["somebody/else"]


def test_many_push_and_list_at_once(fleet: Registry, storage: ObjectStorage, endpoint: str, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(worker: int) -> None:
        try:
            mine = Registry(ObjectStorage(storage.url, endpoint), AdapterCache(tmp_path / str(worker), 1 << 30))
            for number in range(2):
                push(mine, "shared", f"{worker}-{number}".encode())
                push(mine, f"own-{worker}-{number}")
                assert f"own-{worker}-{number}" in {entry.name for entry in mine.entries()}
            mine.delete(f"own-{worker}-0")
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert errors == []
    truth = {name: record.entry for name, record in read_all_records(storage).items()}
    assert len(truth) == 1 + 3
    assert len(truth["shared"].versions) == 6
    assert {entry.name: entry for entry in fleet.entries()} == truth


def test_ten_thousand_are_listed_within_a_second(fleet: Registry, storage: ObjectStorage, tmp_path: Path) -> None:
    """The index alone: moto takes minutes for 20,000 objects, and the list does not look at them."""
    push(fleet, "plush")
    (entry,) = fleet.entries()
    (snapshot,) = storage.find(SNAPSHOTS)
    text = entry.model_dump_json()
    names = [f"adapter-{number:05}" for number in range(10_000)]
    many = ",".join(f'"{name}":{text.replace("plush", name)}' for name in [*names, "plush"])
    storage.write(snapshot, f"{{{many}}}".encode())
    seconds = []
    for attempt in range(3):  # a service runs beside it
        start = time.monotonic()
        entries = Registry(storage, AdapterCache(tmp_path / f"other-{attempt}", 1 << 30)).entries()
        seconds.append(time.monotonic() - start)
        assert len(entries) == 10_001
    assert min(seconds) < 1


# --- what can be wrong with a bucket ---


def test_a_bucket_that_is_not_there_is_no_empty_registry(endpoint: str, tmp_path: Path) -> None:
    fleet = Registry(ObjectStorage("s3://no-such-bucket/x", endpoint), AdapterCache(tmp_path / "cache", 1 << 30))
    for act in (fleet.entries, lambda: fleet.resolve("plush"), lambda: push(fleet, "plush"), fleet.gc):
        with pytest.raises(StorageUnavailable, match="s3://no-such-bucket/x has no bucket: create it or correct"):
            act()


def test_a_bucket_that_refuses_is_one_sentence(endpoint: str, bucket: str, fleet: Registry) -> None:
    push(fleet, "plush")
    client = boto3.client("s3", endpoint_url=endpoint)
    client.put_bucket_policy(
        Bucket=bucket,
        Policy='{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", '
        f'"Resource": "arn:aws:s3:::{bucket}/*"}}]}}',
    )
    with pytest.raises(StorageUnavailable, match=r"denies access \(.*\): check its permissions and your credentials"):
        fleet.resolve("plush")


def test_a_server_that_goes_away_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="fleet")
    fleet = Registry(ObjectStorage("s3://fleet", url), AdapterCache(tmp_path / "cache", 1 << 30))
    pushed = push(fleet, "plush")
    fleet.pull(pushed)
    server.stop()
    with pytest.raises(StorageUnavailable, match="the adapter registry s3://fleet cannot be used"):
        fleet.resolve("plush")
    assert fleet.pull(pushed).read_bytes() == b"weights"  # what is here stays usable


def test_a_damaged_object_is_not_pulled(fleet: Registry, storage: ObjectStorage) -> None:
    pushed = push(fleet, "plush")
    storage.write(file_path("plush", pushed.version), b"weightZ")
    with pytest.raises(AdapterUnreadable, match="is damaged, its hash is another one: push it again"):
        fleet.pull(pushed)
    assert pushed.pushed_at <= datetime.now(UTC)
