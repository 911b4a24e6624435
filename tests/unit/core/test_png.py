"""Files by `encode_png`, read by Pillow and by the format's own rules."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

from lorafleet.core.png import BAND_BYTES, encode_png

PICTURES = Path(__file__).parents[3] / "samples/noto-sticker/held_out"


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, at = [], 8
    while at < len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack_from(">I", data, at + 8 + size)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + size
    return found


@given(
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    seed=st.integers(0, 99),
    levels=st.sampled_from([2, 5, 256]),
)
@settings(deadline=None, max_examples=60)
def test_the_pixels_come_back(width: int, height: int, seed: int, levels: int) -> None:
    """Of few levels the filter's ties are many, of all its differences overflow."""
    pixels = np.random.default_rng(seed).integers(0, levels, (height, width, 3), np.uint8) * (255 // (levels - 1))
    decoded = Image.open(io.BytesIO(encode_png(Image.fromarray(pixels.astype(np.uint8)))))
    assert decoded.mode == "RGB"
    assert np.array_equal(np.asarray(decoded), pixels)


@pytest.mark.parametrize("height", [191, 192, 193, 1024])
def test_bands_are_one_picture(height: int) -> None:
    width = BAND_BYTES // 192 // 3
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    pixels = np.stack([across, down, across * down // 64], axis=2).astype(np.uint8)
    data = encode_png(Image.fromarray(pixels))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    kinds = chunks(data)
    assert [kind for kind, _ in kinds] == [b"IHDR", b"IDAT", b"IEND"]
    assert len(zlib.decompress(kinds[1][1])) == height * (1 + 3 * width)  # raises for a wrong checksum
    assert encode_png(Image.fromarray(pixels)) == data


def test_text_stands_before_the_pixels_and_nothing_else_travels_along() -> None:
    image = Image.new("RGBA", (3, 2), (10, 20, 30, 128))
    image.info = {"icc_profile": b"a profile", "exif": b"Exif\0\0MM", "dpi": (72, 72)}
    text = PngInfo()
    text.add_text("parameters", "a red apple")
    text.add_itxt("lorafleet", "ein Äpfelchen 🍎")
    data = encode_png(image, text)
    assert [kind for kind, _ in chunks(data)] == [b"IHDR", b"tEXt", b"iTXt", b"IDAT", b"IEND"]
    decoded = Image.open(io.BytesIO(data))
    assert isinstance(decoded, PngImageFile)
    assert decoded.text == {"parameters": "a red apple", "lorafleet": "ein Äpfelchen 🍎"}
    assert decoded.getpixel((0, 0)) == (10, 20, 30)


def test_files_are_as_small_as_pillows() -> None:
    images = [Image.open(path).convert("RGB").resize((512, 512)) for path in sorted(PICTURES.glob("*.png"))[:8]]
    assert images
    theirs = 0
    for image in images:
        file = io.BytesIO()
        image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        theirs += file.tell()
    assert sum(len(encode_png(image)) for image in images) < 1.01 * theirs
