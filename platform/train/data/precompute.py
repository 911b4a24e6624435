"""The cache made by many machines: Ray Data runs the encoders, this process puts their results in order.

Needs a Ray that is initialised, and pictures and base model where every node reaches them. Ray is imported when it is
used: it reads its settings from the environment at that moment, and whoever starts it sets them before.
"""

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lorafleet.core.errors import LorafleetError
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.data.cache import find_cache, write_cache
from lorafleet.train.data.config import DataConfig
from lorafleet.train.data.encoded_set import EncodedSet
from lorafleet.train.data.plan import BaseFacts, OnProgress, Plan, make_plan
from lorafleet.train.data.source import Source

if TYPE_CHECKING:
    import pyarrow as pa
    import ray
    from ray.data import Dataset

TASKS_A_BATCH: Final = 8


def encode_with_ray(
    source: Source,
    base: BaseConfig,
    config: DataConfig,
    cache_dir: Path,
    *,
    actors: int = 1,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    on_progress: OnProgress | None = None,
) -> EncodedSet:
    """As `encode_set`, to the same bytes, with `actors` processes that each load the base.

    `cache_dir` is written by this process alone; where training runs on other nodes it must be a folder that they
    mount. Raises what `encode_set` does, and what loading the base does.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    ask = ray.remote(num_cpus=cpus_per_actor, num_gpus=gpus_per_actor)(_facts_of)
    facts = ray.get(ask.remote(base))
    if isinstance(facts, LorafleetError):
        raise facts
    plan = make_plan(source, facts, config)
    found = find_cache(plan, cache_dir, config.validation_share)
    if found is not None:
        return found
    context = DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    with DataContext.current(context):
        tasks = ray.data.range(plan.tasks, override_num_blocks=math.ceil(plan.tasks / TASKS_A_BATCH))
        batches = tasks.map_batches(
            _Worker,
            fn_constructor_args=(ray.put(plan), base, config),
            batch_size=TASKS_A_BATCH,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=actors),
            num_cpus=cpus_per_actor,
            num_gpus=gpus_per_actor,
        )
        return write_cache(plan, _results(batches), cache_dir, config.validation_share, on_progress)


def _facts_of(base: BaseConfig) -> BaseFacts | LorafleetError:
    """An error as a value: Ray would wrap it."""
    from lorafleet.sdxl.base import load_base
    from lorafleet.train.data.encoder import Encoder

    try:
        return Encoder(load_base(base)).facts
    except LorafleetError as error:
        return error


def _results(batches: "Dataset") -> Iterator[bytes]:
    """Of task 0, 1, ... Raises what a task raised."""
    for task, row in enumerate(batches.iter_rows()):
        assert row["id"] == task, "the order is preserved"
        if row["error"] is not None:
            raise _unpickled(row["error"])
        yield row["data"]


class _Worker:
    """One process with its encoder."""

    def __init__(self, plan: "ray.ObjectRef[Plan]", base: BaseConfig, config: DataConfig) -> None:
        import ray
        import torch

        from lorafleet.sdxl.base import load_base
        from lorafleet.train.data.encoder import Encoder

        torch.set_num_threads(1)  # as encode_set has it: how a sum is split among threads changes its last bit
        self._plan: Plan = ray.get(plan)
        self._config = config
        self._encoder = Encoder(load_base(base))

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        import pyarrow as pa

        data: list[bytes | None] = []
        errors: list[bytes | None] = []
        for task in batch["id"].to_pylist():
            try:
                data.append(self._encoder.run(self._plan, task, self._config))
                errors.append(None)
            except LorafleetError as error:  # as a value: Ray would wrap it
                data.append(None)
                errors.append(pickle.dumps(error))
        columns: dict[str, Any] = {
            "id": batch["id"],
            "data": pa.array(data, pa.large_binary()),
            "error": pa.array(errors, pa.binary()),
        }
        return pa.table(columns)


def _unpickled(data: bytes) -> LorafleetError:
    """Of our own workers."""
    error = pickle.loads(data)  # noqa: S301
    assert isinstance(error, LorafleetError)
    return error
