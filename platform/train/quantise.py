"""A base that takes half the memory: its frozen linears' weights as 8-bit integers, a scale for each output.

Only for training with gradient checkpointing: a linear's backward pass needs its weight again, so that without it all
widened weights would be kept until then.
"""

from typing import Any

import torch
import torch.nn.functional as F

LEVELS = 127


class Int8Linear(torch.nn.Module):
    """y = x W^T + b with W = scale * integers, widened to the input's type for each use. Absolute maximum of each
    output's row, no calibration: "vector-wise" of LLM.int8 (https://arxiv.org/abs/2208.07339, section 2.1) without its
    outliers, which image models do without."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1, keepdim=True) / LEVELS).clamp(min=1e-12)
        self.integers: torch.Tensor
        self.scale: torch.Tensor
        self.register_buffer("integers", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @property
    def weight(self) -> torch.Tensor:
        return self.integers.to(self.scale.dtype) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
def quantise_linears(model: torch.nn.Module) -> int:
    """Exchanges every linear of the model, those inside of PEFT's layers too, in place; how many there were.

    PEFT's own small linears are no `torch.nn.Linear` here (see `lorafleet.train.adapter.CastLinear`)."""
    found: list[tuple[Any, str, torch.nn.Linear]] = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child))
    return len(found)
