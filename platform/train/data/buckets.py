"""Aspect-ratio buckets, and how a picture is scaled, mirrored and cut to fit one."""

import hashlib
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageOps

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.train.data.config import DataConfig

Size = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Crop:
    """A picture is scaled to `scaled`, and the bucket is cut out at `left`, `top` of that."""

    scaled: Size
    left: int
    top: int


def make_buckets(config: DataConfig, limits: BaseLimits) -> tuple[Size, ...]:
    """Sizes of about the resolution's area, sorted: for each side the longest other one that does not exceed the area.

    Raises ConfigError where the base cannot draw any.
    """
    area = limits.default_width_px * limits.default_height_px
    if config.resolution_px is not None:
        area = config.resolution_px**2
    side = math.isqrt(area)
    step = config.bucket_step_px or max(limits.grid_px, side // 16 // limits.grid_px * limits.grid_px)
    if step % limits.grid_px:
        raise ConfigError(
            f"data.bucket_step_px must be a multiple of the base's grid of {limits.grid_px} pixels, not {step}.",
            param="data.bucket_step_px",
        )
    sizes = set()
    for width in range(step, int(side * math.sqrt(config.max_aspect)) + step, step):
        height = area // width // step * step
        is_wanted = height and max(width, height) <= config.max_aspect * min(width, height)
        if is_wanted and min(width, height) >= limits.min_side_px and max(width, height) <= limits.max_side_px:
            sizes |= {(width, height), (height, width)}
    if not sizes:
        raise ConfigError(
            f"no picture of {side}x{side} pixels in steps of {step} suits this base, whose sides are multiples "
            f"of {limits.grid_px} from {limits.min_side_px} to {limits.max_side_px}: change data.resolution_px.",
            param="data.resolution_px",
        )
    return tuple(sorted(sizes))


def choose_bucket(size: Size, buckets: tuple[Size, ...]) -> Size:
    """The bucket whose proportions are nearest, the larger of two that are equally near."""
    aspect = math.log(size[0] / size[1])
    return min(buckets, key=lambda each: (round(abs(math.log(each[0] / each[1]) - aspect), 9), -each[0] * each[1]))


def plan_crops(sha256: str, size: Size, bucket: Size, config: DataConfig) -> tuple[Crop, ...]:
    """The middle first, then `config.crops - 1` others, drawn by the picture's hash."""
    crops = []
    for number in range(config.crops):
        chance = random.Random(hashlib.sha256(f"crop {sha256} {number}".encode()).digest())  # noqa: S311
        zoom = 1.0 if number == 0 else chance.uniform(1.0, config.crop_zoom)
        scale = zoom * max(bucket[0] / size[0], bucket[1] / size[1])
        scaled = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
        spare = (scaled[0] - bucket[0], scaled[1] - bucket[1])
        place = (spare[0] // 2, spare[1] // 2) if number == 0 else tuple(chance.randint(0, each) for each in spare)
        crops.append(Crop(scaled, left=place[0], top=place[1]))
    return tuple(crops)


def cut(image: Image.Image, crop: Crop, bucket: Size, *, flip: bool) -> Image.Image:
    """RGB of the bucket's size. Mirrored before it is cut, so that the crop's place is true of what is seen."""
    scaled = image if image.size == crop.scaled else image.resize(crop.scaled, Image.Resampling.LANCZOS)
    if flip:
        scaled = ImageOps.mirror(scaled)
    return scaled.crop((crop.left, crop.top, crop.left + bucket[0], crop.top + bucket[1]))
