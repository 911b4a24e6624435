"""A UNet's blocks on a GPU: group norms with the SiLU behind them, and the gated GELU, by kernels of our own.

Both are operations with their own gradients, which keep nothing but their input. Frozen weights only.
"""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normed(self, x, has_silu=False)


class FusedResnet(ResnetBlock2D):  # type: ignore[misc]  # diffusers has no types
    """diffusers' own forward pass for blocks that `_is_plain` is true of."""

    def forward(self, x: torch.Tensor, temb: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        h = self.conv1(normed(self.norm1, x, has_silu=True))
        h = h + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        h = self.conv2(self.dropout(normed(self.norm2, h, has_silu=True)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        y: torch.Tensor = (x + h) / self.output_scale_factor
        return y


class FusedGEGLU(GEGLU):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        y: torch.Tensor = torch.ops.lorafleet.gated_gelu(self.proj(x))
        return y


def fuse_blocks(unet: nn.Module) -> None:
    """Exchanges the UNet's blocks in place. Their weights must be on a GPU, in bfloat16 or float16, and frozen."""
    for module in unet.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FusedGroupNorm
        elif type(module) is ResnetBlock2D and _is_plain(module):
            module.__class__ = FusedResnet
        elif type(module) is GEGLU:
            module.__class__ = FusedGEGLU


def normed(norm: nn.GroupNorm, x: torch.Tensor, *, has_silu: bool) -> torch.Tensor:
    """Group norm and, if asked, SiLU of images [B, C, H, W]; the result has its channels last in memory."""
    y: torch.Tensor = torch.ops.lorafleet.group_norm(x, norm.weight, norm.bias, norm.num_groups, norm.eps, has_silu)[0]
    return y


def _is_plain(block: Any) -> bool:
    return (
        block.upsample is None
        and block.downsample is None
        and block.time_embedding_norm == "default"
        and block.time_emb_proj is not None
        and not block.skip_time_act
        and isinstance(block.nonlinearity, nn.SiLU)
    )


@torch.library.custom_op("lorafleet::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, has_silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [B, C, H, W], channels last in memory, and the groups' moments [B, groups, 2] for the backward pass."""
    from lorafleet.train import block_kernels

    return block_kernels.group_norm(
        x.contiguous(memory_format=torch.channels_last), weight, bias, groups, eps, has_silu
    )


@group_norm.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, has_silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.empty_like(x, memory_format=torch.channels_last)
    return y, x.new_empty(x.shape[0], groups, 2, dtype=torch.float32)


@torch.library.custom_op("lorafleet::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_silu: bool
) -> torch.Tensor:
    from lorafleet.train import block_kernels

    last = torch.channels_last
    dy, x = dy.contiguous(memory_format=last), x.contiguous(memory_format=last)
    return block_kernels.group_norm_backward(dy, x, moments, weight, bias, has_silu)


@group_norm_backward.register_fake
def _(
    dy: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_silu: bool
) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, weight, bias, _, _, has_silu = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, output[1], weight, bias)
    ctx.has_silu = has_silu


def _norm_backward(ctx: Any, dy: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    x, moments, weight, bias = ctx.saved_tensors
    dx = torch.ops.lorafleet.group_norm_backward(dy, x, moments, weight, bias, ctx.has_silu)
    return dx, None, None, None, None, None


torch.library.register_autograd("lorafleet::group_norm", _norm_backward, setup_context=_keep_norm)


@torch.library.custom_op("lorafleet::gated_gelu", mutates_args=())
def gated_gelu(x: torch.Tensor) -> torch.Tensor:
    """[..., N] from [..., 2 N]: the left half times the GELU of the right one."""
    from lorafleet.train import block_kernels

    return block_kernels.gated(x.contiguous())


@gated_gelu.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@torch.library.custom_op("lorafleet::gated_gelu_backward", mutates_args=())
def gated_gelu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    from lorafleet.train import block_kernels

    return block_kernels.gated_backward(dy.contiguous(), x.contiguous())


@gated_gelu_backward.register_fake
def _(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _keep_input(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gelu_backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    (x,) = ctx.saved_tensors
    dx: torch.Tensor = torch.ops.lorafleet.gated_gelu_backward(dy, x)
    return dx


torch.library.register_autograd("lorafleet::gated_gelu", _gelu_backward, setup_context=_keep_input)
