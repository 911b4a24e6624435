"""The registry on a folder: what it promises to one user, to many at once, and after a crash at any write."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lorafleet.core import adapter_index, registry
from lorafleet.core.adapter_cache import AdapterCache, sha256
from lorafleet.core.adapter_index import CHANGES, SNAPSHOTS, AdapterIndex
from lorafleet.core.adapter_record import alias_path, file_path, manifest_path, read_all_records
from lorafleet.core.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnreadable,
    InvalidRequest,
    LorafleetError,
    StorageUnavailable,
)
from lorafleet.core.folder_storage import UNFINISHED, FolderStorage
from lorafleet.core.manifest import AdapterFacts, Manifest, Reference, check_shares, read_alias, write_alias
from lorafleet.core.object_storage import ObjectStorage
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.core.storage import OnProgress, Storage

BASE = "ba5e" * 16
FACTS = AdapterFacts(format="diffusers", rank=4, alpha=8, modules={"unet": 12}, fits_fingerprint=BASE)


def check(file: Path) -> AdapterFacts:
    """Stands in for the model's own check, which needs torch."""
    if file.read_bytes().startswith(b"bad"):
        raise AdapterUnreadable(f"{file.name} is bad.")
    return FACTS


def registry_at(folder: Path, cache: Path | None = None) -> Registry:
    return Registry(FolderStorage(folder), AdapterCache(cache or folder.with_name("cache"), 1 << 30))


