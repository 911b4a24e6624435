"""The cache as training reads it: latents and text features of every picture, mapped from files."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Final, Self

import torch
from pydantic import ValidationError

from lorafleet.core.errors import ConfigError, DataUnreadable
from lorafleet.train.data.layout import FORMAT, ITEMS, LATENTS, MANIFEST, TEXTS, CacheManifest, ItemLine

NULL_ROW: Final = 0
CHUNK_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class EncodedItem:
    """One picture. `bucket`: (width, height) in pixels; `captions`, `crops`: how many are kept of each.

    `captions` counts every wording: those of the first caption, then those of the second, each as it is first.
    """

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

    def __init__(self, path: Path, manifest: CacheManifest, lines: tuple[ItemLine, ...], held_out: frozenset[str]):
        """Use `open`."""
        self.path = path
        self.fingerprint = manifest.fingerprint
        self._manifest = manifest
        self._lines = lines
        self.items = tuple(
            EncodedItem(index, line.key, line.sha256, line.bucket, len(line.texts), len(line.crops), held)
            for index, line in enumerate(lines)
            for held in [line.sha256 in held_out]
        )
        sizes = (self._stats_bytes(line) * len(line.crops) * manifest.flips for line in lines)
        self._starts = list(accumulate(sizes, initial=0))
        self._texts = _mapped(path / TEXTS, manifest)
        self._latents = _mapped(path / LATENTS, manifest)

    @classmethod
    def open(cls, path: Path, *, validation_share: float = 0.0) -> Self:
        """Opens in milliseconds: file sizes are checked, contents are not (`verify` does that).

        `validation_share`: of the pictures that are marked `held_out`, chosen by content, so that equal pictures fall
        on the same side. Raises DataUnreadable for a damaged cache and ConfigError for a share that leaves nothing to
        train on.
        """
        try:
            manifest = CacheManifest.model_validate_json((path / MANIFEST).read_bytes())
            if manifest.format != FORMAT or manifest.fingerprint != path.name:
                raise ValueError(f"{MANIFEST} is that of another one")
            for name, facts in manifest.files.items():
                size_bytes = (path / name).stat().st_size
                if size_bytes != facts.size_bytes:
                    raise ValueError(f"{name} has {size_bytes} bytes in place of {facts.size_bytes}")
            with (path / ITEMS).open("rb") as file:
                lines = tuple(ItemLine.model_validate_json(line) for line in file)
            if len(lines) != manifest.items:
                raise ValueError(f"{ITEMS} has {len(lines)} lines in place of {manifest.items}")
            return cls(path, manifest, lines, choose_held_out([line.sha256 for line in lines], validation_share))
        except (OSError, ValueError) as error:  # pydantic's ValidationError is one
            raise _damaged(path, error) from error

    def verify(self) -> None:
        """Reads everything and compares the hashes: about a second a GB. Raises DataUnreadable."""
        with ThreadPoolExecutor(len(self._manifest.files)) as pool:  # hashlib lets go of the GIL
            found = pool.map(_hash, [self.path / name for name in self._manifest.files])
            for (name, facts), sha256 in zip(self._manifest.files.items(), found, strict=True):
                if sha256 != facts.sha256:
                    raise _damaged(self.path, ValueError(f"{name} has another hash than when it was written"))

    def latents(self, index: int, crop: int = 0, flip: bool = False) -> LatentStats:
        """`flip` needs `data.flip`."""
        line = self._lines[index]
        assert 0 <= crop < len(line.crops), f"{line.key} has {len(line.crops)} crops"
        assert flip < self._manifest.flips, "data.flip was off"
        size_bytes = self._stats_bytes(line)
        start = self._starts[index] + (crop * self._manifest.flips + flip) * size_bytes
        width, height = (side // self._manifest.vae_factor for side in line.bucket)
        both = self._latents[start : start + size_bytes].view(torch.float32)
        mean, std = both.view(2, self._manifest.latent_channels, height, width).clone()
        return LatentStats(mean, std)

    def micro(self, index: int, crop: int = 0, flip: bool = False) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning in the order of `add_time_ids`: original height and width, the crop's top and left,
        target height and width, in pixels. The same for a mirrored crop: it was cut out at the same place."""
        line = self._lines[index]
        (width, height), (bucket_width, bucket_height), cut = line.size, line.bucket, line.crops[crop]
        return height, width, cut.top, cut.left, bucket_height, bucket_width

    def text(self, index: int, caption: int = 0) -> TextFeatures:
        return self._features(self._lines[index].texts[caption])

    @property
    def null_text(self) -> TextFeatures:
        """The other side of guidance, as the base was trained: the empty prompt's, or zeros where
        `force_zeros_for_empty_prompt` says so, as SDXL's does."""
        return self._features(NULL_ROW)

    def tokens(self, index: int, caption: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of both tokenizers, [L], int64, padded each in its own way: for text encoders in training."""
        return self._ids(self._lines[index].texts[caption])

    @property
    def null_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of the empty prompt; where `null_text` is zeros, zero what the encoders make of them too."""
        return self._ids(NULL_ROW)

    def _stats_bytes(self, line: ItemLine) -> int:
        width, height = (side // self._manifest.vae_factor for side in line.bucket)
        return 2 * self._manifest.latent_channels * height * width * 4

    def _features(self, row: int) -> TextFeatures:
        layout = self._manifest.text
        numbers = self._row(row)[2 * 8 * layout.window :].view(getattr(torch, layout.dtype))
        cut = layout.window * layout.hidden
        hidden, pooled = numbers[:cut], numbers[cut : cut + layout.pooled]
        return TextFeatures(hidden.view(layout.window, layout.hidden).clone(), pooled.clone())

    def _ids(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self._manifest.text.window
        ids_1, ids_2 = self._row(row)[: 2 * 8 * window].view(torch.int64).view(2, window).clone()
        return ids_1, ids_2

    def _row(self, row: int) -> torch.Tensor:
        size_bytes = self._manifest.text.row_bytes
        return self._texts[row * size_bytes : (row + 1) * size_bytes]


def _mapped(path: Path, manifest: CacheManifest) -> torch.Tensor:
    """The file's bytes, read from the disk when they are asked for."""
    size_bytes = manifest.files[path.name].size_bytes
    return torch.from_file(str(path), shared=False, size=size_bytes, dtype=torch.uint8)


def choose_held_out(hashes: list[str], share: float) -> frozenset[str]:
    """The contents to hold out: in an order that no name decides, until their share of the pictures is reached.

    Raises ConfigError where none would be left to train on.
    """
    if share == 0:
        return frozenset()
    counts = Counter(hashes)
    contents = sorted(counts, key=lambda sha256: hashlib.sha256(f"held out {sha256}".encode()).digest())
    if len(contents) < 2:
        raise ConfigError(
            f"data.validation_share={share:g} of one picture leaves none to train on: add pictures, or set "
            "data.validation_share=0.",
            param="data.validation_share",
        )
    wanted = max(1, round(share * len(hashes)))
    held = accumulate((counts[sha256] for sha256 in contents), initial=0)  # before each of them
    return frozenset(sha256 for sha256, before in zip(contents[:-1], held, strict=False) if before < wanted)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _damaged(path: Path, error: Exception) -> DataUnreadable:
    reason = error.errors(include_url=False)[0]["msg"] if isinstance(error, ValidationError) else str(error)
    return DataUnreadable(f"the cache {path} is damaged ({reason}): remove that folder.", param="data")
