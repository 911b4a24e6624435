"""Picture files from outside: checked before they are decoded, turned upright."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from PIL import Image, ImageOps

FORMATS: Final = ("PNG", "JPEG", "WEBP")
MAX_PIXELS: Final = 16_000_000  # decoded, 64 MB
SPOILED: Final = "must be a whole PNG, JPEG or WebP picture"
_ORIENTATION: Final = 0x0112  # EXIF's tag; its values 5 to 8 exchange width and height


class BadPicture(ValueError):
    """Says what a picture must be, for the end of a sentence that begins with its name."""


def upright_size(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in pixels as `decode` would give it, from the file's header. Raises BadPicture."""
    with _opened(data, max_pixels) as image:
        is_turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return (image.height, image.width) if is_turned else image.size


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Upright RGBA or RGB. Nothing is decoded before kind and size are known: 20 KB may hold 800 MB of pixels.

    Raises BadPicture.
    """
    with _opened(data, max_pixels) as image:
        has_alpha = image.has_transparency_data
        upright = ImageOps.exif_transpose(_eight_bit(image))
        return upright.convert("RGBA" if has_alpha else "RGB")


def on_white(image: Image.Image) -> Image.Image:
    """RGB."""
    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


@contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    too_large = f"must have at most {max_pixels} pixels"
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise BadPicture(too_large) from None
    except Exception as error:  # a hostile file raises whatever its reader did not think of
        raise BadPicture(SPOILED) from error
    with opened as image:
        if image.width * image.height > max_pixels:
            raise BadPicture(f"{too_large}, got {image.width}x{image.height}")
        if getattr(image, "is_animated", False):
            raise BadPicture("must be one picture, not an animation")
        try:
            yield image
        except Exception as error:  # as above
            raise BadPicture(SPOILED) from error


def _eight_bit(image: Image.Image) -> Image.Image:
    """PIL cuts 16-bit greys off at 255 in place of scaling them."""
    if image.mode.startswith("I"):
        return image.convert("I").point(lambda value: value / 257).convert("L")
    return image
