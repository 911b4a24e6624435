"""Clocks and loads: how long things take on the device, and how many images a second come out of an engine."""

import gc
import itertools
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from PIL import Image

from lorafleet.core.errors import LorafleetError
from lorafleet.serve.engine import Engine, Event, Handle, Job, Step

MakeJob = Callable[[int], Job]
Finish = Callable[[Job, Image.Image], bytes]
Moment = Callable[[], float]
"""Seconds on `time.perf_counter()`'s clock; waits until the device has come that far."""


@dataclass(frozen=True)
class Load:
    """What a closed loop saw: latencies in the order of completion, from submitting to the PNG's last byte."""

    latencies_s: list[float]
    seconds: float
    graphs: int
    """Graphs that torch.compile made meanwhile."""

    @property
    def img_s(self) -> float:
        return len(self.latencies_s) / self.seconds


class Clock:
    """Moments of the device: on a GPU when it gets there, not when it was told to."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None
        if self._device is not None:
            self._zero = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._zero.record(torch.cuda.current_stream(self._device))
            self._zero.synchronize()
            self._zero_s = time.perf_counter()

    def mark(self) -> Moment:
        """Now, as far as the current stream of this thread is concerned."""
        if self._device is None:
            now = time.perf_counter()
            return lambda: now
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))

        def moment() -> float:
            event.synchronize()
            return self._zero_s + float(self._zero.elapsed_time(event)) / 1e3

        return moment


class StepMoments:
    """A listener of one job: the moments at which its steps were done."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._moments: list[Moment] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self._moments.append(self._clock.mark())

    def __len__(self) -> int:
        return len(self._moments)

    def seconds(self) -> list[float]:
        return [moment() for moment in list(self._moments)]


def closed_loop(engine: Engine, make_job: MakeJob, finish: Finish, at_once: int, images: int) -> Load:
    """`at_once` clients, each of which asks for its next image when it has the last one.

    Measures whole rounds, at least `images`, after a first round that is not counted; the clients keep on until the
    end, so that the last image has as many neighbours as the first.
    """
    wanted = -(-images // at_once) * at_once
    numbers, lock, stop = itertools.count(), threading.Lock(), threading.Event()
    done: list[tuple[float, float]] = []  # (end, latency)
    running: set[Handle] = set()
    graphs: list[int] = []

    def client() -> None:
        while not stop.is_set():
            with lock:
                job = make_job(next(numbers))
            start = time.perf_counter()
            handle = engine.submit(job)
            with lock:
                running.add(handle)
            try:
                finish(job, handle.result().image)
            except LorafleetError:
                if stop.is_set():
                    return
                raise
            finally:
                with lock:
                    running.discard(handle)
            end = time.perf_counter()
            with lock:
                done.append((end, end - start))
                if len(done) == at_once:
                    graphs.append(graph_count())
                if len(done) == at_once + wanted:
                    graphs.append(graph_count())
                    stop.set()

    def until_stopped() -> None:
        try:
            client()
        finally:
            stop.set()  # one that fails ends the others
            with lock:
                left = list(running)
            for handle in left:
                handle.cancel()

    with ThreadPoolExecutor(at_once, "client") as pool:
        for future in [pool.submit(until_stopped) for _ in range(at_once)]:
            future.result()
    counted = done[at_once : at_once + wanted]
    seconds = counted[-1][0] - done[at_once - 1][0]
    return Load([latency for _, latency in counted], seconds, graphs[1] - graphs[0])


def run_all(engine: Engine, jobs: Sequence[Job]) -> None:
    """All at once. Raises what hindered one of them."""
    for handle in [engine.submit(job) for job in jobs]:
        handle.result()


def step_gaps_s(engine: Engine, make_job: MakeJob, at_once: int, clock: Clock) -> list[float]:
    """Seconds from step to step while all of `at_once` jobs take part."""
    listeners = [StepMoments(clock) for _ in range(at_once)]
    jobs = [replace(make_job(i), on_event=listener) for i, listener in enumerate(listeners)]
    run_all(engine, jobs)
    moments = [listener.seconds() for listener in listeners]
    begin = max(steps[0] for steps in moments)  # the last one has joined
    end = min(steps[-1] for steps in moments)  # nobody has left
    together = [moment for moment in moments[0] if begin <= moment <= end]
    if len(together) < 4:
        raise ValueError(f"{at_once} jobs took only {len(together)} steps together: give them more steps")
    return gaps(together)


def gaps(moments: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(moments)]


def percentile_95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def median_ms(seconds: Sequence[float]) -> float:
    return 1e3 * statistics.median(seconds)


def graph_count() -> int:
    """How many graphs torch.compile has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo else 0


def reset_peak(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
