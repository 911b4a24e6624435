import pytest

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.limits import BaseLimits

EMOJIXL = BaseLimits.of(default_width_px=128, default_height_px=128, grid_px=32, max_prompt_tokens=32)
SDXL = BaseLimits.of(default_width_px=1024, default_height_px=1024, grid_px=32, max_prompt_tokens=77)


def test_sizes_go_from_half_to_twice_the_trained_one() -> None:
    assert (EMOJIXL.min_side_px, EMOJIXL.max_side_px) == (64, 256)
    assert (SDXL.min_side_px, SDXL.max_side_px) == (512, 2048)
    for limits in (EMOJIXL, SDXL):
        limits.check_size(limits.min_side_px, limits.max_side_px)


@pytest.mark.parametrize(
    ("width", "height", "field", "nearest"),
    [(100, 128, "width", "96 or 128"), (128, 300, "height", "256"), (32, 128, "width", "64"), (129, 0, "width", "")],
)
def test_a_size_off_the_grid_is_refused_with_the_nearest_ones(
    width: int, height: int, field: str, nearest: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} must be a multiple of 32 from 64 to 256.*{nearest}") as error:
        EMOJIXL.check_size(width, height)
    assert error.value.param == field


def test_the_nearest_sizes_are_allowed_ones() -> None:
    for side in range(1, 2049):
        for part in EMOJIXL._nearest(side).split(" or "):
            EMOJIXL.check_size(int(part), 128)


def test_the_area_is_bounded_where_the_sides_alone_are_not_enough() -> None:
    SDXL.check_size(1536, 1536)
    with pytest.raises(InvalidRequest, match="at most 2359296 pixels, not 2048x2048"):
        SDXL.check_size(2048, 2048)


def test_left_out_sides_are_the_trained_ones() -> None:
    assert EMOJIXL.size_of(GenerationRequest(prompt="x", width=64)) == (64, 128)


def test_lcm_takes_at_most_fifty_steps() -> None:
    EMOJIXL.check(GenerationRequest(prompt="x", scheduler="lcm", steps=50))
    EMOJIXL.check(GenerationRequest(prompt="x", scheduler="euler", steps=51))
    with pytest.raises(InvalidRequest, match="steps must be from 1 to 50 with scheduler lcm, not 51"):
        EMOJIXL.check(GenerationRequest(prompt="x", scheduler="lcm", steps=51))
