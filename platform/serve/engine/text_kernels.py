# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Attention to a prompt, whose few keys fit into one block, quantised on the way out. Imported only on a GPU.

The product behind it wants its input in 8 bits. One H200, 16 rows of 1024 tokens, 20 heads: the library's kernel takes
49 microseconds and quantising 19; this one 51 with a block a program, before it read keys and values for several.
"""

import torch
import triton
import triton.language as tl

BLOCKS = {"TOKENS": 64, "num_warps": 4, "num_stages": 2}  # the quickest of 7 settings on one H200
MANY_BLOCKS = 4096  # with so many, each program does some of them in turn, and reads keys and values once
TURNS = 4
MOST_KEYS = 128
DTYPES = (torch.bfloat16, torch.float16)
HEAD_FEATURES = (16, 32, 64, 128)
LOG2_E = 1.4426950408889634


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, y_ptr, y_scale_ptr, tokens, keys, heads, factor, q_row_stride, q_token_stride, k_row_stride,
    k_token_stride, IS_QUANTISED: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    key = tl.arange(0, KEYS)
    feature = head * FEATURES + tl.arange(0, FEATURES)
    is_key = key < keys
    k_at = row.to(tl.int64) * k_row_stride + key[:, None] * k_token_stride + feature[None, :]
    k = tl.load(k_ptr + k_at, mask=is_key[:, None], other=0.0)
    v = tl.load(v_ptr + k_at, mask=is_key[:, None], other=0.0)
    for turn in range(TURNS):
        token = (tl.program_id(0) * TURNS + turn) * TOKENS + tl.arange(0, TOKENS)
        is_token = (token < tokens)[:, None]
        q_at = row.to(tl.int64) * q_row_stride + token[:, None] * q_token_stride + feature[None, :]
        q = tl.load(q_ptr + q_at, mask=is_token, other=0.0)
        scores = tl.where(is_key[None, :], tl.dot(q, k.T) * factor, float("-inf"))
        weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
        y = tl.dot(weights.to(v.dtype), v) / tl.sum(weights, axis=1)[:, None]
        if IS_QUANTISED:
            y = y / tl.load(y_scale_ptr)
            # nan passes: `min` and `max` would make a number of it
            y = tl.where(y > 448.0, 448.0, tl.where(y < -448.0, -448.0, y))
        y_at = (row.to(tl.int64) * tokens + token[:, None]) * (heads * FEATURES) + feature[None, :]
        tl.store(y_ptr + y_at, y.to(y_ptr.dtype.element_ty), mask=is_token)


def is_possible(k: torch.Tensor, heads: int) -> bool:
    return k.dtype in DTYPES and k.shape[1] <= MOST_KEYS and k.shape[-1] // heads in HEAD_FEATURES


@torch.library.custom_op("lorafleet::attend_to_text", mutates_args=())
def attend_to_text(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, y_scale: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q @ k.T / sqrt(d)) @ v for each head of d features: [rows, tokens, heads * d], of q's type, or with
    `y_scale`, a float32 scalar, divided by it in float8_e4m3fn.

    q: [rows, tokens, heads * d]; k and v, of equal strides: [rows, keys, heads * d]; `is_possible` holds.
    """
    rows, tokens, features = q.shape
    keys = k.shape[1]
    assert k.stride() == v.stride()
    assert q.stride(2) == k.stride(2) == 1
    head_features = features // heads
    y = torch.empty(rows, tokens, features, dtype=q.dtype if y_scale is None else torch.float8_e4m3fn, device=q.device)
    blocks = triton.cdiv(tokens, BLOCKS["TOKENS"])
    turns = TURNS if blocks * rows * heads >= MANY_BLOCKS else 1
    _attend[triton.cdiv(blocks, turns), rows * heads](
        q,
        k,
        v,
        y,
        q if y_scale is None else y_scale,
        tokens,
        keys,
        heads,
        LOG2_E / head_features**0.5,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        IS_QUANTISED=y_scale is not None,
        KEYS=max(16, triton.next_power_of_2(keys)),
        FEATURES=head_features,
        TURNS=turns,
        **BLOCKS,
    )
    return y


@attend_to_text.register_fake
def _(q, k, v, heads, y_scale):
    return torch.empty(q.shape, dtype=q.dtype if y_scale is None else torch.float8_e4m3fn, device=q.device)
