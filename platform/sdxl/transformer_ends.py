"""The two ends of a UNet's `Transformer2DModel` with linear projections, to be compiled apart from its blocks."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel


def start_of(module: Transformer2DModel) -> Callable[..., Any]:
    """In place of `_operate_on_continuous_inputs`: an image [rows, C, h, w] to tokens [rows, h w, C'], and C."""

    def start(hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        normed = module.norm(hidden_states)
        rows, channels, height, width = normed.shape
        tokens = normed.permute(0, 2, 3, 1).reshape(rows, height * width, channels)
        return module.proj_in(tokens), channels

    return start


def end_of(module: Transformer2DModel) -> Callable[..., torch.Tensor]:
    """In place of `_get_output_for_continuous_inputs`, but channels stay last in memory: what follows are
    convolutions."""

    def end(hidden_states: torch.Tensor, residual: torch.Tensor, **_: int) -> torch.Tensor:
        rows, channels, height, width = residual.shape
        image = module.proj_out(hidden_states).reshape(rows, height, width, channels).permute(0, 3, 1, 2)
        added: torch.Tensor = image + residual
        return added

    return end
