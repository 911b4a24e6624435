"""What the engine's own attention processors share."""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional


def attend(attention: Attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """As AttnProcessor2_0 goes on with its projections. Each [rows, tokens, d]; the result has the query's tokens."""
    rows = query.shape[0]

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.view(rows, -1, attention.heads, x.shape[-1] // attention.heads).transpose(1, 2)

    y = functional.scaled_dot_product_attention(by_head(query), by_head(key), by_head(value))
    y = y.transpose(1, 2).flatten(2)
    for module in attention.to_out:
        y = module(y)
    return y


def is_plain(attention: Attention) -> bool:
    """Whether nothing else happens in it than projecting, `attend`, and projecting again."""
    extras = ("group_norm", "spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim")
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(getattr(attention, extra, None) is None for extra in extras)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1.0
    )
