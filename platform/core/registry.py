"""The fleet's adapters: pushed, listed, resolved, pulled, pointed at by aliases, deleted.

A version is sha256 of its file and never changes. The manifest is what makes a version exist: it is written last and
deleted first, so that whatever is interrupted leaves the old state or the new one. Where two do opposite things to the
same bytes at once, each looks again after its own write: at least one of them then sees the other.

with open_registry(RegistryConfig()) as a folder under LORAFLEET_HOME, from any thread:
    found = registry.resolve("plush@production")
    path = registry.pull(found.manifest, on_progress=print)
"""

import difflib
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import ValidationError

from lorafleet.core.adapter_cache import AdapterCache, sha256
from lorafleet.core.adapter_garbage import Garbage, collect
from lorafleet.core.adapter_index import AdapterIndex
from lorafleet.core.adapter_record import (
    ADAPTERS,
    ALIASES,
    FILE_NAME,
    INCOMING,
    Record,
    alias_path,
    evaluations_path,
    file_path,
    manifest_path,
    read_manifest,
    read_record,
)
from lorafleet.core.config import home
from lorafleet.core.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterUnreadable,
    InvalidRequest,
    StorageUnavailable,
)
from lorafleet.core.evaluation import Evaluation
from lorafleet.core.manifest import (
    LATEST,
    PRODUCTION,
    AdapterFacts,
    Entry,
    Manifest,
    Reference,
    Shares,
    check_alias,
    check_name,
    check_shares,
    read_alias,
    write_alias,
)
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.core.storage import OnProgress, Storage, open_storage

Check = Callable[[Path], AdapterFacts]
"""Looks at an adapter's file, raises LorafleetError unless it can be served, and says what it is."""
DAY_S: Final = 24 * 3600.0
UPLOAD_ATTEMPTS: Final = 3
PROBE: Final = f"{ADAPTERS}/probe"  # there is no such object


@dataclass(frozen=True)
class Resolved:
    """A version that a reference means now. `alias`: the one that led there, None for a reference to a version.
    `share`: the part of the requests that it gets, 1 unless the alias names several."""

    manifest: Manifest
    alias: str | None
    share: float = 1.0


