import base64
import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.pictures import MAX_PIXELS
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.serve.pictures import Upload, enlarge, from_base64, prepare

LIMITS = BaseLimits.of(128, 128, 32, 77)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 128, height: int = 128) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x % 256, y % 256, (x + y) % 256], axis=-1).astype(np.uint8))


def prepared(upload: Upload, **fields: object) -> Any:
    return prepare(upload, GenerationRequest.model_validate({"prompt": "x", **fields}), LIMITS)


def pixels(png: bytes) -> Any:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image).astype(int)


def fault(upload: Upload, **fields: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as error:
        prepared(upload, **fields)
    assert len(error.value.message) < 200
    return error.value


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it is so large."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(("kind", "off"), [("PNG", 0), ("WEBP", 40), ("JPEG", 40)])
def test_the_pixels_arrive(kind: str, off: int) -> None:
    request, start = prepared(Upload(encoded(gradient(), kind)))
    assert (request.width, request.height) == (128, 128)
    assert np.abs(pixels(start.image) - np.asarray(gradient())).mean() <= off
    assert start.mask is None
    assert start.strength == 0.8


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((500, 500), (128, 128)), ((200, 100), (192, 96)), ((4000, 10), (256, 64)), ((1, 1), (128, 128))],
)
def test_proportions_are_kept_as_far_as_the_base_can(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    request, start = prepared(Upload(encoded(Image.new("RGB", size))))
    assert (request.width, request.height) == drawn
    with Image.open(io.BytesIO(start.image)) as image:
        assert image.size == drawn


def test_a_size_that_is_asked_for_is_taken() -> None:
    request, start = prepared(Upload(encoded(gradient())), width=64, height=96)
    assert pixels(start.image).shape == (96, 64, 3)
    assert (request.width, request.height) == (64, 96)


def test_a_photo_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # was taken with the camera turned
    _, start = prepared(Upload(encoded(gradient(), "PNG", exif=exif)))
    turned = np.rot90(np.asarray(gradient()), k=-1)
    assert (pixels(start.image) == turned).all()


@pytest.mark.parametrize(
    "image",
    [
        Image.new("RGBA", (64, 64), (255, 0, 0, 0)),
        Image.new("LA", (64, 64), (0, 0)),
        Image.new("1", (64, 64), 1),
        Image.new("L", (64, 64), 255),
        Image.new("I;16", (64, 64), 65535),
        Image.new("P", (64, 64), 0),
    ],
)
def test_every_mode_becomes_rgb_over_white(image: Image.Image) -> None:
    options: dict[str, Any] = {}
    if image.mode == "P":
        image.putpalette([255, 255, 255])
        options = {"transparency": 0}
    _, start = prepared(Upload(encoded(image, **options)))
    assert pixels(start.image).shape == (128, 128, 3)
    assert pixels(start.image).min() == 255


def test_white_is_drawn_anew_and_what_is_transparent_with_openai() -> None:
    half = Image.new("L", (128, 128), 0)
    half.paste(255, (0, 0, 64, 128))
    _, ours = prepared(Upload(encoded(gradient()), encoded(half)))
    carrier = Image.new("RGBA", (128, 128), (9, 9, 9, 255))
    carrier.putalpha(half.point(lambda value: 255 - value))
    _, openais = prepared(Upload(encoded(gradient()), encoded(carrier), is_mask_alpha=True))
    picture = gradient().convert("RGBA")
    picture.putalpha(half.point(lambda value: 255 - value))
    _, inside = prepared(Upload(encoded(picture), is_mask_alpha=True))
    for start in (ours, openais, inside):
        assert pixels(start.mask)[:, :60].min() > 200
        assert pixels(start.mask)[:, 68:].max() < 50


def test_an_opaque_picture_needs_no_mask() -> None:
    assert prepared(Upload(encoded(gradient().convert("RGBA")), is_mask_alpha=True))[1].mask is None


def test_a_step_is_always_taken() -> None:
    assert prepared(Upload(encoded(gradient()), strength=0.0), steps=49)[1].strength * 49 >= 1


def test_digests_are_of_pixels_not_of_files() -> None:
    starts = [prepared(Upload(encoded(gradient(), "PNG", compress_level=level)))[1] for level in (0, 9)]
    assert starts[0].recipe == starts[1].recipe


NOISE = encoded(Image.effect_noise((64, 64), 50))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        NOISE[:-200],
        NOISE[:40],
        NOISE[:100] + b"\0" * 100 + NOISE[200:],
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(gradient(), "GIF"),
        encoded(gradient(), "TIFF"),
        b"\xff\xd8\xff" + b"\0" * 50,
        b"RIFF\0\0\0\0WEBPVP8 ",
    ],
)
def test_what_is_no_picture_is_told(data: bytes) -> None:
    error = fault(Upload(data, image_name="image"))
    assert (error.message, error.param) == ("image must be a whole PNG, JPEG or WebP picture", "image")
    assert fault(Upload(encoded(gradient()), data)).param == "mask"


@pytest.mark.parametrize("size", [(4001, 4000), (10_000, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    assert f"init_image must have at most {MAX_PIXELS} pixels" in fault(Upload(bomb(*size))).message


def test_text_that_unpacks_to_much_is_refused() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * 80_000_000, zip=True)
    assert fault(Upload(encoded(gradient(8, 8), pnginfo=info))).param == "init_image"


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert "not an animation" in fault(Upload(data)).message


@pytest.mark.parametrize(
    ("mask", "is_alpha", "words"),
    [
        (Image.new("L", (64, 128), 255), False, "mask must be as large as init_image, 128x128 pixels, got 64x128"),
        (Image.new("L", (128, 128), 0), False, "mask has no white area"),
        (Image.new("RGBA", (128, 128), "black"), True, "mask has no transparent area"),
        (Image.new("RGB", (128, 128), "black"), True, "mask must have transparent areas"),
    ],
)
def test_masks_that_say_nothing(mask: Image.Image, is_alpha: bool, words: str) -> None:
    error = fault(Upload(encoded(gradient()), encoded(mask), is_mask_alpha=is_alpha))
    assert error.message.startswith(words)
    assert error.param == "mask"


def test_a_size_the_base_cannot_do_is_told() -> None:
    assert fault(Upload(encoded(gradient())), width=100).param == "width"


@pytest.mark.parametrize("text", ["é", "a", "ab=c", "data:image/png", "http://x/y.png"])
def test_base64_it_must_be(text: str) -> None:
    with pytest.raises(InvalidRequest, match="mask must be a whole PNG"):
        prepared(Upload(encoded(gradient()), from_base64(text, "mask")))


def test_a_data_url_is_taken() -> None:
    assert from_base64("data:image/png;base64," + base64.b64encode(b"abc").decode(), "x") == b"abc"


def test_previews_are_enlarged() -> None:
    assert pixels(enlarge(encoded(gradient(16, 8)), (128, 64))).shape == (64, 128, 3)
