"""Caches on a disk: written into a folder of another name and renamed when whole, found again by their fingerprint."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from lorafleet.core.errors import DataUnreadable, StorageUnavailable
from lorafleet.core.storage import translated
from lorafleet.train.data.encoded_set import EncodedSet
from lorafleet.train.data.layout import (
    FORMAT,
    ITEMS,
    LATENTS,
    MANIFEST,
    TEXTS,
    UNFINISHED,
    CacheManifest,
    CropLine,
    FileFacts,
    ItemLine,
)
from lorafleet.train.data.plan import OnProgress, Plan

logger = logging.getLogger(__name__)

SETTING: Final = "the cache's folder"
DAY_S: Final = 24 * 3600
SPARE_BYTES: Final = 16 << 20  # of the small files, and of what others write meanwhile


def find_cache(plan: Plan, cache_dir: Path, validation_share: float) -> EncodedSet | None:
    """The finished cache, its hashes checked. A damaged one is removed with a warning."""
    path = cache_dir / plan.fingerprint
    if not path.is_dir():
        return None
    try:
        found = EncodedSet.open(path, validation_share=validation_share)
        found.verify()
    except DataUnreadable as error:
        logger.warning("%s It is made again.", error.message)
        with translated(f"the cache {cache_dir}", setting=SETTING):
            shutil.rmtree(path)
        return None
    return found


def write_cache(
    plan: Plan,
    encoded: Iterator[bytes],
    cache_dir: Path,
    validation_share: float,
    on_progress: OnProgress | None = None,
) -> EncodedSet:
    """Writes the results of the plan's tasks, in their order. Whatever is raised, nothing of it is left.

    Raises what `encoded` does, and StorageUnavailable.
    """
    where = f"the cache {cache_dir}"
    with translated(where, setting=SETTING):
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_stale(cache_dir)
        free = shutil.disk_usage(cache_dir).free
        if free < plan.cache_bytes + SPARE_BYTES:
            raise StorageUnavailable(
                f"{where} needs {(plan.cache_bytes + SPARE_BYTES) / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB "
                "free: free some space there, or set data.crops lower."
            )
        folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=cache_dir))
    try:
        with translated(where, setting=SETTING):
            _fill(folder, plan, encoded, on_progress)
            with suppress(FileExistsError):  # another process was faster, with the same bytes
                _rename(folder, cache_dir / plan.fingerprint)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return EncodedSet.open(cache_dir / plan.fingerprint, validation_share=validation_share)


def _fill(folder: Path, plan: Plan, encoded: Iterator[bytes], on_progress: OnProgress | None) -> None:
    with _Hashed(folder / TEXTS) as texts, _Hashed(folder / LATENTS) as latents:
        for task, data in enumerate(encoded):
            (texts if task < len(plan.texts) else latents).write(data)
            if on_progress is not None:
                on_progress(task + 1, plan.tasks)
    with _Hashed(folder / ITEMS) as items:
        for entry in plan.entries:
            line = ItemLine(
                key=entry.item.key,
                sha256=entry.sha256,
                size=entry.size,
                bucket=entry.bucket,
                crops=tuple(CropLine(scaled=crop.scaled, left=crop.left, top=crop.top) for crop in entry.crops),
                texts=entry.texts,
            )
            items.write(line.model_dump_json().encode() + b"\n")
    manifest = CacheManifest(
        format=FORMAT,
        fingerprint=plan.fingerprint,
        base_fingerprint=plan.facts.fingerprint,
        vae_dtype=plan.facts.vae_dtype,
        items=len(plan.entries),
        texts=len(plan.texts),
        flips=len(plan.flips),
        latent_channels=plan.facts.latent_channels,
        vae_factor=plan.facts.vae_factor,
        text=plan.facts.text,
        files={ITEMS: items.facts, TEXTS: texts.facts, LATENTS: latents.facts},
    )
    expected = len(plan.texts) * plan.facts.text.row_bytes + latents.facts.size_bytes
    assert expected == texts.facts.size_bytes + latents.facts.size_bytes == plan.cache_bytes, "every task was written"
    with _Hashed(folder / MANIFEST) as file:
        file.write(json.dumps(manifest.model_dump(mode="json"), indent=1).encode() + b"\n")


class _Hashed:
    """A new file that knows its hash, on the disk when the block ends."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("xb")
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    @property
    def facts(self) -> FileFacts:
        return FileFacts(size_bytes=self._size_bytes, sha256=self._digest.hexdigest())

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size_bytes += len(data)

    def __enter__(self) -> "_Hashed":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())


def _rename(folder: Path, target: Path) -> None:
    """Raises FileExistsError where the target is there already."""
    folder.chmod(0o755)  # other users' workers read it
    try:
        folder.rename(target)
    except OSError:
        if target.is_dir():
            raise FileExistsError(target) from None
        raise


def _remove_stale(cache_dir: Path) -> None:
    """What a killed process left; a running one writes every few seconds."""
    for folder in cache_dir.glob(f"{UNFINISHED}*"):
        with suppress(OSError):
            newest = max((file.stat().st_mtime for file in (folder, *folder.iterdir())), default=0.0)
            if newest < time.time() - DAY_S:
                shutil.rmtree(folder)