class Registry:
    """Safe for several threads and processes. Every method raises StorageUnavailable when the store does not answer,
    and InvalidRequest for what is no name, alias or reference."""

    def __init__(self, storage: Storage, cache: AdapterCache, *, max_adapter_bytes: int = 2 << 30) -> None:
        self.url = storage.url
        self.is_local = storage.is_local
        self.max_adapter_bytes = max_adapter_bytes
        self._storage = storage
        self._cache = cache
        self._index = AdapterIndex(storage)

    def push(
        self, name: str, source: Path | BinaryIO, check: Check, *, on_progress: OnProgress = lambda done, total: None
    ) -> Manifest:
        """Stores a file as the newest version of `name`; the same bytes again only become the latest again.

        The file is copied to this machine's cache first, so that the bytes checked are the bytes stored.
        Raises AdapterTooLarge and what `check` raises, before anything is stored.
        """
        check_name(name)
        with self._cache.incoming() as folder:
            if isinstance(source, Path):
                file = folder / source.name
                with _opened(source) as stream:
                    version, size = self._cache.receive(stream, file, self.max_adapter_bytes)
            else:
                file = folder / FILE_NAME
                version, size = self._cache.receive(source, file, self.max_adapter_bytes)
            return self._push(name, file, version, size, check, on_progress)

    def hand_in(self, source: BinaryIO) -> str:
        """Takes a file that another machine is to check and push: the id for `push_handed_in`.

        The caller withdraws it afterwards, whatever came of it. Raises AdapterTooLarge.
        """
        handed_in = secrets.token_hex(16)
        with self._cache.incoming() as folder:
            file = folder / FILE_NAME
            self._cache.receive(source, file, self.max_adapter_bytes)
            self._storage.upload(file, f"{INCOMING}/{handed_in}", lambda done, total: None)
        return handed_in

    def push_handed_in(self, name: str, handed_in: str, check: Check) -> Manifest:
        """As `push`, of what was handed in, on this machine or another one."""
        check_name(name)
        with self._cache.incoming() as folder:
            file = folder / FILE_NAME
            if not self._storage.download(f"{INCOMING}/{handed_in}", file, lambda done, total: None):
                raise StorageUnavailable(f"the file handed in for {name} is gone: push it again.")
            return self._push(name, file, sha256(file), file.stat().st_size, check, lambda done, total: None)

    def withdraw(self, handed_in: str) -> None:
        """Removes what was handed in."""
        self._storage.delete([f"{INCOMING}/{handed_in}"])

    def probe(self) -> None:
        """Returns if the store answers."""
        self._storage.read(PROBE)

    def entries(self) -> list[Entry]:
        """All adapters by name, as the list shows them."""
        return list(self._index.entries().values())

    def record(self, name: str) -> Record:
        """All versions and aliases of one adapter. Raises AdapterNotFound."""
        record = read_record(self._storage, check_name(name))
        if record is None:
            raise self._no_name(name)
        return record

    def resolve(self, reference: str, *, draw: float | None = None) -> Resolved:
        """The version that `name`, `name@alias` or `name@version` means now. Raises AdapterNotFound.

        Of an alias that names several versions `draw`, in [0, 1), picks one by their shares; left out, chance does.
        """
        return drawn(self.choices(reference), draw)

    def choices(self, reference: str) -> tuple[Resolved, ...]:
        """As `resolve`: all versions that an alias names, with their shares."""
        wanted = Reference.parse(reference)
        if wanted.version is not None:
            return (Resolved(self._by_version(wanted.name, wanted.version), None),)
        for alias in [wanted.alias] if wanted.alias else [PRODUCTION, LATEST]:
            shares = self._alias(wanted.name, alias)
            found = {version: self._manifest(wanted.name, version) for version in sorted(shares or {})}
            there = {version: manifest for version, manifest in found.items() if manifest is not None}
            if not there and alias == LATEST:
                return (Resolved(self.record(wanted.name).latest, LATEST),)
            if there:
                rest = sum((shares or {})[version] for version in there)
                return tuple(Resolved(each, alias, (shares or {})[each.version] / rest) for each in there.values())
            if shares is not None or wanted.alias is not None:
                break
        raise self._no_alias(wanted.name, wanted.alias or PRODUCTION)

    def pull(self, manifest: Manifest, *, on_progress: OnProgress = lambda done, total: None) -> Path:
        """The file of a version on this machine's disk, downloaded if it is not there yet. Not to be changed.

        Raises AdapterNotFound if the version has been deleted, AdapterUnreadable if the registry's file is not what was
        pushed. Blocks: for threads, not event loops.
        """
        cached = self._cache.get(manifest.version, manifest.size_bytes)
        if cached is not None:
            return cached
        with self._cache.incoming() as folder:
            file = folder / FILE_NAME
            if not self._storage.download(file_path(manifest.name, manifest.version), file, on_progress):
                raise AdapterNotFound(f"{_spelled(manifest)} has been deleted: ask for another version.")
            if sha256(file) != manifest.version:
                raise AdapterUnreadable(
                    f"the registry's file of {_spelled(manifest)} is damaged, its hash is another one: push it again."
                )
            return self._cache.add(file, manifest.version)

    def alias(self, name: str, alias: str, versions: str | Mapping[str, float]) -> Shares:
        """Points an alias at a version, or at several with weights; versions as after the @ of a reference.

        Raises AdapterNotFound.
        """
        check_name(name)
        self._check_settable(alias)
        shares: dict[str, float] = defaultdict(float)
        for target, weight in check_shares({versions: 1.0} if isinstance(versions, str) else dict(versions)).items():
            for version, share in self._shares(name, target).items():
                shares[version] += weight * share
        path = alias_path(name, alias)
        before = self._storage.read(path)
        with self._index.change(name):
            self._storage.write(path, write_alias(shares))
            gone = [version for version in shares if self._manifest(name, version) is None]
            if gone and before is None:
                self._storage.delete([path])
            elif gone and before is not None:
                self._storage.write(path, before)
        if gone:
            raise AdapterNotFound(f"{name}@{gone[0][:12]} has just been deleted: {alias} stays as it was.")
        return dict(shares)

    def promote(self, reference: str) -> Shares:
        """Points `production` at what `name@alias` or `name@version` means, at the latest for a bare name."""
        wanted = Reference.parse(reference)
        return self.alias(wanted.name, PRODUCTION, wanted.version or wanted.alias or LATEST)

    def add_evaluation(self, manifest: Manifest, evaluation: Evaluation) -> str:
        """Keeps what was found of a version beside its manifest: the id, by which it is listed."""
        number = f"{evaluation.decided_at.astimezone(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        path = f"{evaluations_path(manifest.name, manifest.version)}/{number}.json"
        self._storage.write(path, evaluation.model_dump_json(indent=1).encode())
        return number

    def evaluations(self, manifest: Manifest) -> dict[str, Evaluation]:
        """By id, the oldest first; damaged ones are left out."""
        paths = sorted(self._storage.find(evaluations_path(manifest.name, manifest.version)))
        found = self._storage.read_all(paths)
        parsed = {
            path.rpartition("/")[2].removesuffix(".json"): _evaluation(found[path]) for path in paths if path in found
        }
        return {number: each for number, each in parsed.items() if each is not None}

    def unalias(self, name: str, alias: str) -> None:
        """Removes an alias. Raises AdapterNotFound."""
        self._check_settable(alias)
        if alias not in self.record(name).aliases:
            raise self._no_alias(name, alias)
        with self._index.change(name):
            self._storage.delete([alias_path(name, alias)])

    def delete(self, reference: str) -> list[Manifest]:
        """Deletes one version, or all of them for a bare name, one after the other; what was deleted.

        Raises AdapterNotFound, and AdapterInUse where an alias other than `latest` points at one.
        """
        wanted = Reference.parse(reference)
        record = self.record(wanted.name)
        is_bare = wanted.version is None and wanted.alias is None
        doomed = list(record.manifests) if is_bare else [self.resolve(reference).manifest]
        manifests = {manifest_path(each.name, each.version): each for each in doomed}
        if pointing := record.pointing_at(each.version for each in doomed):
            raise _in_use(doomed, pointing)
        with self._index.change(wanted.name):
            self._storage.delete(manifests)
            left = self._aliases_left(wanted.name, doomed)
            if left:  # set since we looked
                for path, manifest in manifests.items():
                    self._storage.write(path, _json(manifest))
            else:
                self._storage.delete([file_path(each.name, each.version) for each in doomed])
                found = [self._storage.find(evaluations_path(each.name, each.version)) for each in doomed]
                self._storage.delete([path for paths in found for path in paths])
                self._storage.delete(manifests)  # of a push of the same bytes meanwhile, whose file has just gone
                if is_bare:
                    self._storage.delete([alias_path(wanted.name, LATEST)])
        if left:
            raise _in_use(doomed, left)
        return doomed

    def gc(self, *, older_than_s: float = DAY_S) -> Garbage:
        """Removes what interrupted pushes and deletes left, and makes the index again.

        `older_than_s` must be longer than a push may take: what is younger may still become a version.
        """
        horizon_s = time.time() - older_than_s
        garbage = collect(self._storage, horizon_s)
        self._index.rebuild(before_s=horizon_s)
        return garbage

    def _push(
        self, name: str, file: Path, version: str, size_bytes: int, check: Check, on_progress: OnProgress
    ) -> Manifest:
        """Of a file that nobody else changes."""
        facts = check(file)
        known = {"name": name, "version": version, "size_bytes": size_bytes, "pushed_at": datetime.now(UTC)}
        manifest = Manifest.model_validate({**facts.model_dump(), **known})
        return self._publish(manifest, file, on_progress)

    def _publish(self, manifest: Manifest, file: Path, on_progress: OnProgress) -> Manifest:
        name, version = manifest.name, manifest.version
        path = file_path(name, version)
        latest = write_alias({version: 1.0})
        present = self._manifest(name, version)
        if present is not None and self._storage.size(path) == present.size_bytes:
            with self._index.change(name):
                self._storage.write(alias_path(name, LATEST), latest)
            return present
        self._storage.upload(file, path, on_progress)
        with self._index.change(name):
            self._storage.write(alias_path(name, LATEST), latest)
            self._storage.write(manifest_path(name, version), _json(manifest))
            for _ in range(UPLOAD_ATTEMPTS):
                if self._storage.size(path) == manifest.size_bytes:
                    return manifest
                self._storage.upload(file, path, on_progress)  # a delete of the same bytes took it
            self._storage.delete([manifest_path(name, version)])
        raise StorageUnavailable(
            f"the adapter registry {self.url} does not keep the file of {_spelled(manifest)}: push it again."
        )

    def _manifest(self, name: str, version: str) -> Manifest | None:
        return read_manifest(self._storage, name, version)

    def _alias(self, name: str, alias: str) -> Shares | None:
        data = self._storage.read(alias_path(name, alias))
        return None if data is None else read_alias(data) or {}

    def _shares(self, name: str, target: str) -> Shares:
        """What stands after the @ of a reference as versions."""
        wanted = Reference.parse(f"{name}@{target}")
        if wanted.version is not None:
            return {self._by_version(name, wanted.version).version: 1.0}
        assert wanted.alias is not None
        shares = None if wanted.alias == LATEST else self._alias(name, wanted.alias)
        return shares or {self.resolve(f"{name}@{wanted.alias}").manifest.version: 1.0}

    def _by_version(self, name: str, prefix: str) -> Manifest:
        if len(prefix) == 64:
            manifest = self._manifest(name, prefix)
            if manifest is not None:
                return manifest
        record = self.record(name)
        found = [manifest for manifest in record.manifests if manifest.version.startswith(prefix)]
        if len(found) > 1:
            versions = ", ".join(manifest.version[: len(prefix) + 6] for manifest in found)
            raise InvalidRequest(f"{name}@{prefix} fits several versions ({versions}): give more digits.", param="name")
        if not found:
            newest = ", ".join(manifest.version[:12] for manifest in record.manifests[:5])
            raise AdapterNotFound(f"{name} has no version {prefix[:12]}: the newest are {newest}.", param="name")
        return found[0]

    def _check_settable(self, alias: str) -> None:
        if check_alias(alias) == LATEST:
            raise InvalidRequest(
                "latest is what was pushed last and cannot be set: choose another alias.", param="alias"
            )

    def _aliases_left(self, name: str, doomed: list[Manifest]) -> list[str]:
        """The aliases, as of now, that point at what is being deleted; its manifests may be gone already."""
        paths = self._storage.find(f"{ADAPTERS}/{name}/{ALIASES}")
        shares = {path.rpartition("/")[2]: read_alias(data) for path, data in self._storage.read_all(paths).items()}
        record = Record((), {alias: found for alias, found in shares.items() if found})
        return record.pointing_at(each.version for each in doomed)

    def _no_name(self, name: str) -> AdapterNotFound:
        """The hint needs the list; a registry that cannot be listed now has none."""
        try:
            known = list(self._index.entries())
        except StorageUnavailable:
            known = []
        near = difflib.get_close_matches(name, known, n=3)
        if near:
            return AdapterNotFound(f"no adapter {name}: did you mean {' or '.join(near)}?", param="name")
        hint = "see `lorafleet adapters list`" if known else "the registry is empty, push one"
        return AdapterNotFound(f"no adapter {name}: {hint}.", param="name")

    def _no_alias(self, name: str, alias: str) -> AdapterNotFound:
        record = self.record(name)
        if alias in record.aliases:
            gone = ", ".join(version[:12] for version in record.aliases[alias])
            message = f"{name}@{alias} points at {gone}, which is not there any more: set the alias again."
        else:
            known = sorted({LATEST, *record.aliases})
            near = difflib.get_close_matches(alias, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(known)}."
            message = f"{name} has no alias {alias}: {hint}"
        return AdapterNotFound(message, param="name")


