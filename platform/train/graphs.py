"""Forward and backward pass of a portion as a recorded CUDA graph, one for each shape of a batch.

A step of SDXL is some 6,000 kernels, which take Python half a second to launch; a replay takes none. What a graph reads
and writes lies at fixed places: the batch is copied in, and the gradients are valid until the next replay.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lorafleet.train.batch import Batch

WARM_RUNS = 2  # compile, choose kernels and allocate workspaces, none of which may happen while a graph is recorded

Losses = Callable[[Batch], torch.Tensor]


class _Recorded:
    """One shape's graph, with its places."""

    def __init__(self, losses: Losses, parameters: Sequence[torch.nn.Parameter], batch: Batch, pool: Any) -> None:
        self.batch = batch.copied()
        self.weights = torch.zeros(len(batch.latents), device=batch.latents.device)

        def compute() -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            loss = (losses(self.batch) * self.weights).sum()
            return loss.detach(), torch.autograd.grad(loss, parameters)

        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph has memory of its own
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the thread that loads batches goes on pinning memory meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.loss, self.gradients = compute()


class Graphs:
    """Records at a shape's first batch, replays at all others. All graphs share their memory: only one runs at a time,
    and what it put out is read before the next."""

    def __init__(self, losses: Losses, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._losses = losses
        self._parameters = parameters
        self._recorded: dict[tuple[torch.Size, ...], _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch, samples: int, of: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The first `samples` losses' sum over `of`, and its gradients, until the next call. The batch may be on the
        CPU, pinned."""
        shape = batch.shapes
        recorded = self._recorded.get(shape)
        if recorded is None:
            device = self._parameters[0].device
            recorded = self._recorded[shape] = _Recorded(self._losses, self._parameters, batch.to(device), self._pool)
        recorded.batch.copy_(batch)
        recorded.weights[:samples].fill_(1 / of)
        recorded.weights[samples:].zero_()
        recorded.graph.replay()
        return recorded.loss, recorded.gradients
