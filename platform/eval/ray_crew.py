"""Workers that are actors of Ray, on whatever nodes there are. The only module of evaluation that knows Ray."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from lorafleet.core.config import home, ray_address
from lorafleet.core.errors import LorafleetError
from lorafleet.core.local_ray import prepare_local_ray
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.crew import Answer
from lorafleet.eval.draw import Studio
from lorafleet.eval.plan import Batch

OBJECT_STORE_BYTES: Final = 256 * 1024 * 1024  # pictures pass through it one batch at a time


class Actors:
    """As many as `run.workers` says or the cluster has room for, each with its share of a GPU where there are any.

    Pictures come back to this process, so that the nodes need no common disk but for adapter files and folders that a
    system names by path.
    """

    def __init__(self, config: EvalConfig, *, most: int) -> None:
        import ray

        gpus = config.run.gpus_per_worker if has_gpus(config) else 0
        resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
        room = resources.get("GPU", 0.0) / gpus if gpus else resources.get("CPU", 1.0)
        self.size = min(config.run.workers or max(1, int(room)), most)
        self._config = config
        self._kind: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=0)(Studio)
        self._actors: list[Any] = [self._kind.remote(config) for _ in range(self.size)]
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


def has_gpus(config: EvalConfig) -> bool:
    """Whether actors get GPUs on the Ray that is connected."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0.0) > 0 and not config.base.device.startswith("cpu")


@contextmanager
def connected(config: EvalConfig) -> Iterator[None]:
    """The Ray that this process is connected to, or the one of `run.ray_address` or RAY_ADDRESS, or one of our own for
    the time."""
    address = config.run.ray_address or ray_address()
    folder = None if address else prepare_local_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    if address:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, config.run.workers or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level=logging.WARNING,
            log_to_driver=False,
            _temp_dir=str(folder),
        )
    try:
        yield
    finally:
        ray.shutdown()
        if folder is not None and folder.parent != home():
            shutil.rmtree(folder, ignore_errors=True)
