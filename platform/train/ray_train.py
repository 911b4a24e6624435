"""The loop inside Ray Train: as many workers as asked for, begun again from the last checkpoint when one is lost.

Workers share the run's folder and find its checkpoints themselves; nothing is reported to Ray, whose `report` waits for
every worker. Losing a worker or its node tears all of them down and starts as many as there is room for, at least
`run.min_workers`; since a sample's random numbers do not depend on the number of workers, the run goes on as it was.
"""

import logging
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lorafleet.core.config import home
from lorafleet.core.errors import LorafleetError, TrainingFailed
from lorafleet.core.local_ray import prepare_local_ray
from lorafleet.train.run import Task, work
from lorafleet.train.watch import PROGRESS_FILE, following

OBJECT_STORE_BYTES = 256 * 1024 * 1024  # next to nothing goes through it


def train_with_ray(task: Task) -> None:
    """Raises TrainingFailed when workers were lost more often than `run.max_failures`, and what made them fail."""
    with _ray(task):
        _fit(task)


def _fit(task: Task) -> None:
    import ray
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    run = task.config.run
    gpus: float = ray.cluster_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    use_gpu = task.config.base.device.startswith("cuda") or (task.config.base.device == "auto" and gpus > 0)
    trainer = TorchTrainer(
        _work,
        train_loop_config={"task": task},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=math.ceil(run.timeout_s)),
        scaling_config=ScalingConfig(
            num_workers=run.workers if run.min_workers is None else (run.min_workers, run.workers),
            use_gpu=use_gpu,
            resources_per_worker={"CPU": 1, "GPU": 1} if use_gpu else {"CPU": 1},
        ),
        run_config=RunConfig(
            name=task.name,
            storage_path=str(task.folder / "ray"),
            failure_config=FailureConfig(max_failures=run.max_failures, max_preemption_failures=-1),
        ),
    )
    try:
        with following(task.folder / PROGRESS_FILE, task.config.loop.steps):
            trainer.fit()
    except TrainingFailedError as error:
        raise _cause(error, run.max_failures) from error


def _work(config: dict[str, Any]) -> None:
    """In a worker's process."""
    work(config["task"], ray_hosted=True)


def _cause(error: Any, max_failures: int) -> LorafleetError:
    """What a worker said itself, if it was one of our sentences."""
    for failure in getattr(error, "worker_failures", {}).values():
        while failure is not None:
            if isinstance(failure, LorafleetError):
                return failure
            failure = getattr(failure, "cause", None) or failure.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return TrainingFailed(
        f"workers were lost, {max_failures} times the run began again (run.max_failures), Ray's logs say more: "
        f"{lines[-1]}"
    )


@contextmanager
def _ray(task: Task) -> Iterator[None]:
    """The Ray that this process is connected to, or that `run.ray_address` names, or one of our own for the time."""
    address = task.config.run.ray_address
    folder = None if address else prepare_local_ray()
    import ray

    if ray.is_initialized():
        yield
        return
    logging.getLogger("ray").setLevel(logging.WARNING)
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, task.config.run.workers + 1),
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
