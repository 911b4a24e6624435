"""Runs the base's VAE and text encoders over a source, once, into a cache."""

from pathlib import Path

from lorafleet.sdxl.base import Base
from lorafleet.train.data.config import DataConfig
from lorafleet.train.data.encoded_set import EncodedSet
from lorafleet.train.data.source import Source


def encode_set(source: Source, base: Base, config: DataConfig, cache_dir: Path, *, workers: int = 1) -> EncodedSet:
    """The cache of `source` under `cache_dir`/<fingerprint>: found, or made in this process by `workers` threads.

    Raises DataNotFound, DataUnreadable (naming the picture), ConfigError or StorageUnavailable (a full disk); then
    nothing half-written is left.
    """
    raise NotImplementedError
