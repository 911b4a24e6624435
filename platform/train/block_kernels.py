# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Triton kernels of what lies between a UNet's products, forward and backward. Imported only where the device is a GPU.

The compiler's own are slow here: one H200, SDXL at batch 8, group norms of images whose channels are last in memory
took 26 of a step's 343 ms, and the gated GELU's backward 23, where reading and writing once takes 4 and 9.

A group norm's weights are frozen, so that of its gradients only dx is wanted. Images are [B, P, C] in memory, P pixels;
sums and moments are float32.
"""

import torch
import triton
import triton.language as tl

from lorafleet.sdxl.moment_kernels import channel_moments

# The quickest settings found on one H200 for SDXL at batch 16.
SUMS = {"PIXELS": 64, "CHANNELS": 64, "num_warps": 4}
EACH = {"PIXELS": 32, "CHANNELS": 128, "num_warps": 4}
GATED = {"ROWS": 2, "COLUMNS": 1024, "num_warps": 4}
PARTS = 64  # of an image, at most: as many programs a block of channels


@triton.jit
def _silu_slope(z):
    share = tl.sigmoid(z)
    return share * (1 + z * (1 - share))


@triton.jit
def _group_moments(
    means_ptr, squares_ptr, moments_ptr, pixels, channels, part_pixels, parts, group_channels, eps,
    PARTS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
):  # fmt: skip
    """A group's mean and 1 / deviation."""
    group, row = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, GROUP_CHANNELS)
    mask = (part < parts)[:, None] & (channel < group_channels)[None, :]
    at = (row * parts + part)[:, None] * channels + group * group_channels + channel[None, :]
    means = tl.load(means_ptr + at, mask=mask, other=0.0)
    squares = tl.load(squares_ptr + at, mask=mask, other=0.0)
    counts = tl.minimum(part_pixels, pixels - part * part_pixels).to(tl.float32)[:, None]
    whole = pixels.to(tl.float32) * group_channels
    mean = tl.sum(tl.sum(means * counts, axis=1), axis=0) / whole
    apart = means - mean
    spread = tl.sum(tl.sum(tl.where(mask, squares + apart * apart * counts, 0.0), axis=1), axis=0)
    at_group = (row * tl.num_programs(0) + group) * 2
    tl.store(moments_ptr + at_group, mean)
    tl.store(moments_ptr + at_group + 1, 1 / tl.sqrt(spread / whole + eps))


@triton.jit
def _load_moments(moments_ptr, row, channel, is_channel, groups, group_channels):
    at = (row * groups + channel // group_channels) * 2
    mean = tl.load(moments_ptr + at, mask=is_channel, other=0.0)[None, :]
    return mean, tl.load(moments_ptr + at + 1, mask=is_channel, other=0.0)[None, :]


@triton.jit
def _apply(
    x_ptr, y_ptr, moments_ptr, weight_ptr, bias_ptr, pixels, channels, groups, group_channels,
    HAS_SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    mask = (pixel < pixels)[:, None] & is_channel[None, :]
    mean, inverse = _load_moments(moments_ptr, row, channel, is_channel, groups, group_channels)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64) * pixels * channels + pixel[:, None] * channels + channel[None, :]
    z = (tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32) - mean) * inverse * weight + bias
    if HAS_SILU:
        z *= tl.sigmoid(z)
    tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(dy, x, mean, inverse, weight, bias, HAS_SILU: tl.constexpr):
    """The gradient at the normalised x, and the normalised x."""
    normed = (x - mean) * inverse
    g = dy * weight
    if HAS_SILU:
        g *= _silu_slope(normed * weight + bias)
    return g, normed


@triton.jit
def _slope_sums(
    dy_ptr, x_ptr, sums_ptr, moments_ptr, weight_ptr, bias_ptr, pixels, channels, groups, group_channels, part_pixels,
    HAS_SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each channel over a part's pixels: the sums of the gradient, and of the gradient times the normalised x."""
    part, row = tl.program_id(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    mean, inverse = _load_moments(moments_ptr, row, channel, is_channel, groups, group_channels)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    first = tl.zeros((CHANNELS,), dtype=tl.float32)
    second = tl.zeros((CHANNELS,), dtype=tl.float32)
    last = tl.minimum((part + 1) * part_pixels, pixels)
    for start in range(part * part_pixels, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        mask = (pixel < last)[:, None] & is_channel[None, :]
        at = row.to(tl.int64) * pixels * channels + pixel[:, None] * channels + channel[None, :]
        dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g, normed = _slopes(dy, x, mean, inverse, weight, bias, HAS_SILU)
        first += tl.sum(g, axis=0)
        second += tl.sum(g * normed, axis=0)
    at_part = ((row * tl.num_programs(0) + part) * channels + channel) * 2
    tl.store(sums_ptr + at_part, first, mask=is_channel)
    tl.store(sums_ptr + at_part + 1, second, mask=is_channel)


@triton.jit
def _group_sums(
    sums_ptr, means_ptr, pixels, channels, parts, group_channels, PARTS: tl.constexpr, GROUP_CHANNELS: tl.constexpr
):
    """A group's means of both sums."""
    group, row = tl.program_id(0), tl.program_id(1)
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, GROUP_CHANNELS)
    mask = (part < parts)[:, None] & (channel < group_channels)[None, :]
    at = ((row * parts + part)[:, None] * channels + group * group_channels + channel[None, :]) * 2
    whole = pixels.to(tl.float32) * group_channels
    at_group = (row * tl.num_programs(0) + group) * 2
    first = tl.sum(tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0), axis=1), axis=0)
    second = tl.sum(tl.sum(tl.load(sums_ptr + at + 1, mask=mask, other=0.0), axis=1), axis=0)
    tl.store(means_ptr + at_group, first / whole)
    tl.store(means_ptr + at_group + 1, second / whole)


