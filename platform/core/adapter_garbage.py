"""What interrupted pushes and deletes leave in the registry, and how it goes."""

import logging
from dataclasses import dataclass

from lorafleet.core.adapter_record import (
    ADAPTERS,
    ALIASES,
    EVALUATIONS,
    FILE_NAME,
    INCOMING,
    manifest_path,
    read_manifest,
    read_record,
)
from lorafleet.core.manifest import LATEST
from lorafleet.core.storage import Storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Garbage:
    """What a collection removed: objects of the registry, and the bytes they took as far as the store says."""

    removed: tuple[str, ...]
    size_bytes: int


def collect(storage: Storage, horizon_s: float) -> Garbage:
    """Removes files and evaluations without a manifest, `latest` of what has no version, what was handed in and not
    pushed, and unfinished writes, all last written before `horizon_s` (seconds since 1970)."""
    removed: list[str] = []
    size_bytes = 0
    for path, stored in {**storage.find(ADAPTERS), **storage.find(INCOMING)}.items():
        if stored.modified_s < horizon_s and _is_left_over(storage, path, horizon_s):
            storage.delete([path])
            _mend(storage, path)
            removed.append(path)
            size_bytes += stored.size_bytes
    for name, stored in storage.unfinished().items():
        if stored.modified_s < horizon_s:
            storage.discard(name)
            removed.append(name)
            size_bytes += stored.size_bytes
    return Garbage(tuple(removed), size_bytes)


def _is_left_over(storage: Storage, path: str, horizon_s: float) -> bool:
    """Whether an old object belongs to nothing, as of now."""
    parts = path.split("/")
    if parts[0] == INCOMING:
        return True
    if len(parts) == 5 and parts[3] == EVALUATIONS:
        return read_manifest(storage, parts[1], parts[2]) is None
    if len(parts) != 4:
        return False
    _, name, version, last = parts
    if (version, last) == (ALIASES, LATEST):
        return read_record(storage, name) is None
    if version == ALIASES or last != FILE_NAME:
        return False
    again = storage.find(f"{ADAPTERS}/{name}/{version}")
    return path in again and again[path].modified_s < horizon_s and manifest_path(name, version) not in again


def _mend(storage: Storage, path: str) -> None:
    """A push of the same bytes may have ended between our look and our delete: what has lost its file is no version."""
    parts = path.split("/")
    if parts[0] == INCOMING or len(parts) != 4:
        return
    _, name, version, last = parts
    if last == FILE_NAME and read_manifest(storage, name, version) is not None:
        logger.warning("%s@%s was pushed while an old rest of it was removed: push it again", name, version)
        storage.delete([manifest_path(name, version)])
