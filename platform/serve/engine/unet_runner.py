"""How the UNet is run: as it is, compiled, or replayed as CUDA graphs that were recorded for known shapes; the whole of
it or, where jobs may reuse steps, its outer part."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lorafleet.sdxl.base import Base
from lorafleet.serve.config import CompileMode
from lorafleet.serve.engine import resnets, step_reuse
from lorafleet.serve.engine.cross_attention import CrossAttention
from lorafleet.serve.engine.recording import Recording
from lorafleet.serve.engine.regions import compile_regions, compiling, restore
from lorafleet.serve.engine.slots import without_adapters
from lorafleet.serve.engine.step_reuse import TwoPartUNet
from lorafleet.serve.engine.unet_inputs import UNetInputs

logger = logging.getLogger(__name__)

Shape = tuple[int, int, int]
"""(rows, h, w), h and w in latents."""


class UNetRunner:
    """Runs a base's UNet; for one thread at a time, in inference mode.

    Only `warm_up` compiles and records. A shape that was not warmed up runs eagerly: neither adapters nor sizes ever
    make a request wait for a compiler.
    """

    def __init__(
        self,
        base: Base,
        compile_mode: CompileMode = "none",
        *,
        cuda_graphs: bool = False,
        cross_attention: CrossAttention | None = None,
        has_bank: bool = False,
        reuses_steps: bool | None = None,
    ) -> None:
        """`cuda_graphs` needs a CUDA device. With `has_bank` an adapter bank has wrapped the UNet already.
        `reuses_steps`: whether the outer part runs by itself too; None: if that takes no warming up. Raises
        ConfigError."""
        self.cross_attention = cross_attention
        self._base = base
        self._unet: Any = base.pipeline.unet
        self._mode = compile_mode
        self.cuda_graphs = cuda_graphs
        self._has_bank = has_bank
        self._pool: Any = None
        self._graphs: dict[Shape, dict[bool, Recording]] = {}  # then by whether any row has adapters
        self._outer_graphs: dict[Shape, dict[bool, Recording]] = {}
        self._deep: dict[Shape, torch.Tensor] = {}  # where graphs leave and find it, one memory for all of a size
        self._compiled_shapes: set[Shape] = set()
        if reuses_steps is None:
            reuses_steps = not self.has_shapes and step_reuse.is_possible(base)
        self._parts = TwoPartUNet(base) if reuses_steps else None
        self._model = self._compiled(self._unet)
        if self._parts is not None:
            self._whole, self._outer = self._compiled(self._parts.whole), self._compiled(self._parts.outer)

    @property
    def reuses_steps(self) -> bool:
        return self._parts is not None

    @property
    def has_shapes(self) -> bool:
        """Whether it runs some shapes better than others: those that were warmed up."""
        return self._mode != "none" or self.cuda_graphs

    @property
    def shapes_are_costly(self) -> bool:
        """Whether each takes a minute to warm up, not two seconds."""
        return self._mode == "full"

    def warm_up(self, shapes: Sequence[Shape]) -> None:
        """Compiles and records for these."""
        if self._mode != "none" and self._base.device.type == "cuda":
            resnets.put_channels_last(self._unet)
            resnets.quicken(self._unet)
        if self._mode == "regional" and not self._compiled_shapes:
            compile_regions(self._unet)
        with torch.inference_mode(), compiling(len(shapes)):
            # the smallest first: what is right for few rows is right for many, but not the other way round
            for shape in sorted(shapes) if self._mode != "none" else ():
                start = time.perf_counter()
                inputs = self._blank(shape)
                if self.reuses_steps:
                    self._outer(inputs, self._whole(inputs)[1])
                else:
                    self._call(inputs)
                self._compiled_shapes.add(shape)
                logger.debug("compiling for %d rows of %d x %d took %.1f s", *shape, time.perf_counter() - start)
            # the largest first: the others share its memory
            for shape in sorted(shapes, reverse=True) if self.cuda_graphs else ():
                start = time.perf_counter()
                self._record(shape)
                logger.debug("recording %d rows of %d x %d took %.1f s", *shape, time.perf_counter() - start)

    def __call__(self, inputs: UNetInputs, *, has_adapters: bool = True) -> torch.Tensor:
        """The model output [rows, 4, h, w]. `has_adapters`: whether any row may have some."""
        if (graphs := self._graphs.get(inputs.shape)) is not None:
            return graphs[has_adapters].replay(*inputs.tensors())[0]
        with self._as_warmed_up(inputs):
            return self._call(inputs)

    def whole(self, inputs: UNetInputs, *, has_adapters: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """The model output, and what `outer` reuses: [rows, C, h, w], to be copied before the next call. If
        `reuses_steps`."""
        if (graphs := self._graphs.get(inputs.shape)) is not None:
            return graphs[has_adapters].replay(*inputs.tensors())[0], self._deep[inputs.shape]
        with self._as_warmed_up(inputs):
            output, deep = self._whole(inputs)
            return output, deep

    def outer(self, inputs: UNetInputs, deep: Sequence[torch.Tensor], *, has_adapters: bool = True) -> torch.Tensor:
        """The model output of the outer part alone. `deep`: of all rows, one after the other, what `whole` gave at
        some step before. If `reuses_steps`."""
        if (graphs := self._outer_graphs.get(inputs.shape)) is not None:
            joined = torch.cat(list(deep), out=self._deep[inputs.shape])
            return graphs[has_adapters].replay(*inputs.tensors(), joined)[0]
        with self._as_warmed_up(inputs):
            output: torch.Tensor = self._outer(inputs, torch.cat(list(deep)))[0]
            return output

    def close(self) -> None:
        """Drops the graphs, and leaves the UNet as it was, its cross attentions too."""
        self._graphs.clear()
        self._outer_graphs.clear()
        self._deep.clear()
        resnets.restore(self._unet)
        if self._mode == "regional":
            restore(self._unet)
        if self.cross_attention is not None:
            self.cross_attention.close()

    def _compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(call, fullgraph=True, dynamic=False) if self._mode == "full" else call

    def _as_warmed_up(self, inputs: UNetInputs) -> AbstractContextManager[Any]:
        is_known = self._mode == "none" or inputs.shape in self._compiled_shapes
        return nullcontext() if is_known else torch.compiler.set_stance("force_eager")

    def _record(self, shape: Shape) -> None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        inputs = self._blank(shape)
        if self._parts is None:
            self._graphs[shape] = self._recordings(lambda *some: (self._call(UNetInputs(*some)),), inputs.tensors())
            return
        deep = self._deep[shape] = self._memory_of_deep(inputs)

        def whole(*some: Any) -> tuple[torch.Tensor]:
            output, its_deep = self._whole(UNetInputs(*some))
            deep.copy_(its_deep)
            return (output,)

        self._graphs[shape] = self._recordings(whole, inputs.tensors())
        self._outer_graphs[shape] = self._recordings(
            lambda *some: self._outer(UNetInputs(*some[:-1]), some[-1]),
            (*inputs.tensors(), deep),
            has_adapters=self._parts.outer_has_adapters,
        )

    def _memory_of_deep(self, inputs: UNetInputs) -> torch.Tensor:
        """One for all row counts of a size, of which the largest comes first: 21 MB a row with SDXL in bfloat16."""
        rows, *size = inputs.shape
        largest = next((deep for (_, *its), deep in self._deep.items() if its == size), None)
        return torch.empty_like(self._whole(inputs)[1]) if largest is None else largest[:rows]

    def _recordings(
        self, call: Callable[..., Any], inputs: Sequence[torch.Tensor | None], *, has_adapters: bool = True
    ) -> dict[bool, Recording]:
        with without_adapters():
            plain = Recording(call, inputs, self._pool)
        needs_both = self._has_bank and has_adapters
        return {False: plain, True: Recording(call, inputs, self._pool) if needs_both else plain}

    def _blank(self, shape: Shape) -> UNetInputs:
        return UNetInputs.blank(self._base, *shape, with_text=self.cross_attention is None)

    def _call(self, inputs: UNetInputs) -> torch.Tensor:
        if self.reuses_steps and self.has_shapes:
            # compiled once, for batches with jobs that reuse steps and for others
            output: torch.Tensor = self._whole(inputs)[0]
        else:
            output = self._model(
                inputs.sample,
                inputs.timesteps,
                encoder_hidden_states=inputs.hidden,
                timestep_cond=inputs.guidance,
                added_cond_kwargs={"text_embeds": inputs.pooled, "time_ids": inputs.time_ids},
                return_dict=False,
            )[0]
        return output
