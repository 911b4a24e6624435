"""Buckets against SDXL's own list, and that micro-conditioning tells the truth about the pixels."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.train.data import DataConfig
from lorafleet.train.data.buckets import choose_bucket, cut, make_buckets, plan_crops

SDXL = BaseLimits.of(1024, 1024, grid_px=32, max_prompt_tokens=77)
EMOJIXL = BaseLimits.of(128, 128, grid_px=32, max_prompt_tokens=40)
# SDXL's report (arXiv 2307.01952), appendix I: of its heights and widths those from aspect 1 to 2.
OFFICIAL = {(1024, 1024), (1088, 960), (1152, 896), (1216, 832), (1280, 768), (1344, 768), (1408, 704)}


def test_sdxl_s_buckets_are_those_of_its_report() -> None:
    buckets = make_buckets(DataConfig(), SDXL)
    assert OFFICIAL | {(height, width) for width, height in OFFICIAL} <= set(buckets)
    assert all(w * h <= 1024**2 and w % 64 == h % 64 == 0 and max(w, h) <= 2 * min(w, h) for w, h in buckets)


def test_emojixl_s_buckets_are_sizes_it_was_trained_at() -> None:
    assert make_buckets(DataConfig(), EMOJIXL) == ((96, 160), (128, 128), (160, 96))
    assert make_buckets(DataConfig(max_aspect=1), EMOJIXL) == ((128, 128),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bucket_step_px": 40}, "data.bucket_step_px must be a multiple of the base's grid of 32 pixels, not 40"),
        ({"resolution_px": 1024}, "no picture of 1024x1024 pixels in steps of 64 suits this base"),
        ({"resolution_px": 32}, "no picture of 32x32 pixels"),
    ],
)
def test_what_the_base_cannot_draw_is_refused(settings: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_buckets(DataConfig(**settings), EMOJIXL)  # type: ignore[arg-type]
    assert words in caught.value.message


@given(width=st.integers(1, 6000), height=st.integers(1, 6000), zoom=st.floats(1, 4))
def test_crops_lie_inside_and_keep_proportions(width: int, height: int, zoom: float) -> None:
    config = DataConfig(crops=3, crop_zoom=zoom)
    bucket = choose_bucket((width, height), make_buckets(config, SDXL))
    crops = plan_crops("ab" * 32, (width, height), bucket, config)
    assert crops == plan_crops("ab" * 32, (width, height), bucket, config)
    for crop in crops:
        assert 0 <= crop.left <= crop.scaled[0] - bucket[0]
        assert 0 <= crop.top <= crop.scaled[1] - bucket[1]
        assert abs(crop.scaled[0] * height - crop.scaled[1] * width) <= 1 + max(width, height) * max(
            1, max(bucket) / min(width, height)
        )
    first = crops[0]
    assert min(first.scaled[0] - bucket[0], first.scaled[1] - bucket[1]) == 0
    assert (first.left, first.top) == ((first.scaled[0] - bucket[0]) // 2, (first.scaled[1] - bucket[1]) // 2)


def test_the_nearest_proportions_win() -> None:
    buckets = make_buckets(DataConfig(), SDXL)
    assert choose_bucket((4000, 4000), buckets) == (1024, 1024)
    assert choose_bucket((1920, 1080), buckets) == (1344, 768)
    assert choose_bucket((100, 5000), buckets) == min(buckets, key=lambda size: size[0] / size[1])


def test_a_mirrored_crop_is_of_the_mirrored_picture() -> None:
    """Flip before crop: pixel (x, y) of the cutting is pixel (left + x, top + y) of the mirrored, scaled picture."""
    image = Image.fromarray(np.arange(200 * 100 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 200, 3))
    (middle, other) = plan_crops("c" * 64, image.size, (128, 96), DataConfig(crops=2, crop_zoom=1.0))
    assert middle.scaled == (192, 96)
    assert other.left != middle.left
    scaled = np.asarray(image.resize(other.scaled, Image.Resampling.LANCZOS))
    for flip, whole in ((False, scaled), (True, scaled[:, ::-1])):
        expected = whole[other.top : other.top + 96, other.left : other.left + 128]
        assert (np.asarray(cut(image, other, (128, 96), flip=flip)) == expected).all()


def test_a_picture_of_the_bucket_s_size_is_left_alone() -> None:
    image = Image.effect_noise((128, 128), 50).convert("RGB")
    bucket = choose_bucket(image.size, make_buckets(DataConfig(), EMOJIXL))
    (crop,) = plan_crops("ef" * 32, image.size, bucket, DataConfig())
    assert cut(image, crop, bucket, flip=False).tobytes() == image.tobytes()
    assert math.prod(bucket) == 128**2
