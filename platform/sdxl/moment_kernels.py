# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-not-found, import-untyped"
"""The moments of an image's channels, which the group normalisations of serving and of training begin with.

Imported only on a GPU. Images are [rows, pixels, channels] in memory. The compiler's own kernels read the few channels
of a group pixel by pixel: one H200, 128 channels of 1024 x 1024 pixels, 0.6 ms for the moments alone, which reading the
image once should take 0.06. Here every channel gets moments of its own, by which those of a group follow.
"""

import triton
import triton.language as tl


@triton.jit
def channel_moments(
    x_ptr, means_ptr, squares_ptr, pixels, channels, part_pixels,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Of each channel over `part_pixels` pixels: its mean, and the sum of squared differences from that.

    Programs: (parts, blocks of CHANNELS channels, rows). Both outputs: float32 [rows, parts, channels].
    """
    part, parts, row = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = channel < channels
    x_ptr += row.to(tl.int64) * pixels * channels
    mean = tl.zeros((CHANNELS,), dtype=tl.float32)
    squares = tl.zeros((CHANNELS,), dtype=tl.float32)
    count = 0.0
    last = tl.minimum((part + 1) * part_pixels, pixels)
    for start in range(part * part_pixels, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        is_here = (pixel < last)[:, None] & is_channel[None, :]
        x = tl.load(x_ptr + pixel.to(tl.int64)[:, None] * channels + channel[None, :], mask=is_here, other=0.0)
        x = x.to(tl.float32)
        here = tl.minimum(last - start, PIXELS).to(tl.float32)
        mean_here = tl.sum(x, axis=0) / here
        apart = tl.where(is_here, x - mean_here[None, :], 0.0)
        # Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979
        delta = mean_here - mean
        squares += tl.sum(apart * apart, axis=0) + delta * delta * (count * here / (count + here))
        mean += delta * (here / (count + here))
        count += here
    at = (row * parts + part) * channels + channel
    tl.store(means_ptr + at, mean, mask=is_channel)
    tl.store(squares_ptr + at, squares, mask=is_channel)
