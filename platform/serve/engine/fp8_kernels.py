# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Products of 8-bit floats with the adapters, or the gated activation, in the same kernel. Imported only on a GPU.

cuBLAS computes the bare product faster, but then what adapters add takes another pass over the result (one H200, 16
rows of 1024 tokens, 1280 -> 1280: 28 microseconds beside 47), and so does the activation (1280 -> 10240: 183 beside
362). Batches without adapters take cuBLAS.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from lorafleet.serve.engine.slot_kernels import RANKS, shrink
from lorafleet.serve.engine.slots import leaves_out

CAPABILITY = (9, 0)  # of the GPU, which must be able to copy tiles by descriptors
# The quickest of 7 and 8 settings on one H200. 16 rows of 1024 tokens, microseconds: 1280 -> 1280 52 and -> 3840 148,
# cuBLAS without adapters 47 and 128; 1280 -> 10240 with its activation 431, with tiles twice as wide 480.
PLAIN = {"TOKENS": 128, "FEATURES": 128, "SUMMED": 128, "GROUP": 16, "num_warps": 4, "num_stages": 3}
GATED = {"TOKENS": 128, "FEATURES": 64, "SUMMED": 128, "GROUP": 8, "num_warps": 4, "num_stages": 3}


@triton.jit
def _add_adapters(
    sums, b_ptr, h_ptr, slots_ptr, ranks_ptr, row, token, feature, is_token, is_feature, max_rank,
    h_token_stride, b_slot_stride, b_line_stride, PER_ROW: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """sums[TOKENS, FEATURES] plus h @ B. `b_ptr` and `h_ptr` are those of the part, `feature` counts within it."""
    for k in range(PER_ROW):
        rank = tl.load(ranks_ptr + row * PER_ROW + k)
        slot = tl.load(slots_ptr + row * PER_ROW + k)
        for first in range(0, rank, RANKS):
            line = first + tl.arange(0, RANKS)
            h = tl.load(
                h_ptr + token[:, None] * h_token_stride + k * max_rank + line[None, :],
                mask=is_token[:, None] & (line < max_rank)[None, :],
                other=0.0,
            )
            b = tl.load(
                b_ptr + slot * b_slot_stride + line[:, None] * b_line_stride + feature[None, :],
                mask=(line < max_rank)[:, None] & is_feature[None, :],
                other=0.0,
            )
            sums = tl.dot(h, b, sums, input_precision="ieee")
    return sums


@triton.jit
def _product(
    x_tiles,
    w_tiles,
    y_tiles,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    y_scale_ptr,
    a_b_ptr,
    h_ptr,
    slots_ptr,
    ranks_ptr,
    rows,
    tokens,
    in_features,
    out_features,
    part_features,
    max_rank,
    b_slot_stride,
    b_line_stride,
    b_part_stride,
    PARTS: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ADAPTERS: tl.constexpr,
    IS_GATED: tl.constexpr,
    FILLS_TILES: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    SUMMED: tl.constexpr,
    GROUP: tl.constexpr,
    RANKS: tl.constexpr,
):
    # Tiles that are worked on at the same time share what they read: GROUP tiles of tokens beside each other.
    row_tiles = tl.cdiv(tokens, TOKENS)
    y_columns = tl.cdiv(out_features, FEATURES)
    program = tl.program_id(0)
    group = program // (GROUP * y_columns)
    group_tiles = min(rows * row_tiles - group * GROUP, GROUP)
    tile = group * GROUP + program % (GROUP * y_columns) % group_tiles
    column_tile = program % (GROUP * y_columns) // group_tiles
    first_feature = column_tile * FEATURES
    first_column = first_feature * 2 if IS_GATED else first_feature
    row = tile // row_tiles
    first_token = tile % row_tiles * TOKENS
    start = row * tokens + first_token

    COLUMNS: tl.constexpr = 2 * FEATURES if IS_GATED else FEATURES
    sums = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for at in range(0, in_features, SUMMED):
        x = x_tiles.load([start, at])  # a row's last tile may hold tokens of the next row, which are not stored
        sums = tl.dot(x, w_tiles.load([first_column, at]).T, sums)
    if IS_GATED:
        sums, gate = sums.reshape(TOKENS, 2, FEATURES).permute(0, 2, 1).split()

    feature = first_feature + tl.arange(0, FEATURES)
    is_feature = feature < out_features
    token = first_token + tl.arange(0, TOKENS)
    is_token = token < tokens
    scale = tl.load(x_scale_ptr) * tl.load(w_scale_ptr)
    sums *= scale
    if IS_GATED:
        gate *= scale
    if HAS_BIAS:
        sums += tl.load(bias_ptr + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
        if IS_GATED:
            gate += tl.load(bias_ptr + out_features + feature, mask=is_feature, other=0.0).to(tl.float32)[None, :]
    if HAS_ADAPTERS:
        h_token_stride = PARTS * PER_ROW * max_rank
        h_ptr += row.to(tl.int64) * tokens * h_token_stride
        part = first_feature // part_features  # features of a part are a multiple of FEATURES, or there is one part
        sums = _add_adapters(
            sums, a_b_ptr + part * b_part_stride, h_ptr + part * PER_ROW * max_rank, slots_ptr, ranks_ptr, row, token,
            feature - part * part_features, is_token, is_feature, max_rank, h_token_stride, b_slot_stride,
            b_line_stride, PER_ROW, RANKS,
        )  # fmt: skip
        if IS_GATED:
            gate = _add_adapters(
                gate, a_b_ptr + out_features, h_ptr, slots_ptr, ranks_ptr, row, token,
                feature, is_token, is_feature, max_rank, h_token_stride, b_slot_stride,
                b_line_stride, PER_ROW, RANKS,
            )  # fmt: skip
    if IS_GATED:
        sums *= 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) / tl.load(y_scale_ptr)
        # nan passes: `min` and `max` would make a number of it
        sums = tl.where(sums > 448.0, 448.0, tl.where(sums < -448.0, -448.0, sums))
    y = sums.to(y_ptr.dtype.element_ty)
    if FILLS_TILES:
        y_tiles.store([start, first_feature], y)
    else:
        y_ptrs = y_ptr + (row.to(tl.int64) * tokens + token[:, None]) * out_features + feature[None, :]
        tl.store(y_ptrs, y, mask=is_token[:, None] & is_feature[None, :])


def arranged(weight: torch.Tensor) -> torch.Tensor:
    """A weight [2 * out, in], of values and then gates, as `fp8_geglu` wants it: tile by tile some values and the gates
    of these, filled up with zeros."""
    tile = GATED["FEATURES"]
    halves = weight.view(2, -1, weight.shape[1])
    tiles = triton.cdiv(halves.shape[1], tile)
    y = weight.new_zeros(tiles, 2, tile, weight.shape[1])
    for half, its in enumerate(halves):
        for at, rows in enumerate(its.split(tile)):
            y[at, half, : len(rows)] = rows
    return y.view(-1, weight.shape[1])


def _launch(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: tuple[torch.Tensor, ...] | None,
    y_scale: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    x = x.contiguous()
    rows, tokens, in_features = x.shape
    blocks = PLAIN if y_scale is None else GATED
    y = torch.empty(rows, tokens, out_features, dtype=dtype, device=x.device)
    flat_x, flat_y = x.view(-1, in_features), y.view(-1, out_features)
    tile, column, summed = blocks["TOKENS"], blocks["FEATURES"], blocks["SUMMED"]
    h, b, slots, ranks = x, x, x, x  # not read
    parts = per_row = max_rank = 1
    strides: tuple[int, ...] = (0, 0, 0)
    if adapters is not None:
        a, b, slots, weights, ranks = adapters
        assert rows <= len(slots)
        h = shrink(x, a, slots, weights, ranks, x_scale)
        (_, max_rank, parts, _), per_row, strides = a.shape, slots.shape[1], b.stride()
    _product[rows * triton.cdiv(tokens, tile) * triton.cdiv(out_features, column),](
        TensorDescriptor.from_tensor(flat_x, [tile, summed]),
        TensorDescriptor.from_tensor(weight, [column if y_scale is None else 2 * column, summed]),
        TensorDescriptor.from_tensor(flat_y, [tile, column]),
        y,
        x_scale,
        weight_scale,
        x_scale if bias is None else bias,
        x_scale if y_scale is None else y_scale,
        b,
        h,
        slots,
        ranks,
        rows,
        tokens,
        in_features,
        out_features,
        out_features // parts,
        max_rank,
        *strides[:3],
        PARTS=parts,
        PER_ROW=per_row,
        HAS_BIAS=bias is not None,
        HAS_ADAPTERS=adapters is not None,
        IS_GATED=y_scale is not None,
        FILLS_TILES=tokens % tile == 0,
        RANKS=RANKS,
        **blocks,
    )
    return y


@torch.library.custom_op("lorafleet::fp8_linear", mutates_args=())
def fp8_linear(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    slots: torch.Tensor,
    weights: torch.Tensor,
    ranks: torch.Tensor,
) -> torch.Tensor:
    """A linear and what adapters add to it: [rows, tokens, out] in the adapters' type.

    x: [rows, tokens, in] and weight: [out, in], float8_e4m3fn, that stand for themselves times their scales, float32
    scalars. The adapters as in `slot_kernels.add_low_rank`; with several parts the features of each are a multiple of
    128.
    """
    if leaves_out():
        y = torch._scaled_mm(
            x.reshape(-1, x.shape[-1]),
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale,
            bias=bias,
            out_dtype=a.dtype,
            use_fast_accum=True,
        )
        return y.view(*x.shape[:-1], -1)
    return _launch(x, x_scale, weight, weight_scale, bias, (a, b, slots, weights, ranks), None, len(weight), a.dtype)


@fp8_linear.register_fake
def _(x, x_scale, weight, weight_scale, bias, a, b, slots, weights, ranks):
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=a.dtype)


@torch.library.custom_op("lorafleet::fp8_geglu", mutates_args=())
def fp8_geglu(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    y_scale: torch.Tensor,
    out_features: int,
    adapters: list[torch.Tensor],
) -> torch.Tensor:
    """One half of a linear times the GELU of its other half (arXiv:2002.05202), divided by `y_scale` and quantised
    again: [rows, tokens, out_features], float8_e4m3fn. `weight` is `arranged`. `adapters`: a, b, slots, weights, ranks,
    or none; the others as in `fp8_linear`."""
    found = tuple(adapters) if adapters and not leaves_out() else None
    return _launch(x, x_scale, weight, weight_scale, bias, found, y_scale, out_features, torch.float8_e4m3fn)


@fp8_geglu.register_fake
def _(x, x_scale, weight, weight_scale, bias, y_scale, out_features, adapters):
    return x.new_empty(*x.shape[:-1], out_features)
