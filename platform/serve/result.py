"""What a replica hands to the gateway. Imports no torch, so that the gateway need not either."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from lorafleet.core.recipe import BaseRef
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.serve.events import Done, Event, Image


@dataclass(frozen=True)
class GenerationResult:
    """`images` are PNGs that carry their recipe; `timings` are seconds by stage of the image that was done last."""

    images: list[bytes]
    seeds: list[int]
    timings: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    is_cached: bool = False


def fold(events: Iterable[Event]) -> GenerationResult:
    """The result that the events of good work tell."""
    events = list(events)
    images = {event.image: event for event in events if isinstance(event, Image)}
    (done,) = (event for event in events if isinstance(event, Done))
    in_order = [images[number] for number in sorted(images)]
    return GenerationResult(
        images=[event.png for event in in_order],
        seeds=[event.seed for event in in_order],
        timings=done.timings,
        warnings=done.warnings,
    )


def told(result: GenerationResult) -> list[Event]:
    """The events that tell a result: what `fold` takes."""
    pairs = zip(result.images, result.seeds, strict=True)
    images: list[Event] = [Image(number, seed, png) for number, (png, seed) in enumerate(pairs)]
    return [*images, Done(result.timings, result.warnings)]


@dataclass(frozen=True)
class ModelInfo:
    """The base that a replica has loaded. `problems`: what it works without, such as an adapter to be preloaded."""

    ref: BaseRef
    limits: BaseLimits
    created_unix_s: int
    problems: tuple[str, ...] = ()
