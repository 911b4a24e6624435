"""What one loaded base can draw: its sizes and its prompt window. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import MAX_SIDE_PX, MIN_SIDE_PX, GenerationRequest

# LCM picks its steps out of a schedule of 50 (`original_inference_steps` of diffusers' LCMScheduler, which raises
# above it).
MAX_LCM_STEPS = 50
# The largest area any base is asked for, whatever its own size: bounds the memory of one request.
MAX_PIXELS = 1536 * 1536


@dataclass(frozen=True)
class BaseLimits:
    """Sizes in pixels and the prompt window in tokens (start and end token included) of one base."""

    default_width_px: int
    default_height_px: int
    grid_px: int
    min_side_px: int
    max_side_px: int
    max_pixels: int
    max_prompt_tokens: int

    @classmethod
    def of(cls, default_width_px: int, default_height_px: int, grid_px: int, max_prompt_tokens: int) -> "BaseLimits":
        """Limits around the size a base was trained at: half to twice its sides."""
        low = max(MIN_SIDE_PX, min(default_width_px, default_height_px) // 2)
        high = min(MAX_SIDE_PX, 2 * max(default_width_px, default_height_px))
        default_pixels = default_width_px * default_height_px
        return cls(
            default_width_px=default_width_px,
            default_height_px=default_height_px,
            grid_px=grid_px,
            min_side_px=-(-low // grid_px) * grid_px,
            max_side_px=high // grid_px * grid_px,
            max_pixels=max(default_pixels, min(4 * default_pixels, MAX_PIXELS)),
            max_prompt_tokens=max_prompt_tokens,
        )

    @classmethod
    def of_configs(cls, unet: Mapping[str, Any], vae: Mapping[str, Any], max_prompt_tokens: int) -> "BaseLimits":
        """From diffusers' configurations of the UNet and the VAE."""
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        sample_size = unet["sample_size"]
        height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        halvings = len(unet["block_out_channels"]) - 1
        return cls.of(
            default_width_px=width * factor,
            default_height_px=height * factor,
            grid_px=factor * 2**halvings,
            max_prompt_tokens=max_prompt_tokens,
        )

    def size_of(self, request: GenerationRequest) -> tuple[int, int]:
        """The request's (width, height) in pixels, the default where it says nothing.

        Raises InvalidRequest.
        """
        width = self.default_width_px if request.width is None else request.width
        height = self.default_height_px if request.height is None else request.height
        self.check_size(width, height)
        return width, height

    def check_size(self, width: int, height: int) -> None:
        """Raises InvalidRequest, naming field, grid, range and the nearest sizes, unless the base can draw this."""
        for name, side in (("width", width), ("height", height)):
            if side % self.grid_px or not self.min_side_px <= side <= self.max_side_px:
                raise InvalidRequest(
                    f"{name} must be a multiple of {self.grid_px} from {self.min_side_px} to {self.max_side_px}, "
                    f"not {side}: nearest {self._nearest(side)}",
                    param=name,
                )
        if width * height > self.max_pixels:
            raise InvalidRequest(
                f"width x height must be at most {self.max_pixels} pixels, not {width}x{height} = {width * height}",
                param="width",
            )

    def check(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest for a size or a number of steps that this base or its samplers cannot do."""
        self.size_of(request)
        if request.scheduler == "lcm" and request.steps > MAX_LCM_STEPS:
            raise InvalidRequest(
                f"steps must be from 1 to {MAX_LCM_STEPS} with scheduler lcm, not {request.steps}", param="steps"
            )

    def _nearest(self, side: int) -> str:
        below = min(max(side // self.grid_px * self.grid_px, self.min_side_px), self.max_side_px)
        above = min(max(below + self.grid_px, self.min_side_px), self.max_side_px)
        if side <= self.min_side_px or below == above:
            return str(below)
        return f"{below} or {above}"