@triton.jit
def _apply_backward(
    dy_ptr, x_ptr, dx_ptr, moments_ptr, means_ptr, weight_ptr, bias_ptr, pixels, channels, groups, group_channels,
    HAS_SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    mask = (pixel < pixels)[:, None] & is_channel[None, :]
    mean, inverse = _load_moments(moments_ptr, row, channel, is_channel, groups, group_channels)
    first, second = _load_moments(means_ptr, row, channel, is_channel, groups, group_channels)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64) * pixels * channels + pixel[:, None] * channels + channel[None, :]
    dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    g, normed = _slopes(dy, x, mean, inverse, weight, bias, HAS_SILU)
    tl.store(dx_ptr + at, ((g - first - normed * second) * inverse).to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated(x_ptr, y_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x_left gelu(x_right), by the normal distribution's function."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
    left = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + columns, mask=mask, other=0.0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    at_y = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(y_ptr + at_y, (left * gate * share).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _gated_backward(dy_ptr, x_ptr, dx_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row.to(tl.int64)[:, None] * (2 * columns) + column[None, :]
    dy = tl.load(dy_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0).to(tl.float32)
    left = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + at + columns, mask=mask, other=0.0).to(tl.float32)
    share = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx_ptr + at, (dy * gate * share).to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dx_ptr + at + columns, (dy * left * slope).to(dx_ptr.dtype.element_ty), mask=mask)


def group_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float, has_silu: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y like x, [B, C, H, W] with channels last in memory, and the groups' moments [B, groups, 2]."""
    rows, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    part_pixels, parts = _parts(pixels)
    means, squares = (torch.empty(rows, parts, channels, device=x.device) for _ in range(2))
    blocks = triton.cdiv(channels, SUMS["CHANNELS"])
    channel_moments[(parts, blocks, rows)](x, means, squares, pixels, channels, part_pixels, **SUMS)
    moments = torch.empty(rows, groups, 2, device=x.device)
    size = channels // groups
    _group_moments[(groups, rows)](
        means, squares, moments, pixels, channels, part_pixels, parts, size, eps, **_sizes(parts, size)
    )
    y = torch.empty_like(x)
    _apply[_grid(rows, channels, pixels)](
        x, y, moments, weight, bias, pixels, channels, groups, size, HAS_SILU=has_silu, **EACH
    )
    return y, moments


def group_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, moments: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, has_silu: bool
) -> torch.Tensor:
    """dx like x; dy with channels last in memory too."""
    rows, channels, pixels, groups = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], moments.shape[1]
    part_pixels, parts = _parts(pixels)
    sums = torch.empty(rows, parts, channels, 2, device=x.device)
    size = channels // groups
    _slope_sums[(parts, triton.cdiv(channels, SUMS["CHANNELS"]), rows)](
        dy, x, sums, moments, weight, bias, pixels, channels, groups, size, part_pixels, HAS_SILU=has_silu, **SUMS
    )
    means = torch.empty_like(moments)
    _group_sums[(groups, rows)](sums, means, pixels, channels, parts, size, **_sizes(parts, size))
    dx = torch.empty_like(x)
    _apply_backward[_grid(rows, channels, pixels)](
        dy, x, dx, moments, means, weight, bias, pixels, channels, groups, size, HAS_SILU=has_silu, **EACH
    )
    return dx


def gated(x: torch.Tensor) -> torch.Tensor:
    """[..., N] from [..., 2 N], contiguous."""
    columns = x.shape[-1] // 2
    rows = x.numel() // (2 * columns)
    y = torch.empty(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    _gated[(triton.cdiv(rows, GATED["ROWS"]), triton.cdiv(columns, GATED["COLUMNS"]))](x, y, rows, columns, **GATED)
    return y


def gated_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    columns = dy.shape[-1]
    rows = dy.numel() // columns
    dx = torch.empty_like(x)
    grid = (triton.cdiv(rows, GATED["ROWS"]), triton.cdiv(columns, GATED["COLUMNS"]))
    _gated_backward[grid](dy, x, dx, rows, columns, **GATED)
    return dx


def _parts(pixels: int) -> tuple[int, int]:
    """Pixels of a part, and how many parts there are."""
    step = SUMS["PIXELS"]
    part_pixels = triton.cdiv(triton.cdiv(pixels, PARTS), step) * step
    return part_pixels, triton.cdiv(pixels, part_pixels)


def _sizes(parts: int, group_channels: int) -> dict[str, int]:
    return {"PARTS": triton.next_power_of_2(parts), "GROUP_CHANNELS": triton.next_power_of_2(group_channels)}


def _grid(rows: int, channels: int, pixels: int) -> tuple[int, int, int]:
    return triton.cdiv(pixels, EACH["PIXELS"]), triton.cdiv(channels, EACH["CHANNELS"]), rows
