"""The resnets of a UNet or a VAE, and what normalises in front of its last convolution, on a GPU with channels last.

As diffusers computes them, but each normalisation takes the bias and the time in front of it along, and the activation
behind it. Numbers differ by rounding.
"""

import functools
import logging
from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

logger = logging.getLogger(__name__)


class QuickGroupNorm(nn.GroupNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalised(self, x)


class QuickResnet(ResnetBlock2D):  # type: ignore[misc]
    def forward(self, x: torch.Tensor, temb: torch.Tensor | None, *_: Any) -> torch.Tensor:
        offset = self.conv1.bias[None]
        if temb is not None:
            offset = offset + self.time_emb_proj(functional.silu(temb))
        h = _convolved(self.conv1, _normalised(self.norm1, x, is_activated=True))
        h = _convolved(self.conv2, _normalised(self.norm2, h, offset, is_activated=True))
        kept = x if self.conv_shortcut is None else self.conv_shortcut(x)
        y: torch.Tensor = kept + (h + self.conv2.bias[:, None, None])
        return y


_QUICK: dict[type[nn.Module], type[nn.Module]] = {ResnetBlock2D: QuickResnet, nn.GroupNorm: QuickGroupNorm}


def put_channels_last(model: nn.Module) -> None:
    """Convolutions alone, which are quickest so: `model.to(memory_format=...)` would make copies of whatever else has
    four dimensions, such as the views of adapter slots, which then never see an adapter again."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def quicken(model: nn.Module) -> None:
    """Until `restore`, for a model on a GPU whose convolutions have channels last."""
    if not _has_kernels():
        return
    last = getattr(model, "conv_norm_out", None)
    for module in model.modules():
        if (type(module) is ResnetBlock2D and _is_plain(module)) or (type(module) is nn.GroupNorm and module is last):
            module.__class__ = _QUICK[type(module)]


def restore(model: nn.Module) -> None:
    """Undoes `quicken`."""
    for module in model.modules():
        for plain, quick in _QUICK.items():
            if type(module) is quick:
                module.__class__ = plain


def _is_plain(resnet: ResnetBlock2D) -> bool:
    """Whether nothing else happens in it than what QuickResnet does."""
    return (
        resnet.upsample is None
        and resnet.downsample is None
        and (resnet.time_embedding_norm == "default" or resnet.time_emb_proj is None)
        and resnet.time_embedding_norm not in ("scale_shift", "ada_group", "spatial")
        and not getattr(resnet, "skip_time_act", False)
        and resnet.output_scale_factor == 1.0
        and isinstance(resnet.nonlinearity, nn.SiLU)
        and all(type(norm) is nn.GroupNorm and norm.affine for norm in (resnet.norm1, resnet.norm2))
        and all(conv.bias is not None for conv in (resnet.conv1, resnet.conv2))
    )


def _convolved(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Without its bias."""
    return functional.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def _normalised(
    norm: nn.GroupNorm, x: torch.Tensor, offset: torch.Tensor | None = None, *, is_activated: bool = False
) -> torch.Tensor:
    y: torch.Tensor = torch.ops.lorafleet.group_norm(
        x, offset, norm.weight, norm.bias, norm.num_groups, norm.eps, is_activated
    )
    return y


@functools.cache
def _has_kernels() -> bool:
    try:
        from lorafleet.serve.engine import norm_kernels  # noqa: F401
    except ImportError as error:
        logger.warning("normalisations take slower ways on this GPU: %s", error)
        return False
    return True
