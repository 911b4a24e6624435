"""Parts of the base that no step needs wait in the CPU's memory: SDXL's VAE and text encoders take 1.8 GB of a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lorafleet.sdxl.base import Base

PARTS = ("vae", "text_encoder", "text_encoder_2")


def park(base: Base, needed: Sequence[str]) -> None:
    """Moves all but those that are needed away from a GPU."""
    if base.device.type == "cuda":
        for part in PARTS:
            if part not in needed:
                getattr(base.pipeline, part).to("cpu")


@contextmanager
def unparked(base: Base) -> Iterator[None]:
    """All parts on the base's device, to make pictures; afterwards where they were."""
    moved = []
    for part in PARTS:
        model = getattr(base.pipeline, part)
        if model.device.type != base.device.type:
            model.to(base.device)
            moved.append(model)
    try:
        yield
    finally:
        for model in moved:
            model.to("cpu")
