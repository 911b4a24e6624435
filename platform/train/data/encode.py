"""Runs the base's VAE and text encoders over a source, once, into a cache."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch

from lorafleet.sdxl.base import Base
from lorafleet.train.data.cache import find_cache, write_cache
from lorafleet.train.data.config import DataConfig
from lorafleet.train.data.encoded_set import EncodedSet
from lorafleet.train.data.encoder import Encoder
from lorafleet.train.data.plan import OnProgress, make_plan
from lorafleet.train.data.source import Source


def encode_set(
    source: Source,
    base: Base,
    config: DataConfig,
    cache_dir: Path,
    *,
    workers: int = 1,
    on_progress: OnProgress | None = None,
) -> EncodedSet:
    """The cache of `source` under `cache_dir`/<fingerprint>: found, or made in this process by `workers` threads.

    On a CPU each thread computes alone, so `workers` is the number of cores to use; on a GPU they prepare pictures
    while it works. Raises DataNotFound, DataUnreadable (naming the picture), ConfigError or StorageUnavailable (a full
    disk); then nothing half-written is left.
    """
    encoder = Encoder(base)
    plan = make_plan(source, encoder.facts, config)
    found = find_cache(plan, cache_dir, config.validation_share)
    if found is not None:
        return found
    encoded = _in_order(lambda task: encoder.run(plan, task, config), plan.tasks, workers)
    with closing(encoded):
        return write_cache(plan, encoded, cache_dir, config.validation_share, on_progress)


def _in_order(run: Callable[[int], bytes], tasks: int, workers: int) -> Generator[bytes]:
    """The results of task 0, 1, ..., a few of them computed ahead."""
    threads_before = torch.get_num_threads()
    waiting: deque[Future[bytes]] = deque()
    # One thread inside each operator: how a sum is split among threads changes its last bit.
    with ThreadPoolExecutor(workers, "encode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for task in range(tasks):
                waiting.append(pool.submit(run, task))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads_before)