@pytest.fixture(autouse=True, scope="module")
def unsafe_but_quick() -> Iterator[None]:
    """Whether a disk keeps what it said it keeps is not tested here, and thousands of writes are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


@pytest.fixture
def fleet(tmp_path: Path) -> Registry:
    return registry_at(tmp_path / "fleet")


def push(fleet: Registry, name: str, data: bytes = b"weights") -> Manifest:
    return fleet.push(name, io.BytesIO(data), check)


# --- one user ---


def test_what_is_pushed_is_resolved_listed_and_pulled(fleet: Registry, tmp_path: Path) -> None:
    assert fleet.entries() == []
    (tmp_path / "plush.safetensors").write_bytes(b"weights")
    steps: list[tuple[int, int]] = []
    pushed = fleet.push(
        "plush", tmp_path / "plush.safetensors", check, on_progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(7, 7)]
    assert (pushed.name, pushed.size_bytes, pushed.rank, pushed.alpha) == ("plush", 7, 4, 8.0)
    assert pushed.version == sha256(tmp_path / "plush.safetensors")
    found = fleet.resolve("plush")
    assert (found.manifest, found.alias) == (pushed, "latest")
    path = fleet.pull(found.manifest, on_progress=lambda done, total: steps.append((done, total)))
    assert path.read_bytes() == b"weights"
    assert steps == [(7, 7), (7, 7)]
    assert fleet.pull(found.manifest) == path  # from the cache
    (entry,) = fleet.entries()
    assert (entry.name, entry.manifest, entry.versions) == ("plush", pushed, (pushed.version,))
    assert entry.aliases == {"latest": {pushed.version: 1.0}}
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing of the way in is left


def test_the_layout_is_the_documented_one(fleet: Registry, tmp_path: Path) -> None:
    version = push(fleet, "plush").version
    fleet.promote("plush")
    folder = tmp_path / "fleet" / "adapters" / "plush"
    assert (folder / version / "adapter.safetensors").read_bytes() == b"weights"
    assert json.loads((folder / version / "manifest.json").read_text())["version"] == version
    assert (folder / "aliases" / "production").read_text() == f"{version}\n"
    assert (folder / "aliases" / "latest").read_text() == f"{version}\n"


def test_a_bare_name_means_production_else_the_latest(fleet: Registry) -> None:
    one, two = push(fleet, "plush", b"1"), push(fleet, "plush", b"2")
    assert fleet.resolve("plush").manifest == two
    fleet.promote(f"plush@{one.version[:8]}")
    assert (fleet.resolve("plush").manifest, fleet.resolve("plush").alias) == (one, "production")
    assert fleet.resolve("plush@latest").manifest == two
    assert fleet.resolve(f"plush@{two.version[:6]}").manifest == two
    assert fleet.resolve(f"plush@{two.version}").manifest == two
    fleet.promote("plush")
    assert fleet.resolve("plush").manifest == two
    fleet.unalias("plush", "production")
    assert fleet.resolve("plush").alias == "latest"


def test_the_same_bytes_again_are_the_same_version_and_the_latest(fleet: Registry) -> None:
    one, two = push(fleet, "plush", b"1"), push(fleet, "plush", b"2")
    assert push(fleet, "plush", b"1") == one  # with its first date
    assert fleet.resolve("plush@latest").manifest == one
    assert {each.version for each in fleet.record("plush").manifests} == {one.version, two.version}


def test_an_alias_may_split(fleet: Registry) -> None:
    one, two = push(fleet, "plush", b"1"), push(fleet, "plush", b"2")
    shares = fleet.alias("plush", "test", {one.version[:8]: 3, "latest": 1})
    assert shares == {one.version: 0.75, two.version: 0.25}
    picked = [fleet.resolve("plush@test", draw=number / 100).manifest.version for number in range(100)]
    assert picked.count(one.version) == 75
    assert {fleet.resolve("plush@test").manifest.version for _ in range(100)} == {one.version, two.version}
    assert fleet.alias("plush", "copy", "test") == shares
    with pytest.raises(AdapterInUse, match=r"is in use by the aliases copy, test: remove or repoint"):
        fleet.delete(f"plush@{two.version}")
    assert fleet.alias("plush", "test", {one.version: 1, one.version[:8]: 1}) == {one.version: 1.0}


def test_what_an_alias_points_at_is_not_deleted(fleet: Registry, tmp_path: Path) -> None:
    one, two = push(fleet, "plush", b"1"), push(fleet, "plush", b"2")
    fleet.promote(f"plush@{one.version}")
    with pytest.raises(AdapterInUse, match=f"plush@{one.version[:12]} is in use by the alias production"):
        fleet.delete(f"plush@{one.version[:6]}")
    with pytest.raises(AdapterInUse, match="plush is in use by the alias production"):
        fleet.delete("plush")
    assert fleet.delete("plush@latest") == [two]  # latest is bookkeeping
    assert fleet.resolve("plush@latest").manifest == one
    assert fleet.entries()[0].versions == (one.version,)
    fleet.unalias("plush", "production")
    assert fleet.delete("plush") == [one]
    assert fleet.entries() == []
    assert not (tmp_path / "fleet" / "adapters").exists()
    with pytest.raises(AdapterNotFound, match="plush@.* has been deleted"):
        fleet.pull(one)
    assert push(fleet, "plush", b"1").version == one.version
    assert [entry.name for entry in fleet.entries()] == ["plush"]


def test_other_registries_see_it_at_once(fleet: Registry, tmp_path: Path) -> None:
    other = registry_at(tmp_path / "fleet", tmp_path / "cache2")
    for number in range(5):
        pushed = push(fleet, f"plush-{number}", bytes([number]))
        assert other.resolve(f"plush-{number}").manifest == pushed
        assert len(other.entries()) == number + 1
    fleet.delete("plush-3")
    assert [entry.name for entry in other.entries()] == ["plush-0", "plush-1", "plush-2", "plush-4"]


# --- bad input ---


@pytest.mark.parametrize("name", ["", "Plush", ".hidden", "../up", "a/b", "a" * 65, "a\n", "a@b", "ä", "-x"])
def test_bad_names_reach_no_path(fleet: Registry, tmp_path: Path, name: str) -> None:
    acts: list[Callable[[], object]] = [
        lambda: push(fleet, name),
        lambda: fleet.record(name),
        lambda: fleet.alias(name, "x", "latest"),
        lambda: fleet.alias("plush", name, "latest"),
        lambda: fleet.unalias("plush", name),
        lambda: fleet.resolve(f"plush@{name}"),
    ]
    for act in acts:
        with pytest.raises(InvalidRequest, match=r"must match \^\[a-z0-9\]\[a-z0-9._-\]\{0,63\}\$"):
            act()
    assert not (tmp_path / "fleet").exists()


@pytest.mark.parametrize("alias", ["latest", "decade", "0123456789"])
def test_aliases_that_mean_something_else_are_refused(fleet: Registry, alias: str) -> None:
    push(fleet, "plush")
    with pytest.raises(InvalidRequest, match=r"choose another alias|not look like a version"):
        fleet.alias("plush", alias, "latest")


@pytest.mark.parametrize("weights", [{}, {"latest": 0}, {"latest": -1}, {"latest": float("nan")}])
def test_weights_must_be_weights(fleet: Registry, weights: dict[str, float]) -> None:
    push(fleet, "plush")
    with pytest.raises(InvalidRequest, match="1 to 16 versions, each with a weight above 0"):
        fleet.alias("plush", "test", weights)


def test_what_is_not_there_offers_what_is(fleet: Registry) -> None:
    with pytest.raises(AdapterNotFound, match="no adapter plush: the registry is empty, push one"):
        fleet.resolve("plush")
    version = push(fleet, "plush").version
    push(fleet, "plusher")
    fleet.promote("plush")
    for reference, words in {
        "plusch": r"no adapter plusch: did you mean plush or plusher\?",
        "zzz": "no adapter zzz: see `lorafleet adapters list`",
        "plush@prodction": r"plush has no alias prodction: did you mean production\?",
        "plush@zzz": r"plush has no alias zzz: it has latest, production\.",
        "plush@abcdef0": rf"plush has no version abcdef0: the newest are {version[:12]}\.",
        f"plush@{'0' * 64}": rf"plush has no version 000000000000: the newest are {version[:12]}\.",
    }.items():
        with pytest.raises(AdapterNotFound, match=words):
            fleet.resolve(reference)
    for act in (fleet.delete, fleet.record, fleet.promote):
        with pytest.raises(AdapterNotFound, match="no adapter plusch: did you mean plush"):
            act("plusch")
    with pytest.raises(AdapterNotFound, match="plush has no alias test"):
        fleet.unalias("plush", "test")


def test_first_digits_of_two_versions_are_refused(fleet: Registry) -> None:
    storage = FolderStorage(Path(fleet.url))
    for digit in "12":
        write_manifest(storage, "plush", "abcdef" + digit * 58)
    with pytest.raises(InvalidRequest, match=r"plush@abcdef fits several versions \(abcdef222222, abcdef111111\)"):
        fleet.resolve("plush@abcdef")
    assert fleet.resolve("plush@abcdef1").manifest.version == "abcdef" + "1" * 58


def test_what_does_not_pass_the_check_leaves_nothing(fleet: Registry, tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"bad")
    with pytest.raises(AdapterUnreadable, match=r"mine\.safetensors is bad"):
        fleet.push("plush", tmp_path / "mine.safetensors", check)
    with pytest.raises(InvalidRequest, match=r"cannot read .*none\.safetensors: No such file"):
        fleet.push("plush", tmp_path / "none.safetensors", check)
    assert not (tmp_path / "fleet").exists()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_huge_upload_stops_at_the_limit(tmp_path: Path) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return bytes(size)

    source = Endless()
    small = Registry(
        FolderStorage(tmp_path / "fleet"), AdapterCache(tmp_path / "cache", 1 << 30), max_adapter_bytes=5 << 20
    )
    with pytest.raises(AdapterTooLarge, match="larger than the 5242880 bytes that the registry takes: train a lower"):
        small.push("plush", source, check)  # type: ignore[arg-type]
    assert source.given <= 8 << 20
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "fleet").exists()


@pytest.mark.parametrize("data", [b"weightZ", b"", b"weights and more"])
def test_a_damaged_file_is_not_pulled_and_a_push_mends_it(fleet: Registry, tmp_path: Path, data: bytes) -> None:
    pushed = push(fleet, "plush")
    FolderStorage(tmp_path / "fleet").write(file_path("plush", pushed.version), data)
    with pytest.raises(AdapterUnreadable, match=r"plush@.* is damaged, its hash is another one: push it again"):
        fleet.pull(pushed)
    assert list((tmp_path / "cache").iterdir()) == []
    if len(data) != pushed.size_bytes:
        push(fleet, "plush")
        assert fleet.pull(pushed).read_bytes() == b"weights"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"name": "plush"}'])
def test_a_damaged_manifest_hides_one_version_only(
    fleet: Registry, tmp_path: Path, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    one, two = push(fleet, "plush", b"1"), push(fleet, "plush", b"2")
    FolderStorage(tmp_path / "fleet").write(manifest_path("plush", two.version), data)
    assert fleet.resolve("plush").manifest == one
    assert "manifest.json in the adapter registry is damaged and skipped" in caplog.text
    assert push(fleet, "plush", b"2").version == two.version
    assert fleet.resolve("plush").manifest.version == two.version


def test_a_damaged_alias_is_not_there(fleet: Registry, tmp_path: Path) -> None:
    push(fleet, "plush")
    fleet.promote("plush")
    for data in (b"", b"{}", b"\xff", b'{"x": 1}', b"0" * 63):
        FolderStorage(tmp_path / "fleet").write(alias_path("plush", "production"), data)
        with pytest.raises(AdapterNotFound, match="plush has no alias production"):
            fleet.resolve("plush")
        assert read_alias(data) is None


def test_aliases_are_text_or_json() -> None:
    one, two = "1" * 64, "2" * 64
    assert write_alias({one: 1.0}) == f"{one}\n".encode()
    assert read_alias(f" {one} ".encode()) == {one: 1.0}
    shares = check_shares({one: 90, two: 10})
    assert shares == {one: 0.9, two: 0.1}
    assert read_alias(write_alias(shares)) == shares
    assert str(Reference.parse("plush@test")) == "plush@test"
    assert Reference.parse("plush@abcdef").version == "abcdef"
    assert Reference.parse("plush@abcde").alias == "abcde"


def test_a_registry_that_is_down_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "fleet").write_text("a file")
    fleet = registry_at(tmp_path / "fleet")
    acts: list[Callable[[], object]] = [
        lambda: push(fleet, "plush"),
        fleet.entries,
        lambda: fleet.resolve("plush"),
        lambda: fleet.delete("plush"),
        lambda: fleet.alias("plush", "x", "latest"),
        fleet.gc,
    ]
    for act in acts:
        with pytest.raises(StorageUnavailable, match=f"the adapter registry {tmp_path}/fleet cannot be used"):
            act()


def test_the_settings_make_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFLEET_HOME", str(tmp_path))
    fleet = open_registry(RegistryConfig(max_adapter_bytes=2000))
    assert (fleet.url, fleet.max_adapter_bytes) == (str(tmp_path / "registry"), 2000)
    assert fleet.pull(push(fleet, "plush")).parent == tmp_path / "cache" / "adapters"
    assert open_registry(RegistryConfig(url=f"file://{tmp_path}/x")).url == f"{tmp_path}/x"


# --- the cache ---


def test_the_cache_drops_what_was_not_asked_for_longest(fleet: Registry, tmp_path: Path) -> None:
    small = Registry(FolderStorage(tmp_path / "fleet"), AdapterCache(tmp_path / "small", 250))
    pushed = [push(fleet, "plush", bytes([number]) * 100) for number in range(3)]
    paths = [small.pull(manifest) for manifest in pushed[:2]]
    for path, age_s in zip(paths, (10, 20), strict=True):
        os.utime(path, (time.time() - age_s,) * 2)
    small.pull(pushed[0])  # asked for again
    os.utime(paths[1], (time.time() - 20,) * 2)
    paths.append(small.pull(pushed[2]))
    assert [path.exists() for path in paths] == [True, False, True]
    assert small.pull(pushed[1]).read_bytes() == b"\1" * 100


def test_a_cache_that_cannot_be_written_says_so(fleet: Registry, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StorageUnavailable, match=r"adapter cache .*/taken cannot be used .*: check LORAFLEET_HOME"):
        push(registry_at(tmp_path / "fleet", tmp_path / "taken"), "plush")


# --- a crash at any write ---


class Crash(BaseException):
    """The process ends here."""


class CrashingStorage(FolderStorage):
    """Ends at the n-th write or delete: before it, or after it was done."""

    def __init__(self, root: Path, at: int, *, after: bool) -> None:
        super().__init__(root)
        self.left, self._after = at, after

    def _count(self, act: Callable[[], None]) -> None:
        self.left -= 1
        if self.left == 0 and not self._after:
            raise Crash
        act()
        if self.left == 0:
            raise Crash

    def write(self, path: str, data: bytes) -> None:
        self._count(lambda: super(CrashingStorage, self).write(path, data))

    def upload(self, file: Path, path: str, on_progress: OnProgress) -> None:
        self._count(lambda: super(CrashingStorage, self).upload(file, path, on_progress))

    def delete(self, paths: Iterable[str]) -> None:
        for path in paths:
            self._count(lambda path=path: super(CrashingStorage, self).delete([path]))  # type: ignore[misc]


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


ACTS: dict[str, Callable[[Registry], object]] = {
    "first push": lambda fleet: push(fleet, "plush", b"1"),
    "second push": lambda fleet: push(fleet, "plush", b"2"),
    "the same again": lambda fleet: push(fleet, "plush", b"1"),
    "promote": lambda fleet: fleet.promote("plush"),
    "split": lambda fleet: fleet.alias("plush", "production", dict.fromkeys(versions(fleet), 1.0)),
    "unalias": lambda fleet: fleet.unalias("plush", "production"),
    "delete": lambda fleet: fleet.delete("plush"),
    "delete one": lambda fleet: fleet.delete("plush@latest"),
    "gc": lambda fleet: fleet.gc(older_than_s=0),
}
BEFORE: dict[str, list[str]] = {
    "first push": [],
    "second push": ["first push", "promote"],
    "the same again": ["first push", "second push"],
    "promote": ["first push"],
    "split": ["first push", "second push", "promote"],
    "unalias": ["first push", "promote"],
    "delete": ["first push"],
    "delete one": ["first push", "second push"],
    "gc": ["first push", "promote"],
}


def versions(fleet: Registry) -> list[str]:
    return [manifest.version for manifest in fleet.record("plush").manifests]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("act", list(ACTS))
def test_a_crash_at_any_write_leaves_the_old_state_or_the_new(tmp_path: Path, act: str, after: bool) -> None:
    def prepared(name: str) -> Path:
        folder = tmp_path / name / "fleet"
        fleet = registry_at(folder)
        push(fleet, "other", b"0")
        fleet.entries()
        for step in BEFORE[act]:
            ACTS[step](fleet)
        return folder

    clean = prepared("clean")
    old = seen(clean)
    ACTS[act](registry_at(clean))
    new = seen(clean)
    states = []
    ended = False
    while not ended:
        folder = prepared(str(len(states)))
        storage = CrashingStorage(folder, len(states) + 1, after=after)
        try:
            ACTS[act](Registry(storage, AdapterCache(folder.with_name("cache"), 1 << 30)))
            ended = True
        except Crash:
            pass
        states.append(seen(folder))
        assert states[-1] in (old, new)
        with suppress(AdapterNotFound):  # it had been deleted
            ACTS[act](registry_at(folder))  # somebody tries again
        state = seen(folder)
        assert state == new or act == "delete one"  # which, done twice, deletes two
        registry_at(folder).gc(older_than_s=-60)
        assert seen(folder) == state
        assert leftovers(folder) == []
    assert len(states) > 3
    assert states[-1] == new
    assert states == sorted(states, key=lambda state: state == new)  # one write makes the difference


def leftovers(folder: Path) -> list[str]:
    """Files that belong to nothing."""
    storage = FolderStorage(folder)
    found = storage.find("")
    files = [path for path in found if path.endswith("adapter.safetensors")]
    alone = [path for path in files if path.replace("adapter.safetensors", "manifest.json") not in found]
    index = [path for path in found if path.startswith(CHANGES)]
    snapshots = [path for path in found if path.startswith(SNAPSHOTS)][1:]
    return [*alone, *index, *snapshots, *storage.unfinished()]


def test_gc_leaves_what_is_young(fleet: Registry, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "fleet")
    push(fleet, "plush")
    storage.write(file_path("plush", "1" * 64), b"half")
    storage.write(f"{file_path('plush', '2' * 64)}.note", b"somebody's own")
    (tmp_path / "fleet" / f"{UNFINISHED}x").write_bytes(b"part")
    assert fleet.gc().removed == ()
    garbage = fleet.gc(older_than_s=-1)
    assert set(garbage.removed) == {file_path("plush", "1" * 64), f"{UNFINISHED}x"}
    assert garbage.size_bytes == 8
    assert fleet.pull(fleet.resolve("plush").manifest).read_bytes() == b"weights"


def test_a_killed_push_leaves_no_half(tmp_path: Path) -> None:
    """The real thing: a process that pushes without end, killed at some moment, again and again."""
    script = (
        "import io, itertools, sys; from pathlib import Path\n"
        "from lorafleet.core.adapter_cache import AdapterCache\n"
        "from lorafleet.core.folder_storage import FolderStorage\n"
        "from lorafleet.core.manifest import AdapterFacts\n"
        "from lorafleet.core.registry import Registry\n"
        f"facts = AdapterFacts.model_validate_json({FACTS.model_dump_json()!r})\n"
        "fleet = Registry(FolderStorage(Path(sys.argv[1])), AdapterCache(Path(sys.argv[2]), 0))\n"
        "for number in itertools.count():\n"
        "    fleet.push('plush', io.BytesIO(str(number).encode() * 1000), lambda file: facts)\n"
        "    print(number, flush=True)\n"
    )
    folder = tmp_path / "fleet"
    for delay_s in (0.0, 0.013, 0.029):
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / "pusher")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
            said = [int(line) for line in process.stdout.read().split()]
        state = seen(folder)
        assert len(state["plush"][0]) > (said[-1] if said else 0)  # type: ignore[index]
        registry_at(folder).gc(older_than_s=-60)
        assert seen(folder) == state
        assert leftovers(folder) == []


# --- many at once ---


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


def test_pulls_at_once_each_get_the_whole_file(fleet: Registry, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    pushed = push(fleet, "plush", data)

    def pull() -> None:
        assert registry_at(tmp_path / "fleet").pull(pushed).read_bytes() == data

    threads(*[pull] * 8)
    assert len(list((tmp_path / "cache").iterdir())) == 1


# --- the index ---


def write_manifest(storage: Storage, name: str, version: str, pushed_s: float = 0) -> None:
    """As a push does, without the file."""
    at = datetime.now(UTC) + timedelta(seconds=pushed_s)
    known = {"name": name, "version": version, "size_bytes": 1000, "pushed_at": at}
    manifest = Manifest.model_validate({**FACTS.model_dump(), **known})
    storage.write(manifest_path(name, version), manifest.model_dump_json().encode())
    storage.write(alias_path(name, "latest"), version.encode())


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


def test_a_version_of_a_later_release_is_listed(fleet: Registry, tmp_path: Path) -> None:
    pushed = push(fleet, "plush")
    file = tmp_path / "fleet" / manifest_path("plush", pushed.version)
    file.write_text(json.dumps({**json.loads(file.read_text()), "licence": "MIT"}))
    assert fleet.resolve("plush").manifest == pushed


def test_it_does_not_matter_how_registry_is_imported() -> None:
    """No torch and no fsspec for a folder: a gateway starts quickly."""
    script = (
        "import sys, lorafleet.core.registry as r; from lorafleet.core.registry_config import RegistryConfig\n"
        "r.open_registry(RegistryConfig())\n"
        "assert not {'torch', 'ray', 'fsspec', 's3fs', 'botocore', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
    assert registry.DAY_S == 86_400
