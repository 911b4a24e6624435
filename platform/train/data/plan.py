"""What is to be encoded: decided beforehand from the files' contents and the settings, so that the cache has a name.

The order of the tasks is the order of the cache's bytes, whoever computes them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from lorafleet.core.errors import DataUnreadable
from lorafleet.core.pictures import BadPicture, upright_size
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.train.data.buckets import Crop, Size, choose_bucket, make_buckets, plan_crops
from lorafleet.train.data.config import DataConfig
from lorafleet.train.data.encoded_set import choose_held_out
from lorafleet.train.data.layout import FORMAT, TextLayout
from lorafleet.train.data.source import Item, Source
from lorafleet.train.data.wordings import word

READERS: Final = 16
SETTINGS_BESIDE: Final = {"endpoint_url", "validation_share"}
"""Settings that change no byte of the cache."""

OnProgress = Callable[[int, int], None]
"""Is told (done, in all)."""


@dataclass(frozen=True)
class BaseFacts:
    """What of a loaded base shapes the cache. `vae_factor`: pixels a side of a latent; dtypes by torch's names."""

    fingerprint: str
    limits: BaseLimits
    vae_dtype: str
    vae_factor: int
    latent_channels: int
    text: TextLayout

    def latents_bytes(self, bucket: Size) -> int:
        """Of mean and deviation of one crop."""
        width, height = bucket
        return 2 * self.latent_channels * (height // self.vae_factor) * (width // self.vae_factor) * 4


@dataclass(frozen=True)
class Entry:
    """One picture: where it is read, what it must be then, and what is made of it. `texts`: rows of `Plan.texts`."""

    item: Item
    sha256: str
    size: Size
    bucket: Size
    crops: tuple[Crop, ...]
    texts: tuple[int, ...]

    def check(self, data: bytes) -> None:
        """Raises DataUnreadable unless these are the bytes that were planned with."""
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise DataUnreadable(f"{self.item.key} was changed while it was being encoded: start again.", param="data")


@dataclass(frozen=True)
class Plan:
    """`texts`: each wording once, the empty one first. Tasks are these and then `entries`."""

    fingerprint: str
    facts: BaseFacts
    texts: tuple[str, ...]
    entries: tuple[Entry, ...]
    flips: tuple[bool, ...]

    @property
    def tasks(self) -> int:
        return len(self.texts) + len(self.entries)

    @property
    def cache_bytes(self) -> int:
        """Of everything but the small files."""
        latents = sum(self.facts.latents_bytes(entry.bucket) * len(entry.crops) for entry in self.entries)
        return latents * len(self.flips) + len(self.texts) * self.facts.text.row_bytes


def make_plan(source: Source, facts: BaseFacts, config: DataConfig) -> Plan:
    """Reads every file once, decodes none.

    Raises DataNotFound, DataUnreadable naming the picture, ConfigError or StorageUnavailable.
    """
    buckets = make_buckets(config, facts.limits)
    items = source.items()
    rows = {"": 0}
    entries = []
    with ThreadPoolExecutor(READERS) as pool:
        measured = pool.map(lambda item: _measure(item, config.max_pixels), items)
        try:
            for item, (sha256, size) in zip(items, measured, strict=True):
                bucket = choose_bucket(size, buckets)
                crops = plan_crops(sha256, size, bucket, config)
                wordings = tuple(rows.setdefault(text, len(rows)) for text in word(item.captions, config))
                entries.append(Entry(item, sha256, size, bucket, crops, wordings))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    choose_held_out([entry.sha256 for entry in entries], config.validation_share)  # a wrong share is known at once
    texts = tuple(rows)
    return Plan(
        fingerprint=_fingerprint(facts, config, texts, entries),
        facts=facts,
        texts=texts,
        entries=tuple(entries),
        flips=(False, True) if config.flip else (False,),
    )


def _measure(item: Item, max_pixels: int) -> tuple[str, Size]:
    data = item.read()
    try:
        return hashlib.sha256(data).hexdigest(), upright_size(data, max_pixels)
    except BadPicture as error:
        raise unreadable(item.key, error) from error


def unreadable(key: str, error: BadPicture) -> DataUnreadable:
    return DataUnreadable(f"the picture {key} {error}: replace it or take it out.", param="data")


def _fingerprint(facts: BaseFacts, config: DataConfig, texts: Sequence[str], entries: Sequence[Entry]) -> str:
    said: dict[str, Any] = {
        "format": FORMAT,
        "base": [facts.fingerprint, facts.vae_dtype, facts.text.dtype],
        "settings": config.model_dump(mode="json", exclude=SETTINGS_BESIDE),
        "texts": list(texts),
        "entries": [[entry.item.key, entry.sha256, entry.texts] for entry in entries],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
