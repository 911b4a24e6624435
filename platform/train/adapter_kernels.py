# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Triton kernels of an adapter's products in training, forward and backward. Imported only where the device is a GPU.

An adapter of rank 8 has next to no arithmetic, so its time is the bytes that it reads and writes. Each kernel here
passes over its large operands once. The dropout's masks, `lorafleet.train.randomness.hash_bits`, are drawn in the
forward pass and kept for the backward one, a bit for each linear in a byte for each element: drawing them takes the
GPU's integer units longer than reading x takes its memory. Several linears of one input (q, k, v) are one call, G of
them.

Shapes: x [B, T, K], bfloat16 or float16, M = B T; a [G, R, K] and b [G, N, R], float32, rounded to x's type where they
are used; h [G, M, R], the products with A, in x's type; `rows` [B] and `keys` [G], int32, the dropout's keys; kept
[M, K], uint8, the masks. Products are summed in float32. Nothing is added atomically: the same inputs make the same
bits.
"""

import torch
import triton
import triton.language as tl

# The quickest settings found on one H200 for SDXL's linears.
SHRINK = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 4}
EXPAND = {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 4}
OUTPUT_SIDE = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8}
INPUT_SIDE = {"BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4}
INPUT_PARTS = 64  # into which the sums over M are cut, so that there are programs enough
LEAST_RANKS = 16  # that the matrix units take


@triton.jit
def _mix(h):
    h ^= h >> 16
    h *= 0x21F0AAAD
    h ^= h >> 15
    h *= 0x735A2D97
    h ^= h >> 15
    return h


@triton.jit
def _places(m, k, T, K):
    """Bits of each element's place in its sample; the sample's key is still to be mixed in."""
    place = (m % T)[:, None] * K + k[None, :]
    golden = tl.full((1, 1), 0x9E3779B1, tl.uint32)
    return _mix(place.to(tl.uint32) ^ golden)


@triton.jit
def _is_kept(places, row_keys, key, least):
    bits = _mix(places ^ (row_keys ^ key).to(tl.uint32, bitcast=True)[:, None])
    return (bits & 0xFFFFFF).to(tl.int32) >= least


@triton.jit
def _shrink(
    x_ptr, a_ptr, h_ptr, kept_ptr, rows_ptr, keys_ptr, M, T, K, R, least, scale,
    G: tl.constexpr, DROPS: tl.constexpr, RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h_g = dropout_g(x) A_g^T, and the masks"""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = m < M
    r = tl.arange(0, RANKS)
    is_rank = r < R
    row_keys = m
    if DROPS:
        row_keys = tl.load(rows_ptr + m // T, mask=is_row, other=0)
    h0 = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    h1 = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    h2 = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    at_row = m.to(tl.int64)[:, None] * K
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        is_k = k < K
        mask_x = is_row[:, None] & is_k[None, :]
        x = tl.load(x_ptr + at_row + k[None, :], mask=mask_x, other=0.0)
        a_ptrs = a_ptr + r[None, :] * K + k[:, None]
        mask = is_rank[None, :] & is_k[:, None]
        x0, x1, x2 = x, x, x
        if DROPS:
            places = _places(m, k, T, K)
            scaled = (x.to(tl.float32) * scale).to(x.dtype)
            none = tl.zeros_like(x)
            is_kept = _is_kept(places, row_keys, tl.load(keys_ptr), least)
            x0 = tl.where(is_kept, scaled, none)
            bits = is_kept.to(tl.uint8)
            if G > 1:
                is_kept = _is_kept(places, row_keys, tl.load(keys_ptr + 1), least)
                x1 = tl.where(is_kept, scaled, none)
                bits |= is_kept.to(tl.uint8) << 1
            if G > 2:
                is_kept = _is_kept(places, row_keys, tl.load(keys_ptr + 2), least)
                x2 = tl.where(is_kept, scaled, none)
                bits |= is_kept.to(tl.uint8) << 2
            tl.store(kept_ptr + at_row + k[None, :], bits, mask=mask_x)
        h0 = tl.dot(x0, tl.load(a_ptrs, mask=mask, other=0.0).to(x.dtype), h0)
        if G > 1:
            h1 = tl.dot(x1, tl.load(a_ptrs + R * K, mask=mask, other=0.0).to(x.dtype), h1)
        if G > 2:
            h2 = tl.dot(x2, tl.load(a_ptrs + 2 * R * K, mask=mask, other=0.0).to(x.dtype), h2)
    h_ptrs = h_ptr + m.to(tl.int64)[:, None] * R + r[None, :]
    mask = is_row[:, None] & is_rank[None, :]
    tl.store(h_ptrs, h0.to(h_ptr.dtype.element_ty), mask=mask)
    if G > 1:
        tl.store(h_ptrs + M * R, h1.to(h_ptr.dtype.element_ty), mask=mask)
    if G > 2:
        tl.store(h_ptrs + 2 * M * R, h2.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    y_ptr, h_ptr, b_ptr, M, N, R, scale,
    RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y += scale h B^T, in place"""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, RANKS)
    is_row, is_n, is_rank = m < M, n < N, r < R
    h = tl.load(h_ptr + m[:, None] * R + r[None, :], mask=is_row[:, None] & is_rank[None, :], other=0.0)
    b = tl.load(b_ptr + n[None, :] * R + r[:, None], mask=is_n[None, :] & is_rank[:, None], other=0.0).to(h.dtype)
    y_ptrs = y_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    mask = is_row[:, None] & is_n[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0.0).to(tl.float32) + tl.dot(h, b) * scale
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _output_side(
    dy_ptr, h_ptr, b_ptr, dh_ptr, db_ptr, M, N, R, scale,
    RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh = scale dy B, and this block of rows' part of dB = scale dy^T h"""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, RANKS)
    is_row, is_rank = m < M, r < R
    mask_h = is_row[:, None] & is_rank[None, :]
    h = tl.load(h_ptr + m[:, None] * R + r[None, :], mask=mask_h, other=0.0)
    dh = tl.zeros((BLOCK_M, RANKS), dtype=tl.float32)
    dy_ptr += m.to(tl.int64)[:, None] * N
    db_ptr += tl.program_id(0).to(tl.int64) * N * R
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        is_n = n < N
        dy = tl.load(dy_ptr + n[None, :], mask=is_row[:, None] & is_n[None, :], other=0.0)
        mask_b = is_n[:, None] & is_rank[None, :]
        at_b = n[:, None] * R + r[None, :]
        b = tl.load(b_ptr + at_b, mask=mask_b, other=0.0).to(dy.dtype)
        dh = tl.dot(dy, b, dh)
        tl.store(db_ptr + at_b, tl.dot(tl.trans(dy), h) * scale, mask=mask_b)
    tl.store(dh_ptr + m[:, None] * R + r[None, :], (dh * scale).to(dh_ptr.dtype.element_ty), mask=mask_h)


@triton.jit
def _through(x, dx, dh, a, da, bits, bit, scale, DROPS: tl.constexpr):
    """One linear's share of dx and dA at a tile of x."""
    share = tl.dot(dh, a)
    if DROPS:
        is_kept = ((bits >> bit) & 1) != 0
        dx += tl.where(is_kept, share * scale, 0.0)
        x = tl.where(is_kept, (x.to(tl.float32) * scale).to(x.dtype), tl.zeros_like(x))
    else:
        dx += share
    return dx, tl.dot(tl.trans(dh), x, da)


@triton.jit
def _input_side(
    x_ptr, dx_ptr, dh_ptr, a_ptr, da_ptr, kept_ptr, M, K, R, part_rows, scale,
    G: tl.constexpr, DROPS: tl.constexpr, HAS_DX: tl.constexpr,
    RANKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx += the sum over g of dropout_g(dh_g A_g), in place, and this part's share of dA_g = dh_g^T dropout_g(x)"""
    part = tl.program_id(1)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, RANKS)
    is_k, is_rank = k < K, r < R
    at_a = r[:, None] * K + k[None, :]
    mask_a = is_rank[:, None] & is_k[None, :]
    dtype = x_ptr.dtype.element_ty
    a0 = tl.load(a_ptr + at_a, mask=mask_a, other=0.0).to(dtype)
    da0 = tl.zeros((RANKS, BLOCK_K), dtype=tl.float32)
    if G > 1:
        a1 = tl.load(a_ptr + R * K + at_a, mask=mask_a, other=0.0).to(dtype)
        da1 = tl.zeros((RANKS, BLOCK_K), dtype=tl.float32)
    if G > 2:
        a2 = tl.load(a_ptr + 2 * R * K + at_a, mask=mask_a, other=0.0).to(dtype)
        da2 = tl.zeros((RANKS, BLOCK_K), dtype=tl.float32)
    last = tl.minimum((part + 1) * part_rows, M)
    for start in range(part * part_rows, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        is_row = m < last
        at = m.to(tl.int64)[:, None] * K + k[None, :]
        mask = is_row[:, None] & is_k[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        bits = m
        if DROPS:
            bits = tl.load(kept_ptr + at, mask=mask, other=0)
        if HAS_DX:
            dx = tl.load(dx_ptr + at, mask=mask, other=0.0).to(tl.float32)
        else:
            dx = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
        at_h = m.to(tl.int64)[:, None] * R + r[None, :]
        mask_h = is_row[:, None] & is_rank[None, :]
        dh = tl.load(dh_ptr + at_h, mask=mask_h, other=0.0)
        dx, da0 = _through(x, dx, dh, a0, da0, bits, 0, scale, DROPS)
        if G > 1:
            dh = tl.load(dh_ptr + M * R + at_h, mask=mask_h, other=0.0)
            dx, da1 = _through(x, dx, dh, a1, da1, bits, 1, scale, DROPS)
        if G > 2:
            dh = tl.load(dh_ptr + 2 * M * R + at_h, mask=mask_h, other=0.0)
            dx, da2 = _through(x, dx, dh, a2, da2, bits, 2, scale, DROPS)
        if HAS_DX:
            tl.store(dx_ptr + at, dx.to(dtype), mask=mask)
    da_ptr += part.to(tl.int64) * G * R * K
    tl.store(da_ptr + at_a, da0, mask=mask_a)
    if G > 1:
        tl.store(da_ptr + R * K + at_a, da1, mask=mask_a)
    if G > 2:
        tl.store(da_ptr + 2 * R * K + at_a, da2, mask=mask_a)


def shrink(
    x: torch.Tensor, a: torch.Tensor, rows: torch.Tensor | None, keys: torch.Tensor | None, p: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """h [G, M, R] and the masks [M, K], of which there are none without dropout. x must be contiguous."""
    _, tokens, features = x.shape
    m, (parts, rank, _) = x.numel() // features, a.shape
    h = torch.empty(parts, m, rank, dtype=x.dtype, device=x.device)
    kept = torch.empty(*((m, features) if p > 0 else (0, features)), dtype=torch.uint8, device=x.device)
    _shrink[(triton.cdiv(m, SHRINK["BLOCK_M"]),)](
        x, a.contiguous(), h, kept, rows, keys, m, tokens, features, rank, int(p * (1 << 24)), 1 / (1 - p),
        G=parts, DROPS=p > 0, RANKS=_ranks(rank), **SHRINK,
    )  # fmt: skip
    return h, kept


def expand_(y: torch.Tensor, h: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """y [M, N] += scale h B^T; h [M, R], b [N, R]. All contiguous."""
    m, n = y.shape
    grid = (triton.cdiv(n, EXPAND["BLOCK_N"]), triton.cdiv(m, EXPAND["BLOCK_M"]))
    _expand[grid](y, h, b, m, n, b.shape[1], scale, RANKS=_ranks(b.shape[1]), **EXPAND)


def output_side(
    dys: list[torch.Tensor], h: torch.Tensor, b: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """dh [G, M, R] in h's type and dB [G, N, R], float32. Each dy [M, N]; all contiguous."""
    (m, n), rank = dys[0].shape, b.shape[2]
    blocks = triton.cdiv(m, OUTPUT_SIDE["BLOCK_M"])
    dh = torch.empty_like(h)
    parts = torch.empty(len(dys), blocks, n, rank, dtype=torch.float32, device=h.device)
    for g, dy in enumerate(dys):
        _output_side[(blocks,)](dy, h[g], b[g], dh[g], parts[g], m, n, rank, scale, RANKS=_ranks(rank), **OUTPUT_SIDE)
    return dh, parts.sum(1)


def input_side(
    x: torch.Tensor, dx: torch.Tensor | None, dh: torch.Tensor, a: torch.Tensor, kept: torch.Tensor, p: float
) -> torch.Tensor:
    """Adds the adapters' share to dx [B, T, K], where it is wanted, and returns dA [G, R, K], float32. dh [G, M, R]."""
    features = x.shape[2]
    m, (g, rank, _) = x.numel() // features, a.shape
    block = INPUT_SIDE["BLOCK_M"]
    part_rows = triton.cdiv(triton.cdiv(m, INPUT_PARTS), block) * block
    parts = torch.empty(triton.cdiv(m, part_rows), g, rank, features, dtype=torch.float32, device=x.device)
    _input_side[(triton.cdiv(features, INPUT_SIDE["BLOCK_K"]), parts.shape[0])](
        x, x if dx is None else dx, dh, a.contiguous(), parts, kept, m, features, rank, part_rows, 1 / (1 - p),
        G=g, DROPS=p > 0, HAS_DX=dx is not None, RANKS=_ranks(rank), **INPUT_SIDE,
    )  # fmt: skip
    return parts.sum(0)


def _ranks(rank: int) -> int:
    return max(LEAST_RANKS, int(triton.next_power_of_2(rank)))
