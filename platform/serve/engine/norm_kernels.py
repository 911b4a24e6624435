# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""Group normalisation of images whose channels are last in memory, and the SiLU behind it. Imported only on a GPU."""

import torch
import triton
import triton.language as tl

from lorafleet.sdxl.moment_kernels import channel_moments

# The quickest of 6 and 5 settings on one H200; with both, 128 channels of 1024 x 1024 pixels take 0.28 ms.
MOMENTS = {"PIXELS": 128, "CHANNELS": 64, "num_warps": 4}
APPLY = {"PIXELS": 16, "CHANNELS": 128, "num_warps": 4}
PARTS = 2048  # programs that the moments of an image are computed by, about, so that they fill the GPU
MOST_PARTS = 128  # for one group of channels: they are added up in one block


@triton.jit
def _combine(
    means_ptr, squares_ptr, offset_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, pixels, channels, part_pixels,
    parts, group_channels, eps, offset_row_stride,
    HAS_OFFSET: tl.constexpr, MOST_PARTS: tl.constexpr, GROUP_CHANNELS: tl.constexpr,
):  # fmt: skip
    """What each channel of a group is multiplied by, and what is added then."""
    group, row = tl.program_id(0), tl.program_id(1)
    channel = group * group_channels + tl.arange(0, GROUP_CHANNELS)
    is_channel = tl.arange(0, GROUP_CHANNELS) < group_channels
    part = tl.arange(0, MOST_PARTS)
    is_here = (part < parts)[:, None] & is_channel[None, :]
    at = (row * parts + part)[:, None] * channels + channel[None, :]
    means = tl.load(means_ptr + at, mask=is_here, other=0.0)
    squares = tl.load(squares_ptr + at, mask=is_here, other=0.0)
    offset = tl.zeros((GROUP_CHANNELS,), dtype=tl.float32)
    if HAS_OFFSET:
        offset += tl.load(offset_ptr + row * offset_row_stride + channel, mask=is_channel, other=0.0).to(tl.float32)
        means += offset[None, :]
    counts = tl.minimum(pixels - part * part_pixels, part_pixels).to(tl.float32)[:, None]
    count = pixels.to(tl.float32) * group_channels
    mean = tl.sum(tl.sum(tl.where(is_here, means * counts, 0.0), axis=1), axis=0) / count
    apart = means - mean
    total = tl.sum(tl.sum(tl.where(is_here, squares + counts * apart * apart, 0.0), axis=1), axis=0)
    inverse = 1.0 / tl.sqrt(total / count + eps)
    weight = tl.load(weight_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=is_channel, other=0.0).to(tl.float32)
    scale = weight * inverse
    tl.store(scale_ptr + row * channels + channel, scale, mask=is_channel)
    tl.store(shift_ptr + row * channels + channel, bias + (offset - mean) * scale, mask=is_channel)


@triton.jit
def _apply(
    x_ptr, y_ptr, scale_ptr, shift_ptr, pixels, channels,
    IS_ACTIVATED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    is_channel = channel < channels
    is_here = (pixel < pixels)[:, None] & is_channel[None, :]
    at = (row.to(tl.int64) * pixels + pixel)[:, None] * channels + channel[None, :]
    scale = tl.load(scale_ptr + row * channels + channel, mask=is_channel, other=0.0)
    shift = tl.load(shift_ptr + row * channels + channel, mask=is_channel, other=0.0)
    y = tl.load(x_ptr + at, mask=is_here, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if IS_ACTIVATED:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=is_here)


@torch.library.custom_op("lorafleet::group_norm", mutates_args=())
def group_norm(
    x: torch.Tensor,
    offset: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    eps: float,
    is_activated: bool,
) -> torch.Tensor:
    """The normalised `x + offset`, times `weight` and plus `bias`, through a SiLU if `is_activated`.

    x: [rows, C, h, w], and so is the result, channels last in memory. offset: [rows or 1, C]. weight and bias: [C].
    Moments are float32.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    rows, channels, height, width = x.shape
    pixels = height * width
    columns = triton.cdiv(channels, MOMENTS["CHANNELS"])
    tiles = triton.cdiv(pixels, MOMENTS["PIXELS"])
    parts = max(1, min(tiles, MOST_PARTS, PARTS // (rows * columns)))
    part_pixels = triton.cdiv(tiles, parts) * MOMENTS["PIXELS"]
    parts = triton.cdiv(pixels, part_pixels)
    means = torch.empty(2, rows, parts, channels, dtype=torch.float32, device=x.device)
    channel_moments[parts, columns, rows](x, means[0], means[1], pixels, channels, part_pixels, **MOMENTS)
    scale = torch.empty(2, rows, channels, dtype=torch.float32, device=x.device)
    _combine[groups, rows](
        means[0],
        means[1],
        x if offset is None else offset,
        weight,
        bias,
        scale[0],
        scale[1],
        pixels,
        channels,
        part_pixels,
        parts,
        channels // groups,
        eps,
        0 if offset is None or len(offset) == 1 else offset.stride(0),
        HAS_OFFSET=offset is not None,
        MOST_PARTS=triton.next_power_of_2(parts),
        GROUP_CHANNELS=triton.next_power_of_2(channels // groups),
        num_warps=4,
    )
    y = torch.empty_like(x)
    grid = triton.cdiv(pixels, APPLY["PIXELS"]), triton.cdiv(channels, APPLY["CHANNELS"]), rows
    _apply[grid](x, y, scale[0], scale[1], pixels, channels, IS_ACTIVATED=is_activated, **APPLY)
    return y


@group_norm.register_fake
def _(x, offset, weight, bias, groups, eps, is_activated):
    return torch.empty_like(x, memory_format=torch.channels_last)
