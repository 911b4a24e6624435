"""How the UNet is run: as it is, compiled, or replayed as CUDA graphs that were recorded for known shapes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from lorafleet.sdxl.base import Base
from lorafleet.serve.config import CompileMode
from lorafleet.serve.engine.cross_attention import CrossAttention

logger = logging.getLogger(__name__)

WARM_RUNS = 2  # before recording: kernels are chosen and workspaces allocated in the first ones


@dataclass(frozen=True)
class UNetInputs:
    """One batch, on the base's device in its dtype.

    `sample`: [rows, 4, h, w]. `timesteps`: [rows], float32. `hidden`: [rows, L, D], or [rows, L, 0] where a
    CrossAttention has the text. `pooled`: [rows, P]. `time_ids`: [rows, 6]. `guidance`: [rows, G] for a base that is
    told the scale, else None.
    """

    sample: torch.Tensor
    timesteps: torch.Tensor
    hidden: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    guidance: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, h, w)"""
        rows, _, height, width = self.sample.shape
        return rows, height, width

    @classmethod
    def blank(cls, base: Base, rows: int, height: int, width: int, *, with_text: bool = True) -> Self:
        """Inputs of this shape, h and w in latents, for warming up."""
        config = base.pipeline.unet.config
        length = base.pipeline.tokenizer.model_max_length
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

        def noise(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=base.device).to(base.dtype)

        return cls(
            sample=noise(rows, config.in_channels, height, width),
            timesteps=torch.full((rows,), 500.0, device=base.device),
            hidden=noise(rows, length, config.cross_attention_dim if with_text else 0),
            pooled=noise(rows, pooled),
            time_ids=noise(rows, 6),
            guidance=noise(rows, config.time_cond_proj_dim) if config.time_cond_proj_dim else None,
        )

    def copy_(self, other: "UNetInputs") -> None:
        """Takes over the values of `other`, which has the same shape."""
        for field in fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine is not None:
                mine.copy_(its)


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
    ) -> None:
        """The adapter bank, if there is one, has wrapped the UNet already. `cuda_graphs` needs a CUDA device."""
        self.cross_attention = cross_attention
        self._base = base
        self._unet: Any = base.pipeline.unet
        self._mode = compile_mode
        self._cuda_graphs = cuda_graphs
        self._pool: Any = None
        self._graphs: dict[tuple[int, int, int], _Graph] = {}
        self._compiled_shapes: set[tuple[int, int, int]] = set()
        self._model = torch.compile(self._unet, fullgraph=True, dynamic=False) if compile_mode == "full" else self._unet

    @property
    def has_shapes(self) -> bool:
        """Whether it runs some shapes better than others: those that were warmed up."""
        return self._mode != "none" or self._cuda_graphs

    def warm_up(self, shapes: Sequence[tuple[int, int, int]]) -> None:
        """Compiles and records for these (rows, h, w), h and w in latents; the largest first, whose memory the
        others then share."""
        if self._mode == "regional" and not self._compiled_shapes:
            self._unet.compile_repeated_blocks(fullgraph=True, dynamic=False)
        # Each shape is compiled for itself, which is more often than PyTorch expects of one function.
        limits: dict[str, Any] = {"recompile_limit": 8 * len(shapes) + 64, "accumulated_recompile_limit": 4096}
        with torch.inference_mode(), torch._dynamo.config.patch(limits):
            for shape in sorted(shapes, reverse=True):
                inputs = UNetInputs.blank(self._base, *shape, with_text=self.cross_attention is None)
                if self._mode != "none":
                    self._call(inputs)
                    self._compiled_shapes.add(shape)
                if self._cuda_graphs:
                    self._pool = self._pool or torch.cuda.graph_pool_handle()
                    self._graphs[shape] = _Graph(self._call, inputs, self._pool)

    def __call__(self, inputs: UNetInputs) -> torch.Tensor:
        """The model output [rows, 4, h, w], valid until the next call."""
        if (graph := self._graphs.get(inputs.shape)) is not None:
            return graph.replay(inputs)
        if self._mode == "none" or inputs.shape in self._compiled_shapes:
            return self._call(inputs)
        with torch.compiler.set_stance("force_eager"):
            return self._call(inputs)

    def close(self) -> None:
        """Drops the graphs, and leaves the UNet as it was, its cross attentions too."""
        self._graphs.clear()
        if self._mode == "regional":
            for module in self._unet.modules():
                module._compiled_call_impl = None
        if self.cross_attention is not None:
            self.cross_attention.close()

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


class _Graph:
    """One recording: kernels on fixed addresses. Whatever the model reads besides its inputs, weights and adapter
    slots among them, must stay where it is."""

    def __init__(self, call: Any, inputs: UNetInputs, pool: Any) -> None:
        self._inputs = inputs
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_RUNS):
                call(inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads go on calling CUDA meanwhile: only what this one does may spoil the recording.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._output: torch.Tensor = call(inputs)

    def replay(self, inputs: UNetInputs) -> torch.Tensor:
        self._inputs.copy_(inputs)
        self._graph.replay()
        return self._output.clone()
