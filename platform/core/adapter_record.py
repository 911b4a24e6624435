"""The registry's layout: one adapter as its objects say.

adapters/<name>/<version>/adapter.safetensors
adapters/<name>/<version>/manifest.json          written last: without it there is no such version
adapters/<name>/<version>/evaluations/<id>.json  what was found of it, by time; goes with it
adapters/<name>/aliases/<alias>                  a version, or several with shares
incoming/<id>                                    handed in to be checked elsewhere; gone within the push
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from lorafleet.core.manifest import LATEST, PRODUCTION, Entry, Manifest, Shares, read_alias
from lorafleet.core.storage import Storage, Stored

logger = logging.getLogger(__name__)

ADAPTERS: Final = "adapters"
INCOMING: Final = "incoming"
FILE_NAME: Final = "adapter.safetensors"
MANIFEST_NAME: Final = "manifest.json"
ALIASES: Final = "aliases"
EVALUATIONS: Final = "evaluations"
THREADS: Final = 16


@dataclass(frozen=True)
class Record:
    """What is there of one adapter. `manifests`: at least one, newest first. `aliases`: as stored."""

    manifests: tuple[Manifest, ...]
    aliases: Mapping[str, Shares]

    @property
    def latest(self) -> Manifest:
        """What was pushed last. `aliases/latest` is written before the manifest and not by deletes, so that it may name
        a version that is not there yet or any more: then it is the newest manifest."""
        named = self._manifest(self.aliases.get(LATEST, {}))
        return self.manifests[0] if named is None else named

    @property
    def entry(self) -> Entry:
        """The adapter as it is listed."""
        served = self._manifest(self.aliases.get(PRODUCTION, {})) or self.latest
        aliases = dict(sorted({**self.aliases, LATEST: {self.latest.version: 1.0}}.items()))
        return Entry(manifest=served, versions=tuple(each.version for each in self.manifests), aliases=aliases)

    def pointing_at(self, versions: Iterable[str]) -> list[str]:
        """The aliases that name one of `versions`. `latest` is bookkeeping and holds nothing."""
        wanted = set(versions)
        return sorted(alias for alias, shares in self.aliases.items() if alias != LATEST and wanted & set(shares))

    def _manifest(self, shares: Shares) -> Manifest | None:
        """That with the largest share."""
        version = max(shares, key=lambda version: (shares[version], version), default=None)
        return next((each for each in self.manifests if each.version == version), None)


def file_path(name: str, version: str) -> str:
    return f"{ADAPTERS}/{name}/{version}/{FILE_NAME}"


def manifest_path(name: str, version: str) -> str:
    return f"{ADAPTERS}/{name}/{version}/{MANIFEST_NAME}"


def alias_path(name: str, alias: str) -> str:
    return f"{ADAPTERS}/{name}/{ALIASES}/{alias}"


def evaluations_path(name: str, version: str) -> str:
    return f"{ADAPTERS}/{name}/{version}/{EVALUATIONS}"


def read_manifest(storage: Storage, name: str, version: str) -> Manifest | None:
    path = manifest_path(name, version)
    data = storage.read(path)
    return None if data is None else _parse_manifest(data, path)


def read_record(storage: Storage, name: str) -> Record | None:
    """None where the adapter has no version."""
    return _records(storage, storage.find(f"{ADAPTERS}/{name}")).get(name)


def read_records(storage: Storage, names: Iterable[str]) -> dict[str, Record]:
    """Those of `names` that are there; one listing and one round of reads for each."""
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: (name, read_record(storage, name)), names)
        return {name: record for name, record in found if record is not None}


def read_all_records(storage: Storage) -> dict[str, Record]:
    """Every adapter: lists and reads the whole registry."""
    return _records(storage, storage.find(ADAPTERS))


def _records(storage: Storage, found: Mapping[str, Stored]) -> dict[str, Record]:
    parts = {path: path.split("/") for path in found}
    wanted = [
        path
        for path, part in parts.items()
        if len(part) == 4 and (part[3] == MANIFEST_NAME or part[2] == ALIASES) and part[0] == ADAPTERS
    ]
    manifests: dict[str, list[Manifest]] = defaultdict(list)
    aliases: dict[str, dict[str, Shares]] = defaultdict(dict)
    for path, data in storage.read_all(wanted).items():
        _, name, kind, last = parts[path]
        if kind == ALIASES:
            shares = read_alias(data)
            if shares is None:
                logger.warning("%s in the adapter registry is damaged and skipped: set the alias again", path)
            else:
                aliases[name][last] = shares
        elif manifest := _parse_manifest(data, path):
            manifests[name].append(manifest)
    return {
        name: Record(
            tuple(sorted(several, key=lambda each: (each.pushed_at, each.version), reverse=True)), aliases[name]
        )
        for name, several in sorted(manifests.items())
    }


def _parse_manifest(data: bytes, path: str) -> Manifest | None:
    """None, with a warning in the log, where it is damaged or says that it belongs elsewhere."""
    try:
        manifest = Manifest.model_validate_json(data)
        if manifest_path(manifest.name, manifest.version) != path:
            raise ValueError(f"it is that of {manifest.name}@{manifest.version}")
    except ValueError as error:  # pydantic's ValidationError is one
        cause = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else error
        logger.warning("%s in the adapter registry is damaged and skipped, push its adapter again: %s", path, cause)
        return None
    return manifest
