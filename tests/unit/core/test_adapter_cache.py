"""Adapter files on this machine's disk."""

import os
import time
from pathlib import Path

import pytest
from fleets import push, registry_at, threads

from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.registry import Registry

pytestmark = pytest.mark.usefixtures("unsafe_but_quick")


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


def test_pulls_at_once_each_get_the_whole_file(fleet: Registry, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    pushed = push(fleet, "plush", data)

    def pull() -> None:
        assert registry_at(tmp_path / "fleet").pull(pushed).read_bytes() == data

    threads(*[pull] * 8)
    assert len(list((tmp_path / "cache").iterdir())) == 1
