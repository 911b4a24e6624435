"""What there is without us: diffusers' own pipeline, one image at a time and as a batch, eager and compiled."""

import copy
import time
from functools import partial
from typing import Any, Final

import torch
from measure import graph_count, median_ms, peak_gb, percentile_95, reset_peak
from report import Row
from workload import Variant, Workload

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.schedulers import make_scheduler

COMPILE_S: Final = 60.0
"""What one shape is expected to take when there is a budget of time."""


def measure_baseline(load: Workload, *, compiled: bool) -> None:
    """Rows of one image at a time and of the largest batch. Compiled for each of the two shapes alone, as fast as
    diffusers gets it without changing the model."""
    part = "compiled" if compiled else "baseline"
    base = load.make_base(Variant(part))
    pipeline = copy.copy(base.pipeline)
    pipeline.scheduler = make_scheduler(base, "euler")
    if compiled:
        pipeline.unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
    for size in sorted({1, load.most}):
        what = f"diffusers {'compiled' if compiled else 'eager'}, {'one by one' if size == 1 else f'{size} a batch'}"
        if size > 1 and load.device.type == "cuda":
            pipeline.vae.enable_slicing()  # activations of 8 SDXL images have 2**31 elements, too many for some kernels
        estimate_s = COMPILE_S * compiled + load.image_s * (size + _rounds(load, size) * size)
        load.report.attempt(part, what, estimate_s, partial(_row, load, base, pipeline, part, what, size))
    if compiled:
        torch._dynamo.reset()


def _row(load: Workload, base: Base, pipeline: Any, part: str, what: str, size: int) -> Row:
    reset_peak(load.device)
    graphs, start = graph_count(), time.perf_counter()
    _make(load, base, pipeline, first=0, size=size, steps=2)
    warm_up_s = time.perf_counter() - start
    note = f"{warm_up_s:.0f} s to compile" if graph_count() > graphs else ""
    latencies_s: list[float] = []
    for i in range(_rounds(load, size)):
        start = time.perf_counter()
        _make(load, base, pipeline, first=(i + 1) * size, size=size, steps=load.steps)
        latencies_s += [time.perf_counter() - start] * size
    seconds = sum(latencies_s) / size
    load.image_s = seconds / len(latencies_s)
    return Row(
        part,
        what,
        at_once=size,
        samples=len(latencies_s),
        img_s=len(latencies_s) / seconds,
        median_ms=median_ms(latencies_s),
        p95_ms=1e3 * percentile_95(latencies_s),
        peak_gb=peak_gb(load.device),
        seconds=seconds,
        note=note,
    )


def _rounds(load: Workload, size: int) -> int:
    """One image after the other takes longest and varies least."""
    return max(1, -(-min(load.images, 8) // size))


def _make(load: Workload, base: Base, pipeline: Any, first: int, size: int, steps: int) -> list[bytes]:
    requests = [load.request(first + i, steps) for i in range(size)]
    images = pipeline(
        prompt=[request.prompt for request in requests],
        num_inference_steps=steps,
        guidance_scale=requests[0].guidance_scale,
        generator=[torch.Generator("cpu").manual_seed(first + i) for i in range(size)],
    ).images
    return [load.png(base, *taken) for taken in zip(requests, range(first, first + size), images, strict=True)]
