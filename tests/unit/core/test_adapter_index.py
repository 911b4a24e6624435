"""The index: complete at any moment, whoever writes and folds, and quick."""

import shutil
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fleets import FACTS, Crash, Meddled, push, registry_at, threads

from lorafleet.core import adapter_index
from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.adapter_index import SNAPSHOTS, AdapterIndex
from lorafleet.core.adapter_record import alias_path, manifest_path, read_all_records
from lorafleet.core.errors import AdapterNotFound, StorageUnavailable
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.manifest import Manifest
from lorafleet.core.object_storage import ObjectStorage
from lorafleet.core.registry import Registry

pytestmark = pytest.mark.usefixtures("unsafe_but_quick")


class MemoryStorage(ObjectStorage):
    """Quick, so that much happens at once."""

    def __init__(self) -> None:
        super().__init__(f"memory://{uuid.uuid4().hex}")


def test_the_index_loses_nothing_while_all_write_and_fold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_index, "FOLD_AT", 2)
    storage = MemoryStorage()
    over = threading.Event()
    mine: dict[int, list[str]] = {}

    def write(worker: int) -> None:
        fleet = Registry(storage, AdapterCache(tmp_path / str(worker), 1 << 30))
        for number in range(12):
            push(fleet, f"a-{worker}-{number}", b"x")
            assert f"a-{worker}-{number}" in {entry.name for entry in fleet.entries()}
            if number % 3 == 2:
                fleet.delete(f"a-{worker}-{number}")
                assert f"a-{worker}-{number}" not in {entry.name for entry in fleet.entries()}
            push(fleet, "shared", f"{worker}-{number}".encode())
        mine[worker] = [f"a-{worker}-{number}" for number in range(12) if number % 3 != 2]

    def look() -> None:
        index = AdapterIndex(storage)
        while not over.is_set():
            index.entries()

    def work() -> None:
        try:
            threads(*[lambda worker=worker: write(worker) for worker in range(4)])  # type: ignore[misc]
        finally:
            over.set()

    threads(work, look, look)
    truth = {name: record.entry for name, record in read_all_records(storage).items()}
    assert set(truth) == {"shared", *(name for names in mine.values() for name in names)}
    assert len(truth["shared"].versions) == 48
    assert AdapterIndex(storage).entries() == truth
    assert len(storage.find("index")) <= 4  # folded


@pytest.mark.parametrize("method", ["find", "read", "read_all", "write", "delete"])
@pytest.mark.parametrize("act", ["push", "delete", "push and fold", "delete and fold"])
def test_others_act_at_any_moment_of_a_fold(tmp_path: Path, method: str, act: str) -> None:
    for number in range(1, 8):
        folder = tmp_path / str(number)
        fleet = registry_at(folder, tmp_path / "cache")
        for name in "abc":
            push(fleet, name)
        fleet.entries()
        push(fleet, "d")
        fold_of_two = AdapterIndex(FolderStorage(folder))
        fold_of_two.rebuild(before_s=0)  # a second snapshot: the first has no d
        push(fleet, "e")

        def meddle(fleet: Registry = fleet, other: AdapterIndex = fold_of_two) -> None:
            if "push" in act:
                push(fleet, "f")
                push(fleet, "a", b"new")
            else:
                fleet.delete("a")
                fleet.delete("d")
            if "fold" in act:
                other.rebuild(before_s=0)

        AdapterIndex(Meddled(folder, method, number, meddle)).rebuild(before_s=0)
        truth = {name: record.entry for name, record in read_all_records(FolderStorage(folder)).items()}
        assert AdapterIndex(FolderStorage(folder)).entries() == truth
        assert AdapterIndex(Meddled(folder, method, number, lambda: None)).entries() == truth


