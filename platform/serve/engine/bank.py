"""The adapter bank: which adapter is in which slot, who uses it, and which one makes room.

    file -> loader() -> CPU memory, packed (LRU, bounded) -> slot (leased, pinned or the next to go)

Whoever needs adapters claims slots for all of them at once or gets none; threads of the bank's own load and fill. The
thread that runs the model calls `publish` and `set_rows` between steps. A slot is overwritten only when no lease
holds it. By hand, with one image's two rows of guidance:

    bank = AdapterBank(base, BankConfig(slots=4))
    with bank.acquire(version, lambda: read_adapter(path, bank.targets)) as lease:
        bank.publish()
        bank.set_rows([[(lease.slot, 0.8)]] * 2)
        bank.set_text_rows([[(lease.slot, 0.8)]])
        images = base.pipeline("a plush robot").images
"""

import contextlib
import copy
import dataclasses
import math
import re
import threading
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

import torch
from torch import nn

from lorafleet.core.errors import AdapterBusy, AdapterUnreadable, ConfigError, LorafleetError
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter
from lorafleet.sdxl.lora_keys import named
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve.config import BankConfig
from lorafleet.serve.engine.adapter_host import HostCache
from lorafleet.serve.engine.adapter_pack import Packed, SlotLayout
from lorafleet.serve.engine.slots import RowInputs, SlotLinear, unwrap, wrap

Loader = Callable[[], Adapter]
Rows = Sequence[Sequence[tuple[int, float]]]
"""For each row of a batch its (slot, weight) pairs."""
LOADERS: Final = 4  # threads; they wait for files most of the time
JOB_ROWS: Final = 2  # of one image with guidance
ROWS: Final = 16  # of the largest batch, where the config leaves it out
TILE: Final = 128  # of `fp8_kernels`: no tile may have features of two parts
_CROSS: Final = re.compile(r"unet\..+\.attn2\.to_[kv]")


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
    error: BaseException | None = None  # why it could not be filled, for those who have a lease on it
    changes_text: bool = False
    lines: int = 0  # how many lines may hold something else than zeros
    used_at: int = 0
    last_read: torch.cuda.Event | None = None


