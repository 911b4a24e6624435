"""Adapters that a replica loads before anybody asks for them, and keeps if they are pinned."""

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import Final

from lorafleet.core.errors import LorafleetError
from lorafleet.core.manifest import Manifest
from lorafleet.core.registry import Registry
from lorafleet.sdxl.lora import Adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.serve.config import Preload
from lorafleet.serve.engine.bank import AdapterBank

logger = logging.getLogger(__name__)

LOOK_S: Final = 15.0  # between looks at what the names mean now
RETRY_S: Final = 3.0  # after a failure
SLOT_S: Final = 5.0  # to wait for a slot


class Preloader:
    """A thread that keeps the wanted adapters where they should be. What an alias means is looked up again and again:
    its new version is loaded before the old one may go."""

    def __init__(self, bank: AdapterBank, registry: Registry) -> None:
        self._bank = bank
        self._registry = registry
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._wanted: Sequence[Preload] = ()
        self._loaded: set[str] = set()
        self._pinned: set[str] = set()
        self._problems: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="preloader", daemon=True)
        self._thread.start()

    def want(self, wanted: Sequence[Preload]) -> None:
        """Begins with these; what is not wanted any more is no longer pinned."""
        with self._lock:
            self._wanted = tuple(wanted)
        self._wake.set()

    @property
    def problems(self) -> tuple[str, ...]:
        """Why some of them are not loaded."""
        with self._lock:
            return tuple(self._problems.values())

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._wake.clear()
            with self._lock:
                wanted = self._wanted
            problems: dict[str, str] = {}
            pinned: set[str] = set()
            for preload in wanted:
                if self._closed.is_set():
                    return
                try:
                    pinned |= self._load(preload)
                except LorafleetError as error:
                    problems[preload.name] = f"{preload.name} is not preloaded: {error.message}"
                    if self._problems.get(preload.name) != problems[preload.name]:
                        logger.warning("%s", problems[preload.name])
            with self._lock:
                self._problems = problems
            if not problems:  # else what was pinned before may be what a silent registry cannot name now
                for key in self._pinned - pinned:
                    self._bank.unpin(key)
                self._pinned = pinned
            self._wake.wait((RETRY_S if problems else LOOK_S) if wanted else None)

    def _load(self, preload: Preload) -> set[str]:
        """Loads what the name means now; the keys to be pinned."""
        manifests = [choice.manifest for choice in self._registry.choices(preload.name)]
        for manifest in manifests:
            key = manifest.version
            if preload.pin:
                self._pin(key)
            if key not in self._loaded or (preload.pin and not self._bank.holds(key)):
                self._registry.pull(manifest)  # before a slot is taken
                self._bank.acquire(key, partial(self._read, manifest), timeout_s=SLOT_S).release()
                self._loaded.add(key)
        return {manifest.version for manifest in manifests} if preload.pin else set()

    def _pin(self, key: str) -> None:
        if key in self._pinned:
            return
        if len(self._pinned) + 1 >= self._bank.config.slots:
            raise LorafleetError(
                f"{len(self._pinned)} of {self._bank.config.slots} slots are pinned, one must stay free for others: "
                "raise engine.bank.slots, or pin fewer"
            )
        self._pinned.add(key)
        self._bank.pin(key)

    def _read(self, manifest: Manifest) -> Adapter:
        return read_adapter(self._registry.pull(manifest), self._bank.targets)
