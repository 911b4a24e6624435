"""From captioned pictures to what the UNet trains on: latents and text features, computed once and kept.

A `Source` is where pictures and captions lie; `encode_set` runs the base's VAE and text encoders over it and returns an
`EncodedSet`, which every later run with the same data, base and settings finds again. `precompute` does the same with
Ray Data, to the same bytes.
"""

from lorafleet.train.data.config import DataConfig
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