def open_registry(config: RegistryConfig) -> Registry:
    """Asks nobody yet. Raises ConfigError for a URL that cannot be one."""
    folder = home()
    storage = open_storage(config.url or str(folder / "registry"), endpoint_url=config.endpoint_url)
    cache = AdapterCache(folder / "cache" / "adapters", config.cache_bytes)
    return Registry(storage, cache, max_adapter_bytes=config.max_adapter_bytes)


def _opened(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as error:
        raise InvalidRequest(f"cannot read {source}: {error.strerror}.", param="file") from None


def drawn(choices: Sequence[Resolved], draw: float | None = None) -> Resolved:
    """The one whose stretch of [0, 1) `draw` falls into; left out, chance decides."""
    at = secrets.SystemRandom().random() if draw is None else draw
    for choice in choices:
        at -= choice.share
        if at < 0:
            return choice
    return choices[-1]  # shares sum to 1 but for rounding


def _evaluation(data: bytes) -> Evaluation | None:
    try:
        return Evaluation.model_validate_json(data)
    except ValidationError:
        return None


def _in_use(doomed: list[Manifest], aliases: list[str]) -> AdapterInUse:
    what = _spelled(doomed[0]) if len(doomed) == 1 else doomed[0].name
    which = f"the aliases {', '.join(aliases)}" if len(aliases) > 1 else f"the alias {aliases[0]}"
    return AdapterInUse(f"{what} is in use by {which}: remove or repoint what points at it first.", param="name")


def _spelled(manifest: Manifest) -> str:
    return f"{manifest.name}@{manifest.version[:12]}"


def _json(manifest: Manifest) -> bytes:
    return manifest.model_dump_json(indent=1).encode()
