"""What torch.compile takes of a UNet in training when it does not take the whole: each kind of block for itself.

SDXL's UNet has 70 transformer blocks of two kinds and 17 resnets of a dozen: together they compile in a minute where
the whole takes several. Channels stay last in memory between them, as convolutions and transformer blocks like it.
"""

import os
from collections.abc import Callable
from typing import Any, Final

import torch
import torch._inductor.config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

# No Upsample2D: the compiler makes its backward pass of atomic additions (one H200: 1.5 ms for one of SDXL's two).
KINDS: Final = (BasicTransformerBlock, ResnetBlock2D, Downsample2D)
MOST_KINDS: Final = 256
"""Of one class of blocks, each compiled for itself: resnets by their channels, all of them by sizes of images, with and
without gradients. PyTorch gives up at 8."""


def compile_regions(unet: nn.Module) -> None:
    """In place; at a block's first call for a new shape it is compiled."""
    torch._dynamo.config.recompile_limit = MOST_KINDS
    torch._dynamo.config.accumulated_recompile_limit = 4 * MOST_KINDS
    # Normalisations over 1280 channels are tried in one pass too. Which way was quicker is not looked up in the
    # compiler's cache, as with torch 2.11 a second start on one cache fails there: kernels from the cache have no lock.
    torch._inductor.config.triton.multi_kernel = 1
    os.environ.setdefault("TORCHINDUCTOR_DISABLE_MULTI_KERNEL_CACHE", "1")
    for module in unet.modules():
        if isinstance(module, KINDS):
            module.compile(fullgraph=True, dynamic=False)
        elif isinstance(module, Transformer2DModel) and module.use_linear_projection:
            ends: Any = module
            ends._operate_on_continuous_inputs = torch.compile(_start_of(module), fullgraph=True, dynamic=False)
            ends._get_output_for_continuous_inputs = torch.compile(_end_of(module), fullgraph=True, dynamic=False)


def _start_of(module: Transformer2DModel) -> Callable[..., Any]:
    def start(hidden_states: torch.Tensor) -> tuple[torch.Tensor, int]:
        normed = module.norm(hidden_states)
        rows, channels, height, width = normed.shape
        return module.proj_in(normed.permute(0, 2, 3, 1).reshape(rows, height * width, channels)), channels

    return start


def _end_of(module: Transformer2DModel) -> Callable[..., torch.Tensor]:
    """As diffusers' own, but channels stay last in memory."""

    def end(hidden_states: torch.Tensor, residual: torch.Tensor, **_: int) -> torch.Tensor:
        rows, channels, height, width = residual.shape
        image = module.proj_out(hidden_states).reshape(rows, height, width, channels).permute(0, 3, 1, 2)
        added: torch.Tensor = image + residual
        return added

    return end
