"""Workers that are actors of Ray, on whatever nodes there are. The only module of evaluation that knows Ray."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from lorafleet.core.config import home
from lorafleet.core.errors import LorafleetError
from lorafleet.core.local_ray import prepare_local_ray
from lorafleet.core.metrics import EVAL_CLIP_SCORE
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.crew import Answer
from lorafleet.eval.draw import Studio
from lorafleet.eval.plan import Batch

OBJECT_STORE_BYTES: Final = 256 * 1024 * 1024  # pictures pass through it one batch at a time


class Actors:
    """As many as asked for, each with its share of a GPU where the cluster has any; pictures come back to this process,
    so that the nodes need no common disk but for adapter files and folders that a system names by path."""

    def __init__(self, config: EvalConfig, size: int, *, has_gpus: bool) -> None:
        import ray

        self.size = size
        self._config = config
        gpus = config.run.gpus_per_worker if has_gpus else 0
        self._kind: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Studio)
        self._actors: list[Any] = [self._kind.remote(config) for _ in range(size)]
        self._working: dict[Any, int] = {}

    def send(self, worker: int, batch: Batch) -> None:
        self._working[self._actors[worker].draw.remote(batch)] = worker

    def wait(self) -> Answer:
        import ray
        from ray.exceptions import RayError, RayTaskError

        ready = ray.wait(list(self._working), num_returns=1)[0][0]
        worker = self._working.pop(ready)
        try:
            return Answer(worker, tuple(ray.get(ready)))
        except RayTaskError as error:
            if isinstance(error.cause, LorafleetError):
                return Answer(worker, error=error.cause)
            raise
        except RayError:  # the actor or its node is gone
            self._actors[worker] = self._kind.remote(self._config)
            return Answer(worker)

    def close(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)


@contextmanager
def connected(config: EvalConfig, workers: int | None) -> Iterator[tuple[int, bool]]:
    """The Ray that this process is connected to, or the one of `run.ray_address` or RAY_ADDRESS, or one of our own for
    the time. Gives the number of workers that suit it, and whether it has GPUs."""
    address = config.run.ray_address or os.environ.get("RAY_ADDRESS")
    folder = None if address else prepare_local_ray()
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    ours = not ray.is_initialized()
    if ours and address:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    elif ours:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, (workers or 0) + 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
    try:
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        gpus, cpus = resources.get("GPU", 0.0), resources.get("CPU", 1.0)
        has_gpus = gpus > 0 and not config.base.device.startswith("cpu")
        room = gpus / config.run.gpus_per_worker if has_gpus else cpus
        yield workers or max(1, int(room)), has_gpus
    finally:
        if ours:
            ray.shutdown()
        if folder is not None and folder.parent != home():
            shutil.rmtree(folder, ignore_errors=True)


def tell_ray(scores: dict[tuple[str, str], float]) -> None:
    """CLIP scores by (suite, adapter) as a gauge that Ray gathers."""
    from ray.util.metrics import Gauge

    gauge: Any = Gauge(EVAL_CLIP_SCORE.name, description=EVAL_CLIP_SCORE.description, tag_keys=EVAL_CLIP_SCORE.labels)
    for (suite, adapter), score in scores.items():
        gauge.set(score, tags={"suite": suite, "adapter": adapter})
