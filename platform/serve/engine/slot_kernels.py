# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Triton kernels that add each row's adapters to what a linear put out. Imported only where the device is a GPU.

Two launches a linear, `h = (x @ A^T) * weight` and `y += h @ B`, whatever the rows hold: how much there is to do is
read from device memory, so that a recorded graph serves every mix of adapters, and a row without any ends at once.
Both loop over a row's adapters and over their ranks in blocks; sums are float32. Where a linear stands for several of
one input, P parts, the first kernel reads the input once for all of them.
"""

import torch
import triton
import triton.language as tl

from lorafleet.serve.engine.slots import leaves_out

# The quickest of 36 settings on one H200, rank 16, in graphs; microseconds of both kernels together beside the linear:
# 2 rows of 1024 tokens 1280 -> 1280: 9.5 of 11; 16 rows: 34 of 76; 16 rows of 4096 tokens 640 -> 640: 75 of 84.
SHRINK_FEW = {"TOKENS": 32, "FEATURES": 256, "num_warps": 2}
SHRINK_MANY = {"TOKENS": 64, "FEATURES": 128, "num_warps": 4}
# For 8-bit inputs, of 8 settings: 1280 features, 2 rows 4.6, and 5.7 for three parts; 16 rows 8.5 and 13.3.
SHRINK8_FEW = {"TOKENS": 16, "FEATURES": 256, "num_warps": 4, "num_stages": 5}
SHRINK8_MANY = {"TOKENS": 64, "FEATURES": 128, "num_warps": 4, "num_stages": 3}
MANY_TOKENS = 8192  # of all rows together
EXPAND = {"TOKENS": 64, "FEATURES": 128, "num_warps": 4}
RANKS = 16  # the least that the matrix units take


@triton.jit
def _shrink(
    x_ptr,
    x_scale_ptr,
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
    a_part_stride,
    PARTS: tl.constexpr,
    PER_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    row = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    is_token = token < tokens
    x_ptr += row.to(tl.int64) * x_row_stride
    h_ptr += row.to(tl.int64) * tokens * PARTS * PER_ROW * max_rank
    column = tl.arange(0, COLUMNS)
    part = column // RANKS
    for k in range(PER_ROW):
        rank = tl.load(ranks_ptr + row * PER_ROW + k)
        slot = tl.load(slots_ptr + row * PER_ROW + k)
        weight = tl.load(weights_ptr + row * PER_ROW + k)
        if IS_SCALED:
            weight *= tl.load(x_scale_ptr)
        for first in range(0, rank, RANKS):
            line = first + column % RANKS
            is_line = (line < max_rank) & (part < PARTS)
            h = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
            for start in range(0, in_features, FEATURES):
                feature = start + tl.arange(0, FEATURES)
                is_feature = feature < in_features
                a = tl.load(
                    a_ptr
                    + slot * a_slot_stride
                    + line[None, :] * a_line_stride
                    + part[None, :] * a_part_stride
                    + feature[:, None],
                    mask=is_line[None, :] & is_feature[:, None],
                    other=0.0,
                )
                x = tl.load(
                    x_ptr + token[:, None] * x_token_stride + feature[None, :],
                    mask=is_token[:, None] & is_feature[None, :],
                    other=0.0,
                )
                if IS_SCALED:  # 8 bits become 16 in one instruction if these are float16, not bfloat16
                    h = tl.dot(x.to(tl.float16), a.to(tl.float16), h)
                else:
                    h = tl.dot(x, a, h, input_precision="ieee")
            tl.store(
                h_ptr
                + token[:, None] * (PARTS * PER_ROW * max_rank)
                + part[None, :] * (PER_ROW * max_rank)
                + k * max_rank
                + line[None, :],
                (h * weight).to(h_ptr.dtype.element_ty),
                mask=is_token[:, None] & is_line[None, :],
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
    b_part_stride,
    PARTS: tl.constexpr,
    PER_ROW: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(2)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    tiles = tl.cdiv(out_features, FEATURES)
    part = tl.program_id(0) // tiles
    feature = tl.program_id(0) % tiles * FEATURES + tl.arange(0, FEATURES)
    is_token, is_feature = token < tokens, feature < out_features
    h_ptr += row.to(tl.int64) * tokens * PARTS * PER_ROW * max_rank + part * PER_ROW * max_rank
    added = tl.zeros((TOKENS, FEATURES), dtype=tl.float32)
    lines = 0
    for k in range(PER_ROW):
        rank = tl.load(ranks_ptr + row * PER_ROW + k)
        slot = tl.load(slots_ptr + row * PER_ROW + k)
        lines += rank
        for first in range(0, rank, RANKS):
            line = first + tl.arange(0, RANKS)
            h = tl.load(
                h_ptr + token[:, None] * (PARTS * PER_ROW * max_rank) + k * max_rank + line[None, :],
                mask=is_token[:, None] & (line < max_rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + slot * b_slot_stride + line[:, None] * b_line_stride + part * b_part_stride + feature[None, :],
                mask=(line < max_rank)[:, None] & is_feature[None, :],
                other=0.0,
            )
            added = tl.dot(h, b, added, input_precision="ieee")
    if lines > 0:
        y_token = (row.to(tl.int64) * tokens + token[:, None]) * (PARTS * out_features)
        y_ptrs = y_ptr + y_token + part * out_features + feature[None, :]
        mask = is_token[:, None] & is_feature[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptrs, (y + added).to(y_ptr.dtype.element_ty), mask=mask)


def shrink(
    x: torch.Tensor,
    a: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    ranks: torch.Tensor,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """`weights[i, k] * x[i] @ a[slots[i, k]].T` as [rows, tokens, P, K, R], of which the first `ranks[i, k]` lines, up
    to the next multiple of 16, are written. x: [rows, tokens, in], times `x_scale`, a float32 scalar, if it is
    given. The others as in `add_low_rank`."""
    rows, tokens, in_features = x.shape
    _, max_rank, parts, _ = a.shape
    per_row = slots.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    h = torch.empty(rows, tokens, parts, per_row, max_rank, dtype=a.dtype, device=x.device)
    few, many = (SHRINK_FEW, SHRINK_MANY) if x_scale is None else (SHRINK8_FEW, SHRINK8_MANY)
    blocks = many if rows * tokens >= MANY_TOKENS else few
    _shrink[triton.cdiv(tokens, blocks["TOKENS"]), rows](
        x,
        x if x_scale is None else x_scale,
        a,
        h,
        slots,
        weights,
        ranks,
        tokens,
        in_features,
        max_rank,
        x.stride(0),
        x.stride(1),
        a.stride(0),
        a.stride(1),
        a.stride(2),
        PARTS=parts,
        PER_ROW=per_row,
        RANKS=RANKS,
        COLUMNS=triton.next_power_of_2(parts * RANKS),
        IS_SCALED=x_scale is not None,
        **blocks,
    )
    return h


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
    """`y[i] += sum over k of weights[i, k] * x[i] @ a[slots[i, k]].T @ b[slots[i, k]]`, in place, part by part.

    y: [rows, tokens, P * out], contiguous. x: [rows, tokens, in]. a: [S, R, P, in] and b: [S, R, P, out], of which the
    first `ranks[i, k]` lines are read; those up to the next multiple of 16 must be zeros. slots: int64, weights:
    float32, ranks: int32, each [rows or more, K]; a rank of 0 says that there is nothing to add.
    """
    if leaves_out():
        return
    rows, tokens, _ = y.shape
    assert y.is_contiguous()
    assert rows <= len(slots)
    h = shrink(x, a, slots, weights, ranks)
    _, max_rank, parts, out_features = b.shape
    _expand[parts * triton.cdiv(out_features, EXPAND["FEATURES"]), triton.cdiv(tokens, EXPAND["TOKENS"]), rows](
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
        b.stride(2),
        PARTS=parts,
        PER_ROW=slots.shape[1],
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