class Lease:
    """The right to use a slot until `release`, which may be called twice and from any thread.

    The slot may still be on its way: it is usable once `is_published`, and never if `check` raises.
    """

    def __init__(self, bank: "AdapterBank", key: str, slot: _Slot) -> None:
        """The bank's lock is held."""
        self.key = key
        self.slot = slot.index
        self._bank = bank
        self._slot = slot
        self._is_released = False
        slot.refs += 1

    @property
    def is_published(self) -> bool:
        return self._slot.is_published

    @property
    def changes_text(self) -> bool:
        """Whether the adapter, once published, changes a text encoder."""
        return self._slot.changes_text

    def check(self) -> None:
        """Raises what keeps the adapter out of its slot: AdapterIncompatible, what its loader raised (as
        AdapterUnreadable if it is no LorafleetError), or torch.AcceleratorError."""
        if (error := self._slot.error) is not None:
            raise copy.copy(error) from error  # several may get it, each with a traceback of its own

    def share(self) -> "Lease":
        """Another lease on the same slot. Raises AdapterBusy if this one was released."""
        with self._bank._lock:
            if self._is_released:
                raise AdapterBusy(f"the lease on the adapter {self.key} was released", param="adapters")
            return Lease(self._bank, self.key, self._slot)

    def release(self) -> None:
        with self._bank._lock:
            if not self._is_released:
                self._is_released = True
                self._bank._release(self._slot)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterBank:
    """Adapters in fixed slots of one base. Every method is safe for several threads but `publish`, `set_rows`,
    `set_text_rows`, `set_cross_rows` and `detach`, which belong to the thread that runs the model."""

    def __init__(
        self,
        base: Base,
        config: BankConfig,
        on_filled: Callable[[float | None], None] | None = None,
        *,
        cross_apart: bool = False,
    ) -> None:
        """Wraps every targeted linear of the UNet and both text encoders; until `detach` the base must not be moved
        to another device or type. `on_filled` is told, in another thread, how many seconds the copy into a slot took,
        None when there was none. With `cross_apart` the UNet's projections of the text obey `set_cross_rows` alone.
        Raises ConfigError."""
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
            self._rows = RowInputs(config.rows or ROWS, config.per_row, device)
            self._text_rows = RowInputs(config.text_rows, config.per_row, device)
            self._cross_rows = RowInputs(JOB_ROWS, config.per_row, device) if cross_apart else None
        self._lock = threading.Condition()
        self._slots = [_Slot(index, is_published=index == 0) for index in range(config.slots + 1)]
        self._loaders = ThreadPoolExecutor(min(LOADERS, config.slots), "adapter-loader")
        self._on_filled = on_filled
        self._pinned: set[str] = set()
        self._host = HostCache(config.host_bytes)
        self._clock = self._hits = self._host_hits = self._fills = self._evictions = self._failures = 0
        self._fill_s = 0.0
        is_cuda = device.type == "cuda"
        self._fill_stream = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._model_stream = torch.cuda.current_stream(device) if is_cuda else None
        inputs = {"unet": self._rows, "text_encoder": self._text_rows, "text_encoder_2": self._text_rows}
        self._originals: dict[str, nn.Linear] = {}
        places = self._layout.places
        if self._cross_rows is not None:
            cross = {name: place for name, place in places.items() if _CROSS.fullmatch(name)}
            places = {name: place for name, place in places.items() if name not in cross}
            self._originals |= wrap(base, self.targets, cross, self._storage, {"unet": self._cross_rows})
        self._originals |= wrap(base, self.targets, places, self._storage, inputs)

    def join(self, names: Sequence[str], linear: nn.Linear) -> nn.Linear | None:
        """A linear with the adapters of several that have one input, for the UNet's rows; `linear` has their weights,
        one behind the other. `linear` itself where none of `names` takes adapters; None where they differ in shape,
        only some take adapters, or their features do not fill the kernels' tiles."""
        places = [place for name in names if (place := self._layout.places.get(name)) is not None]
        if not places:
            return linear
        first, second = places[0], places[-1 if len(places) < 2 else 1]
        apart = second.a - first.a
        expected = [dataclasses.replace(first, a=first.a + i * apart, b=first.b + i * apart) for i in range(len(names))]
        if places != expected or first.out_features % TILE:
            return None
        return SlotLinear(linear, self._storage, first, self._rows, len(names), apart)

    @property
    def slot_bytes(self) -> int:
        """Device memory of one slot."""
        return self._storage[0].nbytes

    # --- from any thread ---

    def claim(self, wanted: Sequence[tuple[str, Loader]], *, only_resident: bool = False) -> tuple[Lease, ...] | None:
        """A lease for each of the adapters, or None while there are too few slots for all of them together: who waits
        holds nothing that another one waits for. Returns at once.

        `wanted`: (key, loader) pairs. A key names one immutable adapter, such as its version's hash; its loader reads
        it and is called in a thread of the bank's own, once however many ask meanwhile, with no lock held. With
        `only_resident` nothing is loaded: None unless all of them are in slots or on their way.
        """
        with self._lock:
            return self._claim(wanted, only_resident=only_resident)

    def acquire(self, key: str, loader: Loader, *, timeout_s: float = 0.0) -> Lease:
        """As `claim` for one adapter, waiting up to `timeout_s` for a slot and then until the adapter is in it; it is
        usable after the next `publish`. Raises AdapterBusy when the time is up, and what `Lease.check` raises."""
        with self._lock:
            leases = self._lock.wait_for(lambda: self._claim([(key, loader)]), timeout_s)
            if leases is None:
                raise AdapterBusy(
                    f"all {self.config.slots} adapter slots are in use: try again later or raise slots",
                    param="adapters",
                )
            (lease,) = leases
            try:
                self._lock.wait_for(lambda: not lease._slot.is_filling)
                lease.check()
            except BaseException:
                lease.release()
                raise
            return lease

    def can_hold(self, keys: Collection[str]) -> bool:
        """Whether the slots that are not pinned for others are enough for all of these together."""
        with self._lock:
            others = [slot for slot in self._slots[1:] if slot.key in self._pinned and slot.key not in keys]
            return len(set(keys)) <= self.config.slots - len(others)

    def holds(self, key: str) -> bool:
        """Whether the adapter is in a slot, on its way there, or in CPU memory: its loader is not needed then."""
        with self._lock:
            return self._find(key) is not None or self._host.get(key) is not None

    def residents(self) -> tuple[list[str], list[str]]:
        """The keys in slots or on their way there, and those in CPU memory, the most recently used last."""
        with self._lock:
            held = sorted(
                (slot for slot in self._slots[1:] if slot.key), key=lambda slot: (slot.refs > 0, slot.used_at)
            )
            return [slot.key for slot in held if slot.key], self._host.keys()

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

    def set_cross_rows(self, rows: Rows) -> None:
        """As `set_text_rows`, for one job's texts whose keys and values are computed next: up to two rows, in a bank
        made with `cross_apart`."""
        assert self._cross_rows is not None
        self._set(self._cross_rows, rows)

    def detach(self) -> None:
        """Puts the base's own linears back, once no loader is at work. Raises AdapterBusy while there are leases."""
        with self._lock:
            leased = [slot.key or "" for slot in self._slots if slot.refs]
            if leased:
                raise AdapterBusy(f"the bank cannot be detached, {named(leased)} is in use")
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: object, __: TracebackType | None) -> None:
        if kind is None:
            self.detach()
        else:
            self._close()

    # --- within ---

    def _close(self) -> None:
        self._loaders.shutdown(cancel_futures=True)
        unwrap(self.base, self.targets, self._originals)
        self._originals = {}

    def _claim(self, wanted: Sequence[tuple[str, Loader]], *, only_resident: bool = False) -> tuple[Lease, ...] | None:
        held = {key: slot for key, _ in wanted if (slot := self._find(key)) is not None}
        missing = {key: loader for key, loader in wanted if key not in held}
        room = [] if only_resident else [slot for slot in self._free() if slot.key not in held]
        if len(room) < len(missing):
            return None
        self._hits += len(held)
        for slot, (key, loader) in zip(room, missing.items(), strict=False):
            self._evictions += slot.key is not None
            slot.key, slot.is_published, slot.is_filling, slot.error = key, False, True, None
            held[key] = slot
            self._loaders.submit(self._load, slot, key, loader)
        return tuple(Lease(self, key, held[key]) for key, _ in wanted)

    def _free(self) -> list[_Slot]:
        """Slots that may be overwritten, the least recently used first."""
        free = [s for s in self._slots[1:] if not (s.refs or s.is_filling or s.key in self._pinned)]
        return sorted(free, key=lambda slot: (slot.key is not None, slot.used_at))

    def _load(self, slot: _Slot, key: str, loader: Loader) -> None:
        """Fills a claimed slot, in a loader thread; what goes wrong is left there for those who lease it."""
        with self._lock:
            is_wanted = slot.refs > 0
            if not is_wanted:  # whoever it was for has gone before its turn came
                slot.key, slot.is_filling = None, False
                self._lock.notify_all()
        seconds = self._load_into(slot, key, loader) if is_wanted else None
        if self._on_filled is not None:
            self._on_filled(seconds)

    def _load_into(self, slot: _Slot, key: str, loader: Loader) -> float | None:
        """The seconds that the copy took, None if it could not be made."""
        error: BaseException | None = None
        seconds = 0.0
        try:
            packed = self._packed(key, loader)
            start = time.perf_counter()
            self._fill(slot, packed.lines)
            seconds = time.perf_counter() - start
            slot.changes_text = packed.changes_text
        except (LorafleetError, torch.AcceleratorError) as known:
            error = known
        except BaseException as cause:  # whatever a loader can run into
            error = AdapterUnreadable(f"the adapter {key} cannot be loaded: {cause}", param="adapters")
            error.__cause__ = cause
            traceback.clear_frames(cause.__traceback__)  # they hold the adapter
        with self._lock:
            slot.is_filling, slot.error = False, error
            if error is None:
                self._fills += 1
                self._fill_s += seconds
            else:
                self._failures += 1
                slot.key, slot.lines = None, self.config.max_rank  # a free slot, of unknown content
            self._lock.notify_all()
        return None if error else seconds

    def _packed(self, key: str, loader: Loader) -> Packed:
        with self._lock:
            packed = self._host.get(key)
            self._host_hits += packed is not None
        if packed is None:
            packed = self._layout.pack(loader(), self.base.dtype, pinned=self._fill_stream is not None)
            with self._lock:
                self._host.put(key, packed)
        return packed

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

    def _release(self, slot: _Slot) -> None:
        assert slot.refs > 0
        slot.refs -= 1
        self._clock += 1
        slot.used_at = self._clock
        if self._model_stream is not None:
            with contextlib.suppress(torch.AcceleratorError):  # a broken device reads nothing any more
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
