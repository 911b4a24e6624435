"""The registry on a folder: what it promises to one user."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from fleets import FACTS, check, push, registry_at

from lorafleet.core import registry
from lorafleet.core.adapter_cache import AdapterCache, sha256
from lorafleet.core.adapter_record import alias_path, file_path, manifest_path
from lorafleet.core.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnreadable,
    InvalidRequest,
    StorageUnavailable,
)
from lorafleet.core.folder_storage import UNFINISHED, FolderStorage
from lorafleet.core.manifest import Manifest, Reference, check_shares, read_alias, write_alias
from lorafleet.core.registry import Registry, open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.core.storage import Storage

pytestmark = pytest.mark.usefixtures("unsafe_but_quick")


def write_manifest(storage: Storage, name: str, version: str, pushed_s: float = 0) -> None:
    """As a push does, without the file."""
    at = datetime.now(UTC) + timedelta(seconds=pushed_s)
    known = {"name": name, "version": version, "size_bytes": 1000, "pushed_at": at}
    manifest = Manifest.model_validate({**FACTS.model_dump(), **known})
    storage.write(manifest_path(name, version), manifest.model_dump_json().encode())
    storage.write(alias_path(name, "latest"), version.encode())


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
