"""The workers of a run: one process, those of torchrun, or those of Ray Train, all seen alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This worker's place. Every method must be called by all workers, in the same order."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: torch.Tensor) -> None:
        """The sum over all workers, in place; a float type on `device`."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def agreed(self, value: T) -> T:
        """The leader's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


@contextmanager
def joined(device: torch.device, timeout_s: float) -> Iterator[Group]:
    """The group that Ray Train has set up, else torchrun's, else this process alone.

    `device`: this worker's own, see `own_device`.
    """
    starts = not dist.is_initialized() and dist.is_torchelastic_launched()
    if starts:
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        if dist.is_initialized():
            yield Group(dist.get_rank(), dist.get_world_size(), device)
        else:
            yield Group(0, 1, device)
    finally:
        if starts:
            dist.destroy_process_group()


def own_device(name: str) -> str:
    """The setting `base.device` of this worker: under torchrun each of a machine's takes a GPU of its own. Ray shows
    each worker one GPU only."""
    if name in ("auto", "cuda") and dist.is_torchelastic_launched() and torch.cuda.is_available():
        return f"cuda:{dist.get_node_local_rank()}"
    return name
