"""Both ends of an image's way beside the UNet: prompts to embeddings, latents to pixels.

On a GPU both are recorded as CUDA graphs, so that neither launches its thousand kernels one by one while the steps want
the CPU, and the VAE's blocks are compiled.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import run_encoder
from lorafleet.sdxl.vae import decode_on_device, to_host
from lorafleet.serve.config import CompileMode
from lorafleet.serve.engine import resnets
from lorafleet.serve.engine.recording import Recording
from lorafleet.serve.engine.regions import compile_regions, compiling, restore


class Ends:
    """For one thread at a time, in inference mode."""

    def __init__(self, base: Base, compile_mode: CompileMode = "none", *, cuda_graphs: bool = False) -> None:
        """The adapter bank, if there is one, has wrapped the text encoders already."""
        self._base = base
        self._compiles = compile_mode != "none" and base.device.type == "cuda"
        self._cuda_graphs = cuda_graphs
        self._encoders: dict[int, Recording] = {}  # by the encoder's id
        self._decoders: dict[tuple[int, int], Recording] = {}

    def warm_up(self, sizes: Sequence[tuple[int, int]]) -> None:
        """For (height, width) in latents."""
        if self._encoders or not (self._compiles or self._cuda_graphs):
            return
        base, pipeline = self._base, self._base.pipeline
        if self._compiles:
            resnets.put_channels_last(pipeline.vae)
            resnets.quicken(pipeline.vae.decoder)
            compile_regions(pipeline.vae.decoder)
        with torch.inference_mode(), compiling(len(sizes)):
            for height, width in sizes:
                shape = 1, pipeline.vae.config.latent_channels, height, width
                latents = torch.randn(shape, device=base.device).to(base.dtype)
                decode_on_device(base, latents)
                if self._cuda_graphs:
                    self._decoders[height, width] = Recording(
                        lambda z: decode_on_device(base, z), [latents], goes_first=True
                    )
            encoders = (pipeline.text_encoder, pipeline.text_encoder_2) if self._cuda_graphs else ()
            for encoder in encoders:
                token_ids = torch.ones(1, pipeline.tokenizer.model_max_length, dtype=torch.int64, device=base.device)
                self._encoders[id(encoder)] = Recording(
                    lambda ids, encoder=encoder: run_encoder(encoder, ids), [token_ids], goes_first=True
                )

    def encode(self, encoder: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `lorafleet.sdxl.text.run_encoder`."""
        if (recording := self._encoders.get(id(encoder))) is None:
            return run_encoder(encoder, token_ids)
        hidden, pooled = recording.replay(token_ids)
        return hidden, pooled

    def decode(self, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
        """As `lorafleet.sdxl.vae.decode`, for latents [1, 4, h, w]."""
        height, width = latents.shape[2:]
        if (recording := self._decoders.get((height, width))) is not None:
            pixels, are_finite = recording.replay(latents)
            return to_host(pixels, are_finite)
        with torch.compiler.set_stance("force_eager" if self._compiles else "default"):
            return to_host(*decode_on_device(self._base, latents))

    def close(self) -> None:
        """Drops what was recorded and compiled."""
        self._encoders.clear()
        self._decoders.clear()
        resnets.restore(self._base.pipeline.vae.decoder)
        if self._compiles:
            restore(self._base.pipeline.vae.decoder)
