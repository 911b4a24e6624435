"""The adapter bank: which adapter is in which slot, who uses it, and which one makes room.

    file -> loader() -> CPU memory, packed (LRU, bounded) -> slot (leased, pinned or the next to go)

`acquire` does all of the way in the calling thread, which is not the one that runs the model; that one calls
`publish` and `set_rows` between steps. A slot is overwritten only when no lease holds it. By hand, with one image's
two rows of guidance:

    bank = AdapterBank(base, BankConfig(slots=4))
    with bank.acquire(version, lambda: read_adapter(path, bank.targets)) as lease:
        bank.publish()
        bank.set_rows([[(lease.slot, 0.8)]] * 2)
        bank.set_text_rows([[(lease.slot, 0.8)]])
        images = base.pipeline("a plush robot").images
"""

import copy
import dataclasses
import math
import re
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import torch

from lorafleet.core.errors import AdapterBusy, AdapterUnreadable, ConfigError, LorafleetError
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter
from lorafleet.sdxl.lora_keys import named
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve.engine.adapter_config import BankConfig
from lorafleet.serve.engine.adapter_host import HostCache
from lorafleet.serve.engine.adapter_pack import SlotLayout
from lorafleet.serve.engine.slots import RowInputs, SlotLinear, unwrap, wrap

Loader = Callable[[], Adapter]
Rows = Sequence[Sequence[tuple[int, float]]]
"""For each row of a batch its (slot, weight) pairs."""


@dataclasses.dataclass(frozen=True)
class BankStats:
    """Counts since the start, except the first five, which are as of now."""

    resident: int
    leased: int
    pinned: int
    host_adapters: int
    host_bytes: int
    hits: int
    host_hits: int
    fills: int
    fill_s: float
    evictions: int
    failures: int


@dataclasses.dataclass(eq=False)
class _Slot:
    index: int
    key: str | None = None  # None: free
    refs: int = 0
    is_filling: bool = False
    is_published: bool = False
    lines: int = 0  # how many lines may hold something else than zeros
    used_at: int = 0
    last_read: torch.cuda.Event | None = None


