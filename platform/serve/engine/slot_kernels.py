# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Triton kernels that add each row's adapters to what a linear put out. Imported only where the device is a GPU.

Two launches a linear, `h = (x @ A^T) * weight` and `y += h @ B`, whatever the rows hold: how much there is to do is
read from device memory, so that a recorded graph serves every mix of adapters, and a row without any ends at once.
Both loop over a row's adapters and over their ranks in blocks; sums are float32.
"""

import torch
import triton
import triton.language as tl

# The quickest of 36 settings on one H200, rank 16, in graphs; microseconds of both kernels together beside the linear:
# 2 rows of 1024 tokens 1280 -> 1280: 9.5 of 11; 16 rows: 34 of 76; 16 rows of 4096 tokens 640 -> 640: 75 of 84.
SHRINK_FEW = {"TOKENS": 32, "FEATURES": 256, "num_warps": 2}
SHRINK_MANY = {"TOKENS": 64, "FEATURES": 128, "num_warps": 4}
MANY_TOKENS = 8192  # of all rows together
EXPAND = {"TOKENS": 64, "FEATURES": 128, "num_warps": 4}
RANKS = 16  # the least that the matrix units take


@triton.jit
def _shrink(
    x_ptr,
    a_ptr,
    h_ptr,
    slots_ptr,
    weights_ptr,
    ranks_ptr,
    tokens,
    in_features,
    max_rank,
    x_row_stride,
    x_token_stride,
    a_slot_stride,
    a_line_stride,
    PER_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    x_ptr += row.to(tl.int64) * x_row_stride
    h_ptr += row.to(tl.int64) * tokens * PER_ROW * max_rank
    for k in range(PER_ROW):
        rank = tl.load(ranks_ptr + row * PER_ROW + k)
        slot = tl.load(slots_ptr + row * PER_ROW + k)
        weight = tl.load(weights_ptr + row * PER_ROW + k)
        for first in range(0, rank, RANKS):
            line = first + tl.arange(0, RANKS)
            h = tl.zeros((TOKENS, RANKS), dtype=tl.float32)
            for start in range(0, in_features, FEATURES):
                feature = start + tl.arange(0, FEATURES)
                is_feature = feature < in_features
                x = tl.load(
                    x_ptr + token[:, None] * x_token_stride + feature[None, :],
                    mask=is_token[:, None] & is_feature[None, :],
                    other=0.0,
                )
                a = tl.load(
                    a_ptr + slot * a_slot_stride + line[None, :] * a_line_stride + feature[:, None],
                    mask=(line < max_rank)[None, :] & is_feature[:, None],
                    other=0.0,
                )
                h = tl.dot(x, a, h, input_precision="ieee")
            tl.store(
                h_ptr + token[:, None] * (PER_ROW * max_rank) + k * max_rank + line[None, :],
                (h * weight).to(h_ptr.dtype.element_ty),
                mask=is_token[:, None] & (line < max_rank)[None, :],
            )


@triton.jit
def _expand(
    y_ptr,
    b_ptr,
    h_ptr,
    slots_ptr,
    ranks_ptr,
    tokens,
    out_features,
    max_rank,
    b_slot_stride,
    b_line_stride,
    PER_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    is_token, is_feature = token < tokens, feature < out_features
    h_ptr += row.to(tl.int64) * tokens * PER_ROW * max_rank
    added = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    lines = 0
    for k in range(PER_ROW):
        rank = tl.load(ranks_ptr + row * PER_ROW + k)
        slot = tl.load(slots_ptr + row * PER_ROW + k)
        lines += rank
        for first in range(0, rank, RANKS):
            line = first + tl.arange(0, RANKS)
            h = tl.load(
                h_ptr + token[:, None] * (PER_ROW * max_rank) + k * max_rank + line[None, :],
                mask=is_token[:, None] & (line < max_rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + slot * b_slot_stride + line[:, None] * b_line_stride + feature[None, :],
                mask=(line < max_rank)[:, None] & is_feature[None, :],
                other=0.0,
            )
            added = tl.dot(h, b, added, input_precision="ieee")
    if lines > 0:
        y_ptrs = y_ptr + (row.to(tl.int64) * tokens + token[:, None]) * out_features + feature[None, :]
        mask = is_token[:, None] & is_feature[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + added).to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("lorafleet::add_low_rank", mutates_args=("y",))
def add_low_rank(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """`y[i] += sum over k of weights[i, k] * x[i] @ a[slots[i, k]].T @ b[slots[i, k]]`, in place.

    y: [rows, tokens, out], contiguous. x: [rows, tokens, in]. a: [S, R, in] and b: [S, R, out], of which the first
    `ranks[i, k]` lines are read; those up to the next multiple of 16 must be zeros. slots: int64, weights: float32,
    ranks: int32, each [rows or more, K]; a rank of 0 says that there is nothing to add.
    """
    rows, tokens, out_features = y.shape
    assert y.is_contiguous()
    assert rows <= len(slots)
    per_row, max_rank = slots.shape[1], a.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    h = torch.empty(rows, tokens, per_row * max_rank, dtype=y.dtype, device=y.device)
    shrink = SHRINK_MANY if rows * tokens >= MANY_TOKENS else SHRINK_FEW
    _shrink[triton.cdiv(tokens, shrink["TOKENS"]), rows](
        x,
        a,
        h,
        slots,
        weights,
        ranks,
        tokens,
        x.shape[-1],
        max_rank,
        x.stride(0),
        x.stride(1),
        a.stride(0),
        a.stride(1),
        PER_ROW=per_row,
        RANKS=RANKS,
        **shrink,
    )
    _expand[triton.cdiv(out_features, EXPAND["FEATURES"]), triton.cdiv(tokens, EXPAND["TOKENS"]), rows](
        y,
        b,
        h,
        slots,
        ranks,
        tokens,
        out_features,
        max_rank,
        b.stride(0),
        b.stride(1),
        PER_ROW=per_row,
        RANKS=RANKS,
        **EXPAND,
    )


@add_low_rank.register_fake
def _(
    y: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    return None
