"""What a replica hands to the gateway. Imports no torch, so that the gateway need not either."""

from dataclasses import dataclass, field

from lorafleet.core.recipe import BaseRef
from lorafleet.sdxl.limits import BaseLimits


@dataclass(frozen=True)
class GenerationResult:
    """`images` are PNGs that carry their recipe; `timings` are seconds by stage of the image that was done last."""

    images: list[bytes]
    seeds: list[int]
    timings: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    is_cached: bool = False


@dataclass(frozen=True)
class ModelInfo:
    """The base that a replica has loaded. `problems`: what it works without, such as an adapter to be preloaded."""

    ref: BaseRef
    limits: BaseLimits
    created_unix_s: int
    problems: tuple[str, ...] = ()
