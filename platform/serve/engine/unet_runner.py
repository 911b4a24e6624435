"""How the UNet is run: as it is, compiled, or replayed as CUDA graphs that were recorded for known shapes."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch

from lorafleet.sdxl.base import Base
from lorafleet.serve.config import CompileMode
from lorafleet.serve.engine import resnets
from lorafleet.serve.engine.cross_attention import CrossAttention
from lorafleet.serve.engine.recording import Recording
from lorafleet.serve.engine.regions import compile_regions, compiling, restore
from lorafleet.serve.engine.slots import without_adapters
from lorafleet.serve.engine.unet_inputs import UNetInputs

logger = logging.getLogger(__name__)


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
    ) -> None:
        """`cuda_graphs` needs a CUDA device. With `has_bank` an adapter bank has wrapped the UNet already."""
        self.cross_attention = cross_attention
        self._base = base
        self._unet: Any = base.pipeline.unet
        self._mode = compile_mode
        self.cuda_graphs = cuda_graphs
        self._has_bank = has_bank
        self._pool: Any = None
        self._graphs: dict[tuple[int, int, int], dict[bool, Recording]] = {}  # then by whether any row has adapters
        self._compiled_shapes: set[tuple[int, int, int]] = set()
        self._model = torch.compile(self._unet, fullgraph=True, dynamic=False) if compile_mode == "full" else self._unet

    @property
    def has_shapes(self) -> bool:
        """Whether it runs some shapes better than others: those that were warmed up."""
        return self._mode != "none" or self.cuda_graphs

    @property
    def shapes_are_costly(self) -> bool:
        """Whether each takes a minute to warm up, not two seconds."""
        return self._mode == "full"

    def warm_up(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Compiles and records for these (rows, h, w), h and w in latents."""
        if self._mode != "none" and self._base.device.type == "cuda":
            resnets.put_channels_last(self._unet)
            resnets.quicken(self._unet)
        if self._mode == "regional" and not self._compiled_shapes:
            compile_regions(self._unet)
        with torch.inference_mode(), compiling(len(shapes)):
            # the smallest first: what is right for few rows is right for many, but not the other way round
            for shape in sorted(shapes) if self._mode != "none" else ():
                start = time.perf_counter()
                self._call(self._blank(shape))
                self._compiled_shapes.add(shape)
                logger.debug("compiling for %d rows of %d x %d took %.1f s", *shape, time.perf_counter() - start)
            # the largest first: the others share its memory
            for shape in sorted(shapes, reverse=True) if self.cuda_graphs else ():
                start = time.perf_counter()
                self._record(shape)
                logger.debug("recording %d rows of %d x %d took %.1f s", *shape, time.perf_counter() - start)

    def _record(self, shape: tuple[int, int, int]) -> None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        inputs = self._blank(shape).tensors()

        def call(*tensors: Any) -> tuple[torch.Tensor]:
            return (self._call(UNetInputs(*tensors)),)

        with without_adapters():
            plain = Recording(call, inputs, self._pool)
        self._graphs[shape] = {False: plain}
        self._graphs[shape][True] = Recording(call, inputs, self._pool) if self._has_bank else plain

    def __call__(self, inputs: UNetInputs, *, has_adapters: bool = True) -> torch.Tensor:
        """The model output [rows, 4, h, w]. `has_adapters`: whether any row may have some."""
        if (graphs := self._graphs.get(inputs.shape)) is not None:
            return graphs[has_adapters].replay(*inputs.tensors())[0]
        if self._mode == "none" or inputs.shape in self._compiled_shapes:
            return self._call(inputs)
        with torch.compiler.set_stance("force_eager"):
            return self._call(inputs)

    def close(self) -> None:
        """Drops the graphs, and leaves the UNet as it was, its cross attentions too."""
        self._graphs.clear()
        resnets.restore(self._unet)
        if self._mode == "regional":
            restore(self._unet)
        if self.cross_attention is not None:
            self.cross_attention.close()

    def _blank(self, shape: tuple[int, int, int]) -> UNetInputs:
        return UNetInputs.blank(self._base, *shape, with_text=self.cross_attention is None)

    def _call(self, inputs: UNetInputs) -> torch.Tensor:
        output: torch.Tensor = self._model(
            inputs.sample,
            inputs.timesteps,
            encoder_hidden_states=inputs.hidden,
            timestep_cond=inputs.guidance,
            added_cond_kwargs={"text_embeds": inputs.pooled, "time_ids": inputs.time_ids},
            return_dict=False,
        )[0]
        return output
