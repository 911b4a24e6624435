"""What an engine and its adapter bank do, as measurements. Knows no Ray."""

import sys
from collections.abc import Mapping
from typing import Final

from lorafleet.core.metrics import (
    COMPILED_GRAPHS,
    HOST_BYTES,
    HOST_HITS,
    IMAGES,
    OK,
    RESIDENT_ADAPTERS,
    SLOT_EVICTIONS,
    SLOT_FILL_FAILURES,
    SLOT_FILL_SECONDS,
    SLOT_HITS,
    SLOTS,
    STAGE_SECONDS,
    STEP_IMAGES,
    STEP_OCCUPANCY,
    STEP_SECONDS,
    Recorder,
)
from lorafleet.serve.engine import Observer
from lorafleet.serve.engine.bank import AdapterBank

STAGES: Final = ("queue", "encode", "denoise", "decode")


class EngineMetrics(Observer):
    """For `Engine.observe`; what the bank counts by itself comes with `sample`, to be called in one thread."""

    def __init__(self, recorder: Recorder, bank: AdapterBank | None) -> None:
        self._recorder = recorder
        self._bank = bank
        if bank is not None:
            self._before = bank.stats()

    def step_taken(self, seconds: float, images: int, rows: int, batch_rows: int) -> None:
        self._recorder.observe(STEP_SECONDS, seconds)
        self._recorder.observe(STEP_IMAGES, images)
        self._recorder.observe(STEP_OCCUPANCY, rows / batch_rows)

    def image_ended(self, outcome: str, timings: Mapping[str, float]) -> None:
        self._recorder.add(IMAGES, outcome=outcome)
        if outcome == OK:
            for stage in STAGES:
                self._recorder.observe(STAGE_SECONDS, timings[f"{stage}_s"], stage=stage)

    def slot_filled(self, seconds: float) -> None:
        self._recorder.observe(SLOT_FILL_SECONDS, seconds)

    def sample(self) -> None:
        self._recorder.set(COMPILED_GRAPHS, _compiled_graphs())
        if self._bank is not None:
            self._sample_bank(self._bank, self._recorder)

    def _sample_bank(self, bank: AdapterBank, recorder: Recorder) -> None:
        before, now = self._before, bank.stats()
        self._before = now
        recorder.add(SLOT_HITS, now.hits - before.hits)
        recorder.add(HOST_HITS, now.host_hits - before.host_hits)
        recorder.add(SLOT_EVICTIONS, now.evictions - before.evictions)
        recorder.add(SLOT_FILL_FAILURES, now.failures - before.failures)
        recorder.set(RESIDENT_ADAPTERS, now.resident, tier="slot")
        recorder.set(RESIDENT_ADAPTERS, now.host_adapters, tier="host")
        recorder.set(HOST_BYTES, now.host_bytes)
        recorder.set(SLOTS, bank.config.slots, state="total")
        recorder.set(SLOTS, now.leased, state="leased")
        recorder.set(SLOTS, now.pinned, state="pinned")


def _compiled_graphs() -> int:
    """Without importing torch's compiler for it, which takes seconds."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])
