"""An adapter's linears on a GPU: the frozen product by cuBLAS, what the adapter adds to it by kernels of our own.

What PEFT's layers compute, `x W^T + bias + alpha / r * dropout(x) A^T B^T`, as one operation with its own gradient: of
the base only dx is needed, so x is kept once for all linears that share it, and no product with A or B is written but
the [M, R] ones.
"""

import importlib.util
from typing import Any, Final

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora.layer import Linear as PeftLinear

from lorafleet.train.adapter import SLOT
from lorafleet.train.randomness import KeyedDropout

MOST_RANKS: Final = 64
"""Above, a block of A or B takes more memory than a multiprocessor has."""


class FusedLinear(PeftLinear):
    """PEFT's layer with a forward pass of our own."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        if self.disable_adapters:
            y: torch.Tensor = self.base_layer(x)
            return y
        if x.dim() == 2:  # of the time, not of an image
            return together(x[:, None], self)[0][:, 0]
        return together(x, self)[0]


class FusedAttention:
    """A processor as AttnProcessor2_0, for attentions whose q, k and v have adapters of one shape."""

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        assert attention_mask is None
        if attn.to_q.disable_adapters:
            told = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            query, key, value = attn.to_q(hidden_states), attn.to_k(told), attn.to_v(told)
        elif encoder_hidden_states is None:
            query, key, value = together(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            query = attn.to_q(hidden_states)
            key, value = together(encoder_hidden_states, attn.to_k, attn.to_v)

        def by_head(x: torch.Tensor) -> torch.Tensor:
            return x.view(*x.shape[:2], attn.heads, x.shape[2] // attn.heads).transpose(1, 2)

        y = F.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value))
        y = y.transpose(1, 2).flatten(2)
        for module in attn.to_out:
            y = module(y)
        return y


def fuse(unet: torch.nn.Module) -> int:
    """Exchanges what it can of the UNet's layers with an adapter, in place; how many. None without Triton, and none in
    float32, which the matrix units do not take."""
    if importlib.util.find_spec("triton") is None:
        return 0
    count = 0
    for module in unet.modules():
        if type(module) is PeftLinear and _is_plain(module):
            module.__class__ = FusedLinear
            count += 1
    for module in unet.modules():
        if isinstance(module, Attention) and _has_alike_inputs(module):
            module.set_processor(FusedAttention())
    return count


def together(x: torch.Tensor, *layers: Any) -> list[torch.Tensor]:
    """What up to three layers of one input and one shape put out. x: [B, T, K]; each [B, T, N]."""
    first = layers[0]
    a = torch.stack([layer.lora_A[SLOT].weight for layer in layers])
    b = torch.stack([layer.lora_B[SLOT].weight for layer in layers])
    dropout = first.lora_dropout[SLOT]
    p, rows, keys = 0.0, None, None
    if isinstance(dropout, KeyedDropout) and dropout.training:
        p, rows = dropout.p, dropout.keys.rows
        keys = torch.stack([layer.lora_dropout[SLOT].module_key for layer in layers])
    weights = [layer.base_layer.weight for layer in layers]
    y: list[torch.Tensor] = torch.ops.lorafleet.adapted_linears(
        x, weights, first.base_layer.bias, a, b, rows, keys, p, first.scaling[SLOT]
    )
    return y[:-2]


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    return (
        type(base) is torch.nn.Linear
        and base.weight.is_cuda
        and base.weight.dtype in (torch.bfloat16, torch.float16)
        and SLOT not in layer.lora_variant
        and layer.r[SLOT] <= MOST_RANKS
    )


def _has_alike_inputs(attention: Attention) -> bool:
    layers: tuple[Any, ...] = (attention.to_q, attention.to_k, attention.to_v)
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(isinstance(layer, FusedLinear) and layer.base_layer.bias is None for layer in layers)
        and len({layer.base_layer.weight.shape for layer in layers[1:]}) == 1
        and (attention.is_cross_attention or layers[0].base_layer.weight.shape == layers[1].base_layer.weight.shape)
        and not any(getattr(attention, name, None) for name in extras)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


@torch.library.custom_op("lorafleet::adapted_linears", mutates_args=())
def adapted_linears(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None,
    keys: torch.Tensor | None,
    p: float,
    scale: float,
) -> list[torch.Tensor]:
    """y_g = x W_g^T + bias + scale dropout_g(x) A_g^T B_g^T for each g, and last, for the backward pass, h [G, M, R]
    and the masks. x: [B, T, K], W_g: [N, K], a: [G, R, K], b: [G, N, R]; `rows` [B] and `keys` [G] where p > 0."""
    from lorafleet.train import adapter_kernels as kernels

    x = x.contiguous()
    batch, tokens, _ = x.shape
    b = b.contiguous()
    h, kept = kernels.shrink(x, a, rows, keys, p)
    outputs = []
    for g, weight in enumerate(weights):
        y = F.linear(x.view(batch * tokens, -1), weight, bias)
        kernels.expand_(y, h[g], b[g], scale)
        outputs.append(y.view(batch, tokens, -1))
    return [*outputs, h, kept]


@adapted_linears.register_fake
def _(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None,
    keys: torch.Tensor | None,
    p: float,
    scale: float,
) -> list[torch.Tensor]:
    batch, tokens, features = x.shape
    outputs = [x.new_empty(batch, tokens, weight.shape[0]) for weight in weights]
    h = x.new_empty(a.shape[0], batch * tokens, a.shape[1])
    kept = x.new_empty(batch * tokens if p > 0 else 0, features, dtype=torch.uint8)
    return [*outputs, h, kept]


@torch.library.custom_op("lorafleet::adapted_linears_backward", mutates_args=())
def adapted_linears_backward(
    dys: list[torch.Tensor],
    x: torch.Tensor,
    weights: list[torch.Tensor],
    h: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    kept: torch.Tensor,
    p: float,
    scale: float,
    needs_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, da, db); dx is empty where nobody needs it."""
    from lorafleet.train import adapter_kernels as kernels

    x = x.contiguous()
    flat = [dy.reshape(-1, dy.shape[-1]).contiguous() for dy in dys]
    dh, db = kernels.output_side(flat, h, b.contiguous(), scale)
    dx = None
    if needs_dx:
        dx = flat[0] @ weights[0]
        for dy, weight in zip(flat[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        dx = dx.view(x.shape)
    da = kernels.input_side(x, dx, dh, a, kept, p)
    return x.new_empty(0) if dx is None else dx, da, db


@adapted_linears_backward.register_fake
def _(
    dys: list[torch.Tensor],
    x: torch.Tensor,
    weights: list[torch.Tensor],
    h: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    kept: torch.Tensor,
    p: float,
    scale: float,
    needs_dx: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape if needs_dx else 0), torch.empty_like(a), torch.empty_like(b)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    x, weights, _, a, b, _, _, p, scale = inputs
    h, kept = output[-2:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h, a, b, kept, *weights)
    ctx.p, ctx.scale = p, scale


def _backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    x, h, a, b, kept, *weights = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    dys = [
        x.new_zeros(*x.shape[:2], weight.shape[0]) if dy is None else dy
        for dy, weight in zip(grads[:-2], weights, strict=True)
    ]
    dx, da, db = torch.ops.lorafleet.adapted_linears_backward(
        dys, x, weights, h, a, b, kept, ctx.p, ctx.scale, needs_dx
    )
    return (dx if needs_dx else None), [None] * len(weights), None, da, db, None, None, None, None


torch.library.register_autograd("lorafleet::adapted_linears", _backward, setup_context=_keep)
