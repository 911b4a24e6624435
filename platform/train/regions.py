"""What torch.compile takes of a UNet in training when it does not take the whole: each kind of block for itself.

SDXL's UNet has 70 transformer blocks of two kinds and 17 resnets of a dozen: together they compile in a minute where
the whole takes several. Channels stay last in memory between them, as convolutions and transformer blocks like it.
"""

import os
from typing import Any, Final

import torch
import torch._inductor.config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from lorafleet.sdxl.transformer_ends import end_of, start_of

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
            ends._operate_on_continuous_inputs = torch.compile(start_of(module), fullgraph=True, dynamic=False)
            ends._get_output_for_continuous_inputs = torch.compile(end_of(module), fullgraph=True, dynamic=False)