class _Flight:
    """One load that several may wait for."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.error: LorafleetError | None = None


class Lease:
    """The right to use a slot until `release`, which may be called twice and from any thread."""

    def __init__(self, bank: "AdapterBank", key: str, slot: int) -> None:
        self.key = key
        self.slot = slot
        self._bank = bank
        self._is_released = False

    @property
    def is_published(self) -> bool:
        return self._bank._slots[self.slot].is_published

    def release(self) -> None:
        with self._bank._lock:
            if not self._is_released:
                self._is_released = True
                self._bank._release(self.slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterBank:
    """Adapters in fixed slots of one base. Every method is safe for several threads but `publish`, `set_rows`,
    `set_text_rows` and `detach`, which belong to the thread that runs the model."""

    def __init__(self, base: Base, config: BankConfig) -> None:
        """Wraps every targeted linear of the UNet and both text encoders; until `detach` the base must not be moved
        to another device or type. Raises ConfigError."""
        if base.config.low_memory and base.device.type == "cuda":
            raise ConfigError(
                "base.low_memory moves the weights about, adapters need them in place: set base.low_memory=false",
                param="base.low_memory",
            )
        self.base = base
        self.config = config
        self.targets = targets_of(base)
        wanted = re.compile(config.targets)
        linears = {name: size for name, size in self.targets.linears.items() if wanted.fullmatch(name)}
        if not linears:
            raise ConfigError(f"targets {config.targets!r} match no linear of the base", param="targets")
        if any(isinstance(m, SlotLinear) for part in PARTS for m in getattr(base.pipeline, part).modules()):
            raise ConfigError("the base has an adapter bank already: detach it first")
        self._layout = SlotLayout(linears, self.targets.fingerprint, config.max_rank)
        device = base.device
        with torch.inference_mode(False):  # else these could only be written to in inference mode
            shape = config.slots + 1, config.max_rank, self._layout.width
            self._storage = torch.zeros(shape, dtype=base.dtype, device=device)
            self._rows = RowInputs(config.rows, config.per_row, device)
            self._text_rows = RowInputs(config.text_rows, config.per_row, device)
        self._lock = threading.Condition()
        self._slots = [_Slot(index, is_published=index == 0) for index in range(config.slots + 1)]
        self._flights: dict[str, _Flight] = {}
        self._pinned: set[str] = set()
        self._host = HostCache(config.host_bytes)
        self._clock = self._hits = self._host_hits = self._fills = self._evictions = self._failures = 0
        self._fill_s = 0.0
        is_cuda = device.type == "cuda"
        self._fill_stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._model_stream = torch.cuda.current_stream(device) if is_cuda else None
        inputs = {"unet": self._rows, "text_encoder": self._text_rows, "text_encoder_2": self._text_rows}
        self._originals = wrap(base, self.targets, self._layout.places, self._storage, inputs)

    @property
    def slot_bytes(self) -> int:
        """Device memory of one slot."""
        return self._storage[0].nbytes

    # --- from any thread ---

    def acquire(self, key: str, loader: Loader, *, timeout_s: float = 0.0) -> Lease:
        """A lease on the slot that holds the adapter `key`, filled first if need be; it is usable after the next
        `publish`. `key` names one immutable adapter, such as its version's hash; `loader` reads it and is called in
        this thread, once however many ask at the same time, with no lock held. Waits up to `timeout_s` for a slot.

        Raises AdapterBusy, AdapterIncompatible, or what `loader` raises (as AdapterUnreadable if it is no
        LorafleetError); all who wait for the same load get the error, and nothing of it stays. AdapterBusy is for the
        one whose time is up; what was loaded stays in CPU memory.
        """
        while True:
            with self._lock:
                slot = self._find(key)
                if slot is not None:
                    self._hits += 1
                    slot.refs += 1
                    return Lease(self, key, slot.index)
                flight = self._flights.get(key)
                if flight is None:
                    flight = self._flights[key] = _Flight()
                    break
            flight.done.wait()
            if flight.error is not None and not isinstance(flight.error, AdapterBusy):
                raise copy.copy(flight.error) from flight.error
        try:
            return self._load(key, loader, timeout_s)
        except LorafleetError as error:
            flight.error = error
            raise
        except Exception as error:  # whatever a loader can run into
            flight.error = AdapterUnreadable(f"the adapter {key} cannot be loaded: {error}", param="adapters")
            raise flight.error from error
        finally:
            with self._lock:
                self._failures += flight.error is not None and not isinstance(flight.error, AdapterBusy)
                del self._flights[key]
            flight.done.set()

    def pin(self, key: str) -> None:
        """Keeps the adapter in its slot, now or as soon as it gets one, until `unpin`."""
        with self._lock:
            self._pinned.add(key)

    def unpin(self, key: str) -> None:
        with self._lock:
            self._pinned.discard(key)
            self._lock.notify_all()

    def stats(self) -> BankStats:
        with self._lock:
            held = [slot for slot in self._slots if slot.key is not None and not slot.is_filling]
            return BankStats(
                resident=len(held),
                leased=sum(slot.refs > 0 for slot in held),
                pinned=sum(slot.key in self._pinned for slot in held),
                host_adapters=len(self._host),
                host_bytes=self._host.bytes,
                hits=self._hits,
                host_hits=self._host_hits,
                fills=self._fills,
                fill_s=self._fill_s,
                evictions=self._evictions,
                failures=self._failures,
            )

    # --- from the thread that runs the model, between steps ---

    def publish(self) -> tuple[str, ...]:
        """Makes the slots that were filled since the last call usable, and returns their keys."""
        if self._fill_stream is not None:
            self._model_stream = torch.cuda.current_stream(self.base.device)
        with self._lock:
            new = [slot for slot in self._slots if slot.key and not slot.is_filling and not slot.is_published]
            for slot in new:
                slot.is_published = True
            return tuple(slot.key for slot in new if slot.key)

    def set_rows(self, rows: Rows) -> None:
        """What each row of the next UNet batches uses; rows beyond use nothing. To be called after a lease's release
        and before the next step. Weights may be negative or zero; the same slot twice adds up.

        Raises ValueError for more rows or adapters than configured, a slot that is not leased or not published, and
        weights that are no finite numbers.
        """
        self._set(self._rows, rows)

    def set_text_rows(self, rows: Rows) -> None:
        """As `set_rows`, for the prompts that both text encoders get next. It may be another thread that runs these;
        then a lease is to be released only when its work on the device is done."""
        self._set(self._text_rows, rows)

    def detach(self) -> None:
        """Puts the base's own linears back. Raises AdapterBusy while there are leases."""
        with self._lock:
            leased = [slot.key or "" for slot in self._slots if slot.refs]
            if leased or self._flights:
                raise AdapterBusy(f"the bank cannot be detached, {named(leased or self._flights)} is in use")
        self._unwrap()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.detach()
        else:
            self._unwrap()

    # --- within ---

    def _unwrap(self) -> None:
        unwrap(self.base, self.targets, self._originals)
        self._originals = {}

    def _load(self, key: str, loader: Loader, timeout_s: float) -> Lease:
        with self._lock:
            lines = self._host.get(key)
            self._host_hits += lines is not None
        if lines is None:
            lines = self._layout.pack(loader(), self.base.dtype, pinned=self._fill_stream is not None)
            with self._lock:
                self._host.put(key, lines)
        slot = self._claim(timeout_s)
        start = time.perf_counter()
        try:
            self._fill(slot, lines)
        except BaseException:
            with self._lock:  # unknown content in a free slot
                slot.is_filling, slot.lines = False, self.config.max_rank
                self._lock.notify_all()
            raise
        with self._lock:
            slot.key, slot.refs, slot.is_filling = key, 1, False
            self._fills += 1
            self._fill_s += time.perf_counter() - start
        return Lease(self, key, slot.index)

    def _claim(self, timeout_s: float) -> _Slot:
        """A slot to fill, nobody else's. Raises AdapterBusy."""
        with self._lock:
            slot = self._lock.wait_for(self._next_free, timeout_s)
            if slot is None:
                raise AdapterBusy(
                    f"all {self.config.slots} adapter slots are in use: try again later or raise slots",
                    param="adapters",
                )
            self._evictions += slot.key is not None
            slot.key, slot.is_published, slot.is_filling = None, False, True
            return slot

    def _next_free(self) -> _Slot | None:
        usable = [s for s in self._slots[1:] if not (s.refs or s.is_filling or s.key in self._pinned)]
        return min(usable, key=lambda slot: (slot.key is not None, slot.used_at), default=None)

    def _fill(self, slot: _Slot, lines: torch.Tensor) -> None:
        """Copies the lines into the slot and waits until they are there."""
        if self._fill_stream is None:
            self._copy(slot, lines)
            return
        with torch.cuda.stream(self._fill_stream):
            if slot.last_read is not None:  # the last step that used the old adapter may still run
                self._fill_stream.wait_event(slot.last_read)
            self._copy(slot, lines)
        self._fill_stream.synchronize()

    def _copy(self, slot: _Slot, lines: torch.Tensor) -> None:
        rank = lines.shape[0]
        before, slot.lines = slot.lines, self.config.max_rank
        self._storage[slot.index, :rank].copy_(lines, non_blocking=True)
        if before > rank:
            self._storage[slot.index, rank:before].zero_()
        slot.lines = rank

    def _find(self, key: str) -> _Slot | None:
        return next((slot for slot in self._slots[1:] if slot.key == key), None)

    def _release(self, index: int) -> None:
        slot = self._slots[index]
        assert slot.refs > 0
        slot.refs -= 1
        self._clock += 1
        slot.used_at = self._clock
        if self._model_stream is not None:
            slot.last_read = self._model_stream.record_event()
        self._lock.notify_all()

    def _set(self, inputs: RowInputs, rows: Rows) -> None:
        if len(rows) > inputs.slots.shape[0]:
            raise ValueError(f"{len(rows)} rows, the bank was made for {inputs.slots.shape[0]}")
        for row in rows:
            if len(row) > self.config.per_row:
                raise ValueError(f"{len(row)} adapters in a row, at most {self.config.per_row} can be combined")
            for index, weight in row:
                slot = self._slots[index] if 0 <= index < len(self._slots) else None
                if index != 0 and not (slot is not None and slot.refs and slot.is_published):
                    raise ValueError(f"slot {index} is not leased or not published")
                if not math.isfinite(weight):
                    raise ValueError(f"an adapter's weight must be a finite number, not {weight}")
        inputs.write(rows, [slot.lines for slot in self._slots])
