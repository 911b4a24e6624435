"""What the engine's own attention processors share."""

import functools
import logging
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional

logger = logging.getLogger(__name__)


def attend(attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As AttnProcessor2_0 goes on with its projections. Each [rows, tokens, d]; the result has the query's tokens."""
    rows = query.shape[0]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(rows, -1, attention.heads, x.shape[-1] // attention.heads).transpose(1, 2)

    y = functional.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value))
    return project(attention, y.transpose(1, 2).flatten(2))


def attend_to_text(attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As `attend`, for keys and values that lie alike in memory and `has_text_kernel` is true of."""
    product = getattr(attention.to_out[0], "product", None)
    y_scale = None if product is None else product.x_scale  # what is quantised at once is written only once
    y: torch.Tensor = torch.ops.lorafleet.attend_to_text(query, key, value, attention.heads, y_scale)
    return project(attention, y)


def has_text_kernel(attention: Attention, key: torch.Tensor) -> bool:
    """Whether there is a kernel of our own for so few keys, [rows, L, d]."""
    kernels = _gpu_kernels() if key.is_cuda else None
    return kernels is not None and kernels.is_possible(key, attention.heads)


def project(attention: Attention, y: torch.Tensor) -> torch.Tensor:
    """What was attended to as the attention puts it out."""
    for module in attention.to_out:
        y = module(y)
    return y


@functools.cache
def _gpu_kernels() -> Any:
    try:
        from lorafleet.serve.engine import text_kernels
    except ImportError as error:
        logger.warning("attention to prompts takes slower ways on this GPU: %s", error)
        return None
    return text_kernels


def is_plain(attention: Attention) -> bool:
    """Whether nothing else happens in it than projecting, `attend`, and projecting again."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(getattr(attention, extra, None) is None for extra in extras)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
    )
