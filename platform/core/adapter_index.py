"""The list of all adapters in one object, so that listing 10,000 of them reads one object and not 30,000.

The index is a cache: the truth is what `adapters/` holds, and only listing reads the index. It must not lose what
concurrent writers change, and stores have neither locks nor, all of them, conditional writes. So nothing in it is ever
changed in place:

    index/changes/<name>~<id>.open    put before an adapter is changed
    index/changes/<name>~<id>.done    put after it, then the .open one goes
    index/snapshots/<hash>.json       all entries at some time, named by its content

The list is what the snapshots say, but an adapter is looked up in `adapters/` again where there is a change of it, or
where two snapshots do not agree. A fold writes that list as a new snapshot, and afterwards removes the snapshots and
the done changes that it had read. Why this never shows an old entry once a change is over:

- A change is put before the truth changes, so whoever lists later sees the change, or a snapshot that was made by
  somebody who saw it; that one read the truth after the change was done, as open changes are never folded.
- Changes are listed before snapshots, and a fold removes them after its snapshot is there: whoever misses the one
  sees the other.
- Two folds at once each write a snapshot of their own. The slower one may hold old entries for what the faster one
  has folded, but then the two do not agree, which is looked up.
- A snapshot that vanishes while it is read has been folded: list again.

A writer that dies leaves an open change: one adapter more to look up, until `rebuild` finds it older than any writer
may live. No snapshot, or a damaged one, means a rebuild from `adapters/`. Who may only read, lists without folding.
"""

import hashlib
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from pydantic import TypeAdapter, ValidationError

from lorafleet.core.adapter_record import read_all_records, read_records
from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.manifest import Entry
from lorafleet.core.storage import Storage, Stored

logger = logging.getLogger(__name__)

CHANGES: Final = "index/changes"
SNAPSHOTS: Final = "index/snapshots"
FOLD_AT: Final = 64  # done changes; each costs a listing and a round of reads until it is folded
REBUILD_AT: Final = 1000  # adapters to look up; above it, listing everything is quicker
ATTEMPTS: Final = 5

Table = Mapping[str, Entry]
_TABLE: Final = TypeAdapter(dict[str, Entry])


class AdapterIndex:
    """The list of all adapters. Safe for several threads and processes."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._tables: dict[str, Table] = {}  # the snapshots last read: they never change

    @contextmanager
    def change(self, name: str) -> Iterator[None]:
        """Around the writes that change an adapter. An error inside leaves the change open: it may have been written
        although nobody said so."""
        mark = f"{CHANGES}/{name}~{uuid.uuid4().hex}"
        self._storage.write(f"{mark}.open", b"1")
        yield
        try:
            self._storage.write(f"{mark}.done", b"1")
            self._storage.delete([f"{mark}.open"])
            if sum(_is_done(path) for path in self._storage.find(CHANGES)) >= FOLD_AT:
                self.entries()
        except StorageUnavailable as error:  # the adapter has been changed, and the open mark says so
            logger.warning("a change of %s is not in the adapter index yet: %s", name, error)

    def entries(self) -> dict[str, Entry]:
        """Every adapter by name. Raises StorageUnavailable."""
        for _ in range(ATTEMPTS):
            changes = self._storage.find(CHANGES)
            snapshots = sorted(self._storage.find(SNAPSHOTS))
            tables = self._load(snapshots)
            if tables is not None:
                break
        doubtful = {_name(path) for path in changes} | _differing(tables or [])
        if not tables or len(doubtful) > REBUILD_AT:
            return self._rebuild(changes, snapshots, before_s=0.0)
        table = {name: entry for name, entry in tables[0].items() if name not in doubtful}
        table |= {name: record.entry for name, record in read_records(self._storage, doubtful).items()}
        done = [path for path in changes if _is_done(path)]
        if len(snapshots) > 1 or len(done) >= FOLD_AT:
            self._fold(table, [*done, *snapshots])
        return dict(sorted(table.items()))

    def rebuild(self, *, before_s: float) -> dict[str, Entry]:
        """From the adapters themselves; open changes from before `before_s` (since 1970) count as dead."""
        return self._rebuild(self._storage.find(CHANGES), list(self._storage.find(SNAPSHOTS)), before_s)

    def _rebuild(self, changes: Mapping[str, Stored], snapshots: list[str], before_s: float) -> dict[str, Entry]:
        table = {name: record.entry for name, record in read_all_records(self._storage).items()}
        settled = [path for path, stored in changes.items() if _is_done(path) or stored.modified_s < before_s]
        self._fold(table, [*settled, *snapshots])
        return table

    def _fold(self, table: Table, inputs: list[str]) -> None:
        """`inputs` were listed before what `table` holds was read."""
        data = _TABLE.dump_json(dict(sorted(table.items())))
        snapshot = f"{SNAPSHOTS}/{hashlib.sha256(data).hexdigest()}.json"
        try:
            self._storage.write(snapshot, data)
            self._storage.delete([path for path in inputs if path != snapshot])
        except StorageUnavailable as error:
            logger.debug("the adapter index stays as it is: %s", error)

    def _load(self, snapshots: list[str]) -> list[Table] | None:
        """None when one vanished. A damaged one empties the list: what it alone knew is lost."""
        known = self._tables
        missing = [path for path in snapshots if path not in known]
        data = self._storage.read_all(missing)
        if len(data) < len(missing):
            return None
        tables = {path: known[path] for path in snapshots if path in known}
        for path, text in data.items():
            try:
                tables[path] = _TABLE.validate_json(text)
            except ValidationError:
                logger.warning("%s in the adapter registry is damaged: the index is rebuilt", path)
                return []
        self._tables = tables
        return list(tables.values())


def _name(path: str) -> str:
    return path.rpartition("/")[2].partition("~")[0]


def _is_done(path: str) -> bool:
    return path.endswith(".done")


def _differing(tables: list[Table]) -> set[str]:
    """Names about which the tables do not agree."""
    first, *others = tables or [{}]
    return {name for other in others for name in first.keys() | other.keys() if first.get(name) != other.get(name)}
