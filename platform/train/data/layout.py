"""The cache's files.

<fingerprint>/items.jsonl     one line a picture: key, hash, size, bucket, crops, rows of its wordings
<fingerprint>/texts.bin       rows of `TextLayout`, the empty caption's first
<fingerprint>/latents.bin     for each picture, crop and mirroring: mean and deviation, [2, channels, h, w] float32
<fingerprint>/manifest.json   shapes, and size and sha256 of the other files; written last
"""

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

FORMAT: Final = 1
ITEMS: Final = "items.jsonl"
TEXTS: Final = "texts.bin"
LATENTS: Final = "latents.bin"
MANIFEST: Final = "manifest.json"
ALIGNMENT: Final = 8  # bytes; int64 and every float type can be viewed in place
UNFINISHED: Final = ".unfinished-"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextLayout(_Part):
    """A row: ids of both tokenizers [window] int64, hidden states [window, hidden], pooled [pooled], then padding."""

    window: int
    hidden: int
    pooled: int
    dtype: Literal["float32", "float16", "bfloat16"]

    @property
    def row_bytes(self) -> int:
        item_bytes = 4 if self.dtype == "float32" else 2
        used = 2 * 8 * self.window + item_bytes * (self.window * self.hidden + self.pooled)
        return used + -used % ALIGNMENT


class FileFacts(_Part):
    """What a file must be."""

    size_bytes: int
    sha256: str


class CropLine(_Part):
    """The picture's size after scaling, and where the bucket was cut out, in pixels."""

    scaled: tuple[int, int]
    left: int
    top: int


class ItemLine(_Part):
    """A line of items.jsonl. Sizes are (width, height) in pixels."""

    key: str
    sha256: str
    size: tuple[int, int]
    bucket: tuple[int, int]
    crops: tuple[CropLine, ...]
    texts: tuple[int, ...]


class CacheManifest(_Part):
    """`latents`: channels and the VAE's factor. `flips`: 2 where each crop is kept mirrored too, else 1."""

    format: int
    fingerprint: str
    base_fingerprint: str
    vae_dtype: str
    items: int
    texts: int
    flips: int
    latent_channels: int
    vae_factor: int
    text: TextLayout
    files: dict[str, FileFacts]
