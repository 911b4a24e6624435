"""What torch.compile takes of a UNet or a VAE when it does not take the whole: each kind of block for itself.

A UNet has dozens of alike transformer blocks and a few kinds of resnets, so that compiling them takes seconds where the
whole takes a minute; one H200, SDXL with 8-bit products: a step of 16 rows takes 185 ms this way and 189 as a whole.
A block is compiled once for all row counts.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch._inductor.config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from lorafleet.sdxl.transformer_ends import end_of, start_of

KINDS: Final = (BasicTransformerBlock, ResnetBlock2D, Downsample2D, Upsample2D)
_ENDS: Final = ("_operate_on_continuous_inputs", "_get_output_for_continuous_inputs")


@contextmanager
def compiling(shapes: int) -> Iterator[None]:
    """For the first calls, which compile. Each of so many shapes is compiled for itself, which is more often than
    PyTorch expects; normalisations over 1280 channels are tried in one pass too (one H200, SDXL, 16 rows of 8-bit
    products: 5 ms less a step)."""
    limits: dict[str, Any] = {"recompile_limit": 8 * shapes + 64, "accumulated_recompile_limit": 4096}
    # Or else the compiler looks up in its cache which way was quickest, and with torch 2.11 a second start on one cache
    # fails there: kernels that come from the cache have no lock (`MultiKernelCall.cache_file_path`: "'NoneType' object
    # does not support the context manager protocol").
    os.environ.setdefault("TORCHINDUCTOR_DISABLE_MULTI_KERNEL_CACHE", "1")
    with torch._dynamo.config.patch(limits), torch._inductor.config.patch({"triton.multi_kernel": 1}):
        yield


def compile_regions(model: nn.Module) -> None:
    """Until `restore`, what calls these blocks calls what is compiled of them, at the first call for a new shape."""
    for module in model.modules():
        if isinstance(module, KINDS):
            module.compile(fullgraph=True, dynamic=False)
            module._compiled_call_impl = _for_all_rows(module._compiled_call_impl)
        elif isinstance(module, Transformer2DModel) and module.use_linear_projection:
            start, end = (torch.compile(f, fullgraph=True, dynamic=False) for f in (start_of(module), end_of(module)))
            module._operate_on_continuous_inputs = _for_all_rows(start)
            module._get_output_for_continuous_inputs = _for_all_rows(end)


def restore(model: nn.Module) -> None:
    """Undoes `compile_regions`."""
    for module in model.modules():
        if isinstance(module, KINDS):
            module._compiled_call_impl = None
        for name in _ENDS:
            module.__dict__.pop(name, None)


def _for_all_rows(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tells the compiler that the first dimension of what it is given varies."""

    def call(*arguments: Any, **options: Any) -> Any:
        for value in (*arguments, *options.values()):
            if isinstance(value, torch.Tensor) and value.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(value, 0)
        return compiled(*arguments, **options)

    return call
