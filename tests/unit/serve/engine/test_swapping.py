"""Many jobs over more adapters than slots, some called off: the right images, and nothing is left behind or grows."""

import gc
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.engine import Cancelled, Engine, Handle, Job, JobAdapter

MIB = 1 << 20
ADAPTERS = 50
IN_FLIGHT = 16


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def recipes(engine: Engine, folder: Path, count: int) -> list[Job]:
    """Jobs with one to three adapters each, all of the adapters' files used as evenly as possible."""
    assert engine.bank is not None
    targets = engine.bank.targets
    files = []
    for i in range(ADAPTERS):
        modules = r"unet\..+attn1.+|text_encoder_2\..+fc1" if i % 3 == 0 else r"unet\..+attn2.+"
        files.append(folder / f"{i}.safetensors")
        write_adapter(random_adapter(targets, i, ranks=(1 + i % 8,), alphas=(3.0,), modules=modules), files[-1])
    draw = random.Random(1)
    jobs = []
    for i in range(count):
        numbers = [(i * ADAPTERS // count + 7 * k) % ADAPTERS for k in range(1 + i % 3)]
        adapters = [
            JobAdapter(str(number), draw.choice([-0.5, 0.6, 1.2]), partial(read_adapter, files[number], targets))
            for number in numbers
        ]
        request = GenerationRequest(prompt=f"star {i % 5}", width=64, height=64, steps=2)
        jobs.append(Job(request, seed=i, adapters=tuple(adapters)))
    return jobs


def swap(
    make_engine: Callable[..., Engine],
    oracle: Callable[[Job], Any],
    pixels: Callable[..., Any],
    folder: Path,
    *,
    jobs: int,
    kinds: int,
) -> None:
    engine = make_engine(
        exact=True,
        exact_jobs=4,
        prompt_cache_entries=8,
        bank={"slots": 4, "max_rank": 8, "host_bytes": 4 * MIB, "max_wait_s": 600},
    )
    bank = engine.bank
    assert bank is not None
    wanted: list[bytes] = []
    todo = recipes(engine, folder, kinds)
    for job in todo:
        alone = engine.submit(job)
        engine.run_until_idle()
        assert abs(pixels(alone.result().image) - oracle(job)).max() < 2
        wanted.append(alone.result().image.tobytes())
    storage, address = bank._storage, bank._storage.data_ptr()
    compiled = dict(torch._dynamo.utils.counters["stats"])
    draw = random.Random(2)
    waiting: list[tuple[int, Handle]] = []
    outcomes = {"image": 0, "cancelled": 0}
    rss_at_half = 0

    def finish(number: int, handle: Handle) -> None:
        try:
            assert handle.result(60).image.tobytes() == wanted[number]
            outcomes["image"] += 1
        except Cancelled:
            outcomes["cancelled"] += 1

    engine.start()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for i in range(jobs):
            if i == jobs // 2:
                gc.collect()
                rss_at_half = rss_bytes()
            number = draw.randrange(kinds)
            waiting.append((number, engine.submit(todo[number])))
            if draw.random() < 0.2:
                draw.choice(waiting)[1].cancel()
            if len(waiting) == IN_FLIGHT:
                finish(*waiting.pop(0))
            assert bank.stats().host_bytes <= 4 * MIB
        for number, handle in waiting:
            finish(number, handle)
    stats = bank.stats()
    assert outcomes["image"] + outcomes["cancelled"] == jobs
    assert outcomes["image"] > jobs / 2
    assert outcomes["cancelled"] > jobs / 50
    assert stats.evictions > jobs / 4
    assert (stats.leased, stats.failures) == (0, 0)
    assert [slot.refs for slot in bank._slots] == [0] * 5
    assert bank._storage is storage
    assert storage.data_ptr() == address
    assert torch._dynamo.utils.counters["stats"] == compiled
    gc.collect()
    assert rss_bytes() - rss_at_half < 64 * MIB


def test_swapping_under_load(
    make_engine: Callable[..., Engine], oracle: Callable[[Job], Any], pixels: Callable[..., Any], tmp_path: Path
) -> None:
    swap(make_engine, oracle, pixels, tmp_path, jobs=60, kinds=6)


@pytest.mark.nightly
def test_swapping_under_long_load(
    make_engine: Callable[..., Engine], oracle: Callable[[Job], Any], pixels: Callable[..., Any], tmp_path: Path
) -> None:
    swap(make_engine, oracle, pixels, tmp_path, jobs=2000, kinds=50)
