"""Queries, keys and values of the UNet's self attentions as one product, and one pair of adapter kernels, for each.

On a GPU only: a larger product is quicker there, and what adapters add costs by the kernel. With a CPU's libraries it
would not equal the three products bit for bit.
"""

from collections.abc import Callable, Sequence

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from lorafleet.sdxl.base import Base
from lorafleet.serve.engine.attention import attend, is_plain
from lorafleet.serve.engine.bank import AdapterBank


class SelfAttention:
    """Joins the projections of every plain self attention of the UNet, until `close`."""

    def __init__(self, base: Base, bank: AdapterBank | None = None) -> None:
        """Comes after the bank; weights stay on the device. An attention of which only some projections take adapters,
        or not of one shape, is left as it is."""
        self._attentions: list[Attention] = []
        self._originals: list[Callable[..., torch.Tensor]] = []
        self._weights: list[torch.Tensor] = []
        for path, attention in base.pipeline.unet.named_modules():
            if not (path.endswith(".attn1") and isinstance(attention, Attention) and is_plain(attention)):
                continue
            linear = _join(_projections(attention))
            if bank is not None:
                slotted = bank.join([f"unet.{path}.{name}" for name in ("to_q", "to_k", "to_v")], linear)
                if slotted is None:
                    continue
                linear = slotted
            self._attentions.append(attention)
            self._originals.append(attention.processor)
            self._weights.append(linear.weight)
            attention.set_processor(_Joined(linear, attention.processor))
        self.share_weights()

    def share_weights(self) -> None:
        """Lets each projection's weight be its part of the joined one, after this was made or moved."""
        for attention, weight in zip(self._attentions, self._weights, strict=True):
            projections = _projections(attention)
            for linear, part in zip(projections, weight.data.chunk(len(projections)), strict=True):
                linear.weight.data = part

    def close(self) -> None:
        """Gives the projections weights of their own again, and the processors back. May be called twice."""
        for attention, processor in zip(self._attentions, self._originals, strict=True):
            for linear in _projections(attention):
                linear.weight.data = linear.weight.data.clone()
            attention.set_processor(processor)
        self._attentions, self._originals, self._weights = [], [], []


class _Joined(nn.Module):
    def __init__(self, joined: nn.Linear, original: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.joined = joined
        self._original = original

    def forward(
        self,
        attention: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None:
            return self._original(attention, hidden_states, encoder_hidden_states, attention_mask)
        return attend(attention, *self.joined(hidden_states).chunk(3, dim=-1))


def _projections(attention: Attention) -> list[nn.Linear]:
    return [attention.to_q, attention.to_k, attention.to_v]


@torch.no_grad()
def _join(linears: Sequence[nn.Linear]) -> nn.Linear:
    with torch.inference_mode(False):  # else it could only be used in inference mode
        first = linears[0]
        joined = nn.Linear(first.in_features, sum(linear.out_features for linear in linears), device="meta")
        joined.weight = nn.Parameter(torch.cat([linear.weight.data for linear in linears]), requires_grad=False)
        biases: list[torch.Tensor | None] = [linear.bias for linear in linears]
        found = [bias for bias in biases if bias is not None]
        bias = nn.Parameter(torch.cat(found), requires_grad=False) if len(found) == len(linears) else None
        joined.register_parameter("bias", bias)
        return joined.eval()
