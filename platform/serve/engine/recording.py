"""A CUDA graph of one function for inputs of one shape."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Recording:
    """Kernels on fixed addresses. Whatever the function reads besides its inputs, weights and adapter slots among them,
    must stay where it is. Replayed by one thread at a time, on its current stream."""

    def __init__(
        self,
        call: Callable[..., Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor | None],
        pool: Any = None,
        *,
        goes_first: bool = False,
    ) -> None:
        """`call` takes `inputs`, which are kept. `pool`: of `torch.cuda.graph_pool_handle`, for recordings that are
        replayed in turn, never at the same time. `goes_first`: its kernels need not wait behind those of others; the
        stream of a replay has no say in that."""
        self._inputs = inputs
        stream = torch.cuda.Stream(priority=-1 if goes_first else 0)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call(*inputs)  # kernels are chosen and workspaces allocated in the first call
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on calling CUDA meanwhile: only what this one does may spoil the recording.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = tuple(call(*inputs))

    def replay(self, *inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What `call` returns for these, in tensors that are the caller's."""
        for mine, its in zip(self._inputs, inputs, strict=True):
            if mine is not None and its is not None:
                mine.copy_(its)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
