"""What a set of pictures holds, before anything is trained on it: sizes, buckets, what is bad, double or cut off."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from lorafleet.core.errors import ConfigError, DataUnreadable
from lorafleet.core.pictures import BadPicture, decode, on_white
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.train.data.buckets import Size, choose_bucket, cut, make_buckets, plan_crops
from lorafleet.train.data.config import DataConfig
from lorafleet.train.data.encoded_set import choose_held_out
from lorafleet.train.data.plan import OnProgress, unreadable
from lorafleet.train.data.source import Item, Source
from lorafleet.train.data.wordings import word

CountTokens = Callable[[str], tuple[int, int]]
"""Tokens of a caption by both tokenizers, start and end token included."""

HASH_SIDE: Final = 32
HASH_BITS: Final = 64
MAX_BITS_APART: Final = 3
BANDS: Final = MAX_BITS_APART + 1  # hashes that are at most so far apart agree in one of as many bands
MAX_THUMBNAIL_OFF: Final = 6.0  # mean difference of two thumbnails, of 255
THUMBNAIL_SIDE: Final = 16


@dataclass(frozen=True)
class Seen:
    """One picture that can be trained on. `size`, `bucket`: (width, height) in pixels; `cut_share`: of its area, that
    the bucket leaves out; `tile`: as training sees it, scaled to at most the tile's side."""

    key: str
    captions: tuple[str, ...]
    sha256: str
    size: Size
    bucket: Size
    cut_share: float
    is_enlarged: bool
    look: int
    thumbnail: npt.NDArray[np.uint8]
    tile: Image.Image | None


@dataclass(frozen=True)
class Bad:
    """A picture that training would refuse, and the sentence it would say."""

    key: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """All of a source. `tokens`: for each wording its tokens by both tokenizers; `window`: how many are read."""

    seen: tuple[Seen, ...]
    bad: tuple[Bad, ...]
    tokens: tuple[tuple[str, str, tuple[int, int]], ...]
    window: int
    held_out: int | None

    def report(self) -> dict[str, Any]:
        """As JSON. Keys of pictures where a number alone would not help."""
        lengths = [max(counts) for _, _, counts in self.tokens]
        equal, alike = self.duplicates()
        return {
            "pictures": len(self.seen) + len(self.bad),
            "usable": len(self.seen),
            "held_out": self.held_out,
            "buckets": {f"{w}x{h}": count for (w, h), count in sorted(Counter(s.bucket for s in self.seen).items())},
            "enlarged": [each.key for each in self.seen if each.is_enlarged],
            "cut_by_a_fifth": [each.key for each in self.seen if each.cut_share >= 0.2],
            "bad": [{"picture": each.key, "reason": each.reason} for each in self.bad],
            "equal": equal,
            "alike": alike,
            "captions": {
                "wordings": len(self.tokens),
                "tokens_median": float(np.median(lengths)) if lengths else None,
                "tokens_max": max(lengths, default=None),
                "window": self.window,
                "truncated": [
                    {"picture": key, "caption": text, "tokens": list(counts)}
                    for key, text, counts in self.tokens
                    if max(counts) > self.window
                ],
            },
        }

    def duplicates(self) -> tuple[list[list[str]], list[list[str]]]:
        """Groups of pictures that are the same bytes, and groups of other ones that look alike."""
        by_content = defaultdict(list)
        for each in self.seen:
            by_content[each.sha256].append(each)
        equal = [[each.key for each in group] for group in by_content.values() if len(group) > 1]
        return equal, _alike([group[0] for group in by_content.values()])


