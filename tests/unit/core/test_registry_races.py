"""The registry while others act on it at once."""

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from fleets import Meddled, push, registry_at, seen

from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.adapter_record import read_all_records
from lorafleet.core.errors import AdapterInUse, AdapterNotFound, LorafleetError, StorageUnavailable
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.registry import Registry
from lorafleet.core.storage import OnProgress

pytestmark = pytest.mark.usefixtures("unsafe_but_quick")


def _pusher(folder: str, worker: int) -> None:
    fleet = registry_at(Path(folder), Path(f"{folder}-cache-{worker}"))
    for number in range(6):
        push(fleet, "shared", f"{worker}-{number}".encode())
        push(fleet, f"own-{worker}-{number}", b"x")
    fleet.alias("shared", f"alias-{worker}", "latest")
    fleet.delete(f"own-{worker}-0")


def test_several_processes_push_the_same_name(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_pusher, args=(str(tmp_path / "fleet"), worker)) for worker in range(3)]
    for process in processes:
        process.start()
    fleet = registry_at(tmp_path / "fleet")
    while any(process.is_alive() for process in processes):
        for entry in fleet.entries():
            assert fleet.resolve(f"{entry.name}@latest").manifest.name == entry.name if entry.name == "shared" else True
    for process in processes:
        process.join()
        assert process.exitcode == 0
    shared = fleet.record("shared")
    assert len(shared.manifests) == 18
    assert set(shared.aliases) == {"latest", "alias-0", "alias-1", "alias-2"}
    truth = {name: record.entry for name, record in read_all_records(FolderStorage(tmp_path / "fleet")).items()}
    assert len(truth) == 1 + 3 * 5
    assert {entry.name: entry for entry in fleet.entries()} == truth
    assert {entry.name: entry for entry in registry_at(tmp_path / "fleet").entries()} == truth


@pytest.mark.parametrize("number", range(1, 10))
def test_a_push_and_a_delete_of_the_same_bytes_leave_no_half(tmp_path: Path, number: int) -> None:
    for method in ("read", "write", "delete", "upload", "size", "find"):
        for first, second in ((push_plush, delete_plush), (delete_plush, push_plush)):
            folder = tmp_path / f"{method}-{first.__name__}"
            fleet = registry_at(folder)
            push_plush(fleet)
            storage = Meddled(folder, method, number, lambda act=second, fleet=fleet: act(fleet))
            first(Registry(storage, AdapterCache(tmp_path / "cache", 1 << 30)))
            seen(folder)  # each version that is there has its file


def push_plush(fleet: Registry) -> None:
    push(fleet, "plush")


def delete_plush(fleet: Registry) -> None:
    with suppress(AdapterNotFound):
        fleet.delete("plush")


@pytest.mark.parametrize("number", range(1, 8))
def test_an_alias_set_while_its_version_is_deleted_does_not_dangle(tmp_path: Path, number: int) -> None:
    for method in ("read", "write", "delete", "find", "read_all"):
        for which in ("alias", "delete"):
            folder = tmp_path / f"{method}-{which}"
            fleet = registry_at(folder)
            one = push(fleet, "plush", b"1")
            push(fleet, "plush", b"2")
            acts: dict[str, Callable[[Registry], object]] = {
                "alias": lambda fleet, one=one: fleet.promote(f"plush@{one.version}"),
                "delete": lambda fleet, one=one: fleet.delete(f"plush@{one.version}"),
            }
            other = acts["delete" if which == "alias" else "alias"]

            def meddle(act: Callable[[Registry], object] = other, fleet: Registry = fleet) -> None:
                with suppress(LorafleetError):
                    act(fleet)

            storage = Meddled(folder, method, number, meddle)
            with suppress(AdapterInUse, AdapterNotFound):
                acts[which](Registry(storage, AdapterCache(tmp_path / "cache", 1 << 30)))
            seen(folder)
            fleet.resolve("plush")


def test_a_file_that_a_delete_took_from_a_push_is_uploaded_again(tmp_path: Path) -> None:
    class Taken(FolderStorage):
        taken = 0

        def write(self, path: str, data: bytes) -> None:
            super().write(path, data)
            if path.endswith("manifest.json"):
                self.take(path)

        def upload(self, file: Path, path: str, on_progress: OnProgress) -> None:
            super().upload(file, path, on_progress)
            if self.taken < times and self.taken:
                self.take(path)

        def take(self, path: str) -> None:
            self.taken += 1
            self.delete([path.replace("manifest.json", "adapter.safetensors")])

    for times in (1, 2):
        push(Registry(Taken(tmp_path / "fleet"), AdapterCache(tmp_path / "cache", 1 << 30)), f"plush-{times}")
    times = 99
    with pytest.raises(StorageUnavailable, match="does not keep the file of plush-99@"):
        push(Registry(Taken(tmp_path / "fleet"), AdapterCache(tmp_path / "cache", 1 << 30)), "plush-99")
    fleet = registry_at(tmp_path / "fleet", tmp_path / "cache2")
    assert [fleet.pull(entry.manifest).read_bytes() for entry in fleet.entries()] == [b"weights"] * 2
