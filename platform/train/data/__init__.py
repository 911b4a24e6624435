"""From captioned pictures to what the UNet trains on: latents and text features, computed once and kept.

A `Source` is where pictures and captions lie; `encode_set` runs the base's VAE and text encoders over it and returns an
`EncodedSet`, which every later run with the same data, base and settings finds again. `precompute` does the same with
Ray Data, to the same bytes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lorafleet.train.data.config import DataConfig

if TYPE_CHECKING:
    from lorafleet.train.data.encode import encode_set
    from lorafleet.train.data.encoded_set import EncodedItem, EncodedSet, LatentStats, TextFeatures
    from lorafleet.train.data.source import Item, Source, open_source

__all__ = [
    "DataConfig",
    "EncodedItem",
    "EncodedSet",
    "Item",
    "LatentStats",
    "Source",
    "TextFeatures",
    "encode_set",
    "open_source",
]

# Settings are read without torch, which most of these need.
_HOMES = {
    "encode_set": "encode",
    **dict.fromkeys(("EncodedItem", "EncodedSet", "LatentStats", "TextFeatures"), "encoded_set"),
    **dict.fromkeys(("Item", "Source", "open_source"), "source"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
