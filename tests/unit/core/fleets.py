"""Parts of the registry's tests: a registry on a folder, what users see of one, and others who act beside them."""

import io
import threading
from collections.abc import Callable
from pathlib import Path

from lorafleet.core.adapter_cache import AdapterCache, sha256
from lorafleet.core.adapter_index import CHANGES, SNAPSHOTS
from lorafleet.core.adapter_record import file_path, read_all_records
from lorafleet.core.errors import AdapterNotFound, AdapterUnreadable
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.manifest import AdapterFacts, Manifest
from lorafleet.core.registry import Registry

BASE = "ba5e" * 16
FACTS = AdapterFacts(format="diffusers", rank=4, alpha=8, modules={"unet": 12}, fits_fingerprint=BASE)


def check(file: Path) -> AdapterFacts:
    """Stands in for the model's own check, which needs torch."""
    if file.read_bytes().startswith(b"bad"):
        raise AdapterUnreadable(f"{file.name} is bad.")
    return FACTS


def registry_at(folder: Path, cache: Path | None = None) -> Registry:
    return Registry(FolderStorage(folder), AdapterCache(cache or folder.with_name("cache"), 1 << 30))


def push(fleet: Registry, name: str, data: bytes = b"weights") -> Manifest:
    return fleet.push(name, io.BytesIO(data), check)


class Crash(BaseException):
    """The process ends here."""


def seen(folder: Path) -> dict[str, object]:
    """Everything that users can see."""
    fleet = registry_at(folder)
    state: dict[str, object] = {}
    for name in ("plush", "other"):
        try:
            record = fleet.record(name)
        except AdapterNotFound:
            continue
        for manifest in record.manifests:
            assert fleet.pull(manifest).exists()
        files = {each.version: sha256(folder / file_path(name, each.version)) for each in record.manifests}
        assert all(version == digest for version, digest in files.items())
        state[name] = (set(files), record.entry.aliases, fleet.resolve(name, draw=0.0).manifest.version)
    listed = {entry.name: entry for entry in fleet.entries()}
    assert listed == {name: record.entry for name, record in read_all_records(FolderStorage(folder)).items()}
    return state


def leftovers(folder: Path) -> list[str]:
    """Files that belong to nothing."""
    storage = FolderStorage(folder)
    found = storage.find("")
    files = [path for path in found if path.endswith("adapter.safetensors")]
    alone = [path for path in files if path.replace("adapter.safetensors", "manifest.json") not in found]
    index = [path for path in found if path.startswith(CHANGES)]
    snapshots = [path for path in found if path.startswith(SNAPSHOTS)][1:]
    return [*alone, *index, *snapshots, *storage.unfinished()]


def threads(*tasks: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


class Meddled(FolderStorage):
    """Lets others act just before the n-th call of a method."""

    def __init__(self, root: Path, method: str, number: int, act: Callable[[], object]) -> None:
        super().__init__(root)
        self._method, self._left, self._act = method, number, act

    def __getattribute__(self, name: str) -> object:
        if not name.startswith("_") and name == self._method:
            self._left -= 1
            if self._left == 0:
                self._act()
        return super().__getattribute__(name)
