"""The registry after a crash at any write, and after real ones."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import pytest
from fleets import FACTS, Crash, leftovers, push, registry_at, seen

from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.errors import AdapterNotFound
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.registry import Registry
from lorafleet.core.storage import OnProgress

pytestmark = pytest.mark.usefixtures("unsafe_but_quick")


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