def inspect(
    source: Source,
    config: DataConfig,
    limits: BaseLimits,
    count_tokens: CountTokens,
    *,
    workers: int,
    tiles: int,
    tile_px: int,
    on_progress: OnProgress | None = None,
) -> Inspection:
    """Decodes every picture. What `encode_set` would stop at is collected, as far as a source can tell its pictures.

    `tiles`: of how many pictures, evenly spread, a tile is kept. `workers`: threads.

    Raises DataNotFound, DataUnreadable for captions, ConfigError or StorageUnavailable.
    """
    items, buckets = source.items(), make_buckets(config, limits)
    seen: list[Seen] = []
    bad: list[Bad] = []
    with ThreadPoolExecutor(workers) as pool:
        shown = {number * len(items) // tiles for number in range(tiles)}
        sides = [tile_px if index in shown or len(items) <= tiles else None for index in range(len(items))]
        try:
            looked = pool.map(lambda item, side: _look(item, config, buckets, side), items, sides)
            for number, found in enumerate(looked, 1):
                (seen if isinstance(found, Seen) else bad).append(found)  # type: ignore[arg-type]
                if on_progress is not None:
                    on_progress(number, len(items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    texts = [(item.key, text) for item in items for text in dict.fromkeys(word(item.captions, config))]
    try:
        chosen = choose_held_out([each.sha256 for each in seen], config.validation_share) if seen else frozenset()
        held_out = sum(each.sha256 in chosen for each in seen)
    except ConfigError:
        held_out = None
    return Inspection(
        seen=tuple(seen),
        bad=tuple(bad),
        tokens=tuple((key, text, count_tokens(text)) for key, text in texts),
        window=limits.max_prompt_tokens,
        held_out=held_out,
    )


def _look(item: Item, config: DataConfig, buckets: tuple[Size, ...], tile_px: int | None) -> Seen | Bad:
    try:
        data = item.read()
        image = on_white(decode(data, config.max_pixels))
    except BadPicture as error:
        return Bad(item.key, unreadable(item.key, error).message)
    except DataUnreadable as error:
        return Bad(item.key, error.message)
    sha256 = hashlib.sha256(data).hexdigest()
    bucket = choose_bucket(image.size, buckets)
    crop = plan_crops(sha256, image.size, bucket, config)[0]
    tile = None
    if tile_px is not None:
        tile = cut(image, crop, bucket, flip=False)
        tile.thumbnail((tile_px, tile_px))
    return Seen(
        key=item.key,
        captions=item.captions,
        sha256=sha256,
        size=image.size,
        bucket=bucket,
        cut_share=1 - bucket[0] * bucket[1] / (crop.scaled[0] * crop.scaled[1]),
        is_enlarged=crop.scaled[0] > image.width,
        look=_perceptual_hash(image),
        thumbnail=np.asarray(image.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX)),
        tile=tile,
    )


def _perceptual_hash(image: Image.Image) -> int:
    """64 bits: whether each low frequency of the picture's brightness is above their median (pHash, Zauner 2010)."""
    grey = np.asarray(image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS), np.float64)
    low = _COSINES @ grey @ _COSINES.T
    bits = (low > np.median(low.flatten()[1:])).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


# Rows 0 to 7 of the discrete cosine transform (type II).
_COSINES: Final = np.cos(np.pi / HASH_SIDE * np.outer(np.arange(8), np.arange(HASH_SIDE) + 0.5))


def _alike(pictures: Sequence[Seen]) -> list[list[str]]:
    """Groups, in the pictures' order: near by their hashes, and by their colours, which the hashes do not see."""
    parent = list(range(len(pictures)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    for one, other in _candidates([each.look for each in pictures]):
        if root(one) == root(other):
            continue
        first, second = (pictures[index].thumbnail.astype(np.float64) for index in (one, other))
        if np.abs(first - second).mean() <= MAX_THUMBNAIL_OFF:
            parent[root(other)] = root(one)
    groups = defaultdict(list)
    for index, each in enumerate(pictures):
        groups[root(index)].append(each.key)
    return [group for group in groups.values() if len(group) > 1]


def _candidates(hashes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Pairs of hashes that differ in at most MAX_BITS_APART bits."""
    width = HASH_BITS // BANDS
    for band in range(BANDS):
        same = defaultdict(list)
        for index, value in enumerate(hashes):
            same[value >> band * width & (1 << width) - 1].append(index)
        for indices in same.values():
            for one, other in combinations(indices, 2):
                if (hashes[one] ^ hashes[other]).bit_count() <= MAX_BITS_APART:
                    yield one, other
