"""What the UNet is told about a batch."""

from dataclasses import dataclass, fields
from typing import Self

import torch

from lorafleet.sdxl.base import Base


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

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """In the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))
