"""What happens when a job joins a running batch: how long until its first step, and what the others lose."""

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

from measure import Clock, StepMoments, gaps, median_ms, percentile_95
from report import Row
from workload import Variant, Workload

from lorafleet.core.errors import LorafleetError
from lorafleet.core.generation import MAX_STEPS
from lorafleet.serve.engine import Engine, Handle, JobAdapter

RUNNING: Final = 3
JOIN_STEPS: Final = 5
REPEATS: Final = 4
ALONE_STEPS: Final = 5  # of those, that tell what a step takes alone
WAIT_S: Final = 300.0
PAUSE_STEPS: Final = 6  # that the batch takes alone before the next one joins


@dataclass(frozen=True)
class Join:
    """`joined_s`: from submitting to the end of its first step. `lost_s`: what the batch took longer until then than
    its steps take without anybody joining, the last of them with the newcomer's rows."""

    joined_s: float
    lost_s: float


class _Batch:
    """Keeps `RUNNING` long jobs running, started again when they are done, until `stop`."""

    def __init__(self, load: Workload, engine: Engine, clock: Clock, adapter: JobAdapter) -> None:
        self._load, self._engine, self._clock, self._adapter = load, engine, clock, adapter
        self._is_stopped = threading.Event()
        self._handles: dict[int, Handle] = {}
        self._listeners: list[StepMoments] = []
        self._pool = ThreadPoolExecutor(RUNNING, "batch")
        self._futures = [self._pool.submit(self._run, i) for i in range(RUNNING)]

    def step_seconds(self) -> list[float]:
        """Moments of the steps of the first job that runs now, or ran last."""
        return self._listeners[-1].seconds()

    def wait(self, steps: int) -> None:
        """Until the batch has taken so many more."""
        wanted = self._taken() + steps
        deadline = time.monotonic() + WAIT_S
        while self._taken() < wanted:
            if self._is_stopped.is_set() or time.monotonic() > deadline:
                raise RuntimeError("the running batch stands still")
            time.sleep(0.002)

    def stop(self) -> None:
        """Raises what ended a job of the batch, if anything did."""
        self._is_stopped.set()
        for handle in list(self._handles.values()):
            handle.cancel()
        self._pool.shutdown()
        for future in self._futures:
            future.result()

    def _taken(self) -> int:
        return sum(map(len, self._listeners))

    def _run(self, index: int) -> None:
        jobs = self._load.jobs(self._engine.base, "none", MAX_STEPS)
        number = 0
        while not self._is_stopped.is_set():
            listener = StepMoments(self._clock)
            handle = self._engine.submit(replace(jobs(number), adapters=(self._adapter,), on_event=listener))
            self._handles[index] = handle
            if index == 0:
                self._listeners.append(listener)
            number += 1
            try:
                handle.result()
            except LorafleetError:
                if not self._is_stopped.is_set():
                    self._is_stopped.set()
                    raise


def measure_joins(load: Workload, engine: Engine, variant: Variant) -> None:
    """Rows for joining with no adapter, with one for the first time, with one that is in a slot or in CPU memory."""
    base, bank = engine.base, engine.bank
    assert bank is not None, "the swap part needs a bank"
    slots = bank.config.slots
    # The batch holds one slot; more others than fit into the rest take turns, so each has lost its slot when it
    # comes again.
    # Keys of their own: nobody has used these adapters yet.
    adapters = [replace(load.job_adapter(base, i), key=f"joins-{i}") for i in range(slots + 1)]
    clock = Clock(base.device)
    batch = _Batch(load, engine, clock, adapters[0])
    try:
        batch.wait(PAUSE_STEPS)

        def joins(what: str, used: list[tuple[JobAdapter, ...]], fills: int) -> None:
            before = bank.stats()
            found = [_join(load, engine, batch, clock, i, adapter) for i, adapter in enumerate(used)]
            after = bank.stats()
            if after.fills - before.fills != fills:
                raise RuntimeError(f"{after.fills - before.fills} slots were filled, not {fills}")
            load.report.add(_row(f"{variant.name}: a job joins {RUNNING}, {what}", found))
            if fills and after.host_hits - before.host_hits == fills:
                fill_ms = 1e3 * (after.fill_s - before.fill_s) / fills
                load.report.add(
                    Row("swap", f"{variant.name}: filling a slot", samples=fills, median_ms=fill_ms, note="mean")
                )

        joins("no adapter", [()] * REPEATS, 0)
        joins("an adapter for the first time", [(adapter,) for adapter in adapters[1:]], slots)
        joins("its adapter in a slot", [(adapters[-1],)] * REPEATS, 0)
        turns = [adapters[1 + i % slots] for i in range(max(REPEATS, slots))]
        joins("its adapter in CPU memory", [(adapter,) for adapter in turns], len(turns))
    finally:
        batch.stop()


def _join(
    load: Workload, engine: Engine, batch: _Batch, clock: Clock, number: int, adapters: tuple[JobAdapter, ...]
) -> Join:
    listener = StepMoments(clock)
    job = load.jobs(engine.base, "none", JOIN_STEPS)(0)
    batch.wait(PAUSE_STEPS)
    alone_s = statistics.median(gaps(batch.step_seconds()[-ALONE_STEPS:]) or [0.0])
    time.sleep(alone_s * (number % REPEATS) / REPEATS)  # not always at the same moment of a step
    start = time.perf_counter()
    engine.submit(replace(job, adapters=adapters, on_event=listener)).result()
    mine = listener.seconds()
    return Join(mine[0] - start, _lost_s(batch.step_seconds(), start, mine))


def _lost_s(batch: list[float], start: float, mine: list[float]) -> float:
    """NaN when the batch's first job was just being started anew. All arguments are moments in seconds."""
    before = [moment for moment in batch if moment <= start]
    after = [moment for moment in batch if moment > start]
    if len(before) < ALONE_STEPS or not after:
        return float("nan")
    first = min(range(len(after)), key=lambda i: abs(after[i] - mine[0]))  # the step that the newcomer takes part in
    alone_s = statistics.median(gaps(before[-ALONE_STEPS:]))
    together_s = statistics.median(gaps(mine))
    return after[first] - before[-1] - first * alone_s - together_s


def _row(what: str, joins: list[Join]) -> Row:
    joined_s = [join.joined_s for join in joins]
    lost_s = [join.lost_s for join in joins if join.lost_s == join.lost_s]
    lost = f"; the batch loses {median_ms(lost_s):.1f} ms (median)" if lost_s else ""
    return Row(
        "swap",
        what,
        samples=len(joins),
        median_ms=median_ms(joined_s),
        p95_ms=1e3 * percentile_95(joined_s),
        note=f"until the end of its first step{lost}",
    )
