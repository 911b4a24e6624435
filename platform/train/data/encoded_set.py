"""The cache as training reads it: latents and text features of every picture, mapped from files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch


@dataclass(frozen=True)
class EncodedItem:
    """One picture. `bucket`: (width, height) in pixels; `captions`, `crops`: how many are kept of each."""

    index: int
    key: str
    sha256: str
    bucket: tuple[int, int]
    captions: int
    crops: int
    held_out: bool


@dataclass(frozen=True)
class LatentStats:
    """What the VAE says of a picture, scaled as the UNet sees it: `mean + std * noise` are its latents.

    Both [4, h/8, w/8] (the VAE's factor), float32, on the CPU.
    """

    mean: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class TextFeatures:
    """What the UNet is told about a caption, in the text encoders' dtype on the CPU.

    `prompt_embeds`: [L, D], penultimate hidden states of both encoders side by side, padding kept; `pooled`: [P], from
    the second encoder. L is the base's window, 77 for SDXL.
    """

    prompt_embeds: torch.Tensor
    pooled: torch.Tensor


class EncodedSet:
    """A finished cache, read-only. Safe for several threads; each process opens its own.

    `fingerprint`: sha256 over pictures, captions, the base's fingerprint, dtypes and the settings that shape the cache.
    """

    path: Path
    fingerprint: str
    items: tuple[EncodedItem, ...]

    @classmethod
    def open(cls, path: Path, *, validation_share: float = 0.0) -> Self:
        """Opens in milliseconds: file sizes are checked, contents are not (`verify` does that).

        `validation_share`: of the pictures that are marked `held_out`, chosen by content, so that equal pictures fall
        on the same side. Raises DataUnreadable for a damaged cache and ConfigError for a share that leaves nothing to
        train on or to validate with.
        """
        raise NotImplementedError

    def latents(self, index: int, crop: int = 0, flip: bool = False) -> LatentStats:
        """`flip` needs `data.flip`."""
        raise NotImplementedError

    def micro(self, index: int, crop: int = 0, flip: bool = False) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning in the order of `add_time_ids`: original height and width, the crop's top and left,
        target height and width, in pixels."""
        raise NotImplementedError

    def text(self, index: int, caption: int = 0) -> TextFeatures:
        raise NotImplementedError

    @property
    def null_text(self) -> TextFeatures:
        """The other side of guidance, as the base was trained: the empty prompt's, or zeros where
        `force_zeros_for_empty_prompt` says so, as SDXL's does."""
        raise NotImplementedError

    def tokens(self, index: int, caption: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of both tokenizers, [L], int64, padded each in its own way: for text encoders in training."""
        raise NotImplementedError

    @property
    def null_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the empty prompt; where `null_text` is zeros, zero what the encoders make of them too."""
        raise NotImplementedError