def test_a_fold_between_the_listings_hides_no_change(fleet: Registry, tmp_path: Path) -> None:
    """With the old snapshot in memory, nothing vanishes under the reader."""
    folder = tmp_path / "fleet"
    for number in range(1, 7):
        push(fleet, "a")
        AdapterIndex(FolderStorage(folder)).rebuild(before_s=0)
        reader = AdapterIndex(
            Meddled(folder, "find", number, lambda: AdapterIndex(FolderStorage(folder)).rebuild(before_s=0))
        )
        reader.entries()
        push(fleet, f"b-{number}")
        assert f"b-{number}" in reader.entries()


def test_a_change_that_is_not_over_is_not_folded(tmp_path: Path) -> None:
    class FoldedThenKilled(FolderStorage):
        def write(self, path: str, data: bytes) -> None:
            if path.endswith("manifest.json"):
                AdapterIndex(FolderStorage(tmp_path / "fleet")).rebuild(before_s=0)
                super().write(path, data)
                raise Crash
            super().write(path, data)

    fleet = registry_at(tmp_path / "fleet")
    push(fleet, "a")
    with pytest.raises(Crash):
        push(Registry(FoldedThenKilled(tmp_path / "fleet"), AdapterCache(tmp_path / "cache", 1 << 30)), "b")
    assert [entry.name for entry in fleet.entries()] == ["a", "b"]


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("many") / "fleet"
    storage = FolderStorage(folder)
    manifest = Manifest.model_validate(
        {**FACTS.model_dump(), "name": "x", "version": "0" * 64, "size_bytes": 1000, "pushed_at": datetime.now(UTC)}
    )
    for number in range(10_000):
        name, version = f"adapter-{number:05}", f"{number:064x}"
        file = folder / manifest_path(name, version)
        file.parent.mkdir(parents=True)
        file.write_text(manifest.model_copy(update={"name": name, "version": version}).model_dump_json())
        (folder / alias_path(name, "latest")).parent.mkdir()
        (folder / alias_path(name, "latest")).write_text(version)
    AdapterIndex(storage).entries()  # builds it
    yield folder
    shutil.rmtree(folder)  # pytest would keep three of them, and take seconds for each


def test_ten_thousand_are_listed_within_a_second(ten_thousand: Path) -> None:
    def listed_in_s(fleet: Registry, count: int) -> float:
        start = time.monotonic()
        assert len(fleet.entries()) == count
        return time.monotonic() - start

    # 0.15 s on an idle machine; other tests may run beside this one
    assert min(listed_in_s(registry_at(ten_thousand), 10_000) for _ in range(3)) < 1
    fleet = registry_at(ten_thousand)
    push(fleet, "adapter-00000", b"new")
    push(fleet, "new")
    assert min(listed_in_s(fleet, 10_001) for _ in range(3)) < 1
    with pytest.raises(AdapterNotFound, match="did you mean adapter-"):
        fleet.resolve("adaptor-00001")


def test_a_missing_or_damaged_index_is_made_again(fleet: Registry, tmp_path: Path) -> None:
    for name in "abc":
        push(fleet, name)
    expected = fleet.entries()
    (snapshot,) = (tmp_path / "fleet" / SNAPSHOTS).iterdir()
    for damage in ("", "{", '{"a": {}}'):
        snapshot.write_text(damage)
        assert registry_at(tmp_path / "fleet").entries() == expected
        assert snapshot.exists()
    snapshot.unlink()
    assert registry_at(tmp_path / "fleet").entries() == expected
    assert snapshot.exists()


def test_who_may_only_read_lists_too(fleet: Registry, tmp_path: Path) -> None:
    class ReadOnly(FolderStorage):
        def write(self, path: str, data: bytes) -> None:
            raise StorageUnavailable("no writing")

    for name in "abc":
        push(fleet, name)
    reader = Registry(ReadOnly(tmp_path / "fleet"), AdapterCache(tmp_path / "cache", 1 << 30))
    assert [entry.name for entry in reader.entries()] == ["a", "b", "c"]
    with pytest.raises(StorageUnavailable, match="no writing"):
        push(reader, "d")
    assert [entry.name for entry in reader.entries()] == ["a", "b", "c"]
