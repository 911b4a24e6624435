import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from pydantic import ValidationError

from lorafleet.core import recipe as recipes
from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import BaseRef, Recipe

RECIPE = Recipe(
    prompt="a red apple on a blue background",
    negative_prompt="blurry",
    width=96,
    height=64,
    steps=20,
    guidance_scale=5.0,
    scheduler="dpmpp_2m_karras",
    seed=1,
    base=BaseRef(id="models/emojixl", revision=None, fingerprint="sha256:0123456789abcdef"),
    versions={"lorafleet": "0.1.0", "torch": "2.13.0"},
)


def image(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (RECIPE.width, RECIPE.height), colour)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_text(text: bytes, *, compressed: bool = False) -> bytes:
    """A PNG whose `lorafleet` chunk holds `text`."""
    body = b"lorafleet\0" + (b"\1\0\0\0" + zlib.compress(text) if compressed else b"\0\0\0\0" + text)
    plain = recipes.embed(image(), RECIPE)
    return plain[:33] + chunk(b"iTXt", body) + plain[33:]  # 33: after the signature and IHDR


def test_embed_then_extract_gives_the_recipe_and_the_pixels(tmp_path: Path) -> None:
    png = recipes.embed(image(), RECIPE)
    (tmp_path / "a.png").write_bytes(png)
    assert recipes.extract(png) == RECIPE
    assert recipes.extract(tmp_path / "a.png") == RECIPE
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.getpixel((0, 0)) == (255, 0, 0)


def test_equal_input_gives_equal_bytes_whatever_the_image_carried() -> None:
    marked = image()
    marked.info = {"icc_profile": b"x" * 100, "dpi": (72, 72), "exif": b"Exif\0\0"}
    assert recipes.embed(marked, RECIPE) == recipes.embed(image(), RECIPE)
    assert recipes.embed(image("blue"), RECIPE) != recipes.embed(image(), RECIPE)


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(min_size=1, max_size=200).filter(lambda text: text.strip() != ""),
    negative=st.text(max_size=50),
)
def test_any_text_survives(prompt: str, negative: str) -> None:
    try:
        recipe = Recipe(**{**RECIPE.model_dump(), "prompt": prompt, "negative_prompt": negative})
    except ValidationError:
        return  # no recipe has such a prompt
    assert recipes.extract(recipes.embed(image(), recipe)) == recipe


def test_longest_prompt_survives() -> None:
    recipe = RECIPE.model_copy(update={"prompt": "🍎" * 2000, "negative_prompt": "\\\n" * 1000})
    assert recipes.extract(recipes.embed(image(), recipe)) == recipe


def test_other_tools_see_the_parameters(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(recipes.embed(image(), RECIPE))
    with Image.open(tmp_path / "a.png") as opened:
        assert isinstance(opened, PngImagePlugin.PngImageFile)
        text = opened.text
    assert text["parameters"] == (
        "a red apple on a blue background\n"
        "Negative prompt: blurry\n"
        "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 5.0, Seed: 1, Size: 96x64, "
        "Model hash: 0123456789, Model: emojixl, Version: lorafleet 0.1.0"
    )
    assert json.loads(text["lorafleet"])["base"]["fingerprint"] == "sha256:0123456789abcdef"
    assert "step_reuse" not in text["lorafleet"]  # as it was before there was any


def test_reused_steps_are_told() -> None:
    reusing = RECIPE.model_copy(update={"step_reuse": 3})
    assert recipes.extract(recipes.embed(image(), reusing)).request().step_reuse == 3
    assert recipes.parameters(reusing).endswith("Version: lorafleet 0.1.0, Step reuse: 3")


def test_parameters_leave_out_an_empty_negative_prompt_and_quote_odd_names() -> None:
    odd = RECIPE.model_copy(update={"negative_prompt": "", "base": BaseRef(id="a, b: c", fingerprint="f")})
    assert "Negative" not in recipes.parameters(odd)
    assert 'Model: "a, b: c"' in recipes.parameters(odd)


def test_a_recipe_is_a_request_with_nothing_open() -> None:
    assert RECIPE.request() == GenerationRequest(
        prompt=RECIPE.prompt,
        negative_prompt="blurry",
        width=96,
        height=64,
        steps=20,
        guidance_scale=5.0,
        scheduler="dpmpp_2m_karras",
        seed=1,
        num_images=1,
    )
    asked = set(GenerationRequest.model_fields) - {"num_images"}
    assert set(Recipe.model_fields) == asked | {"base", "versions", "start"}


def test_ranges_are_those_of_a_request() -> None:
    for field, value in {
        "steps": 151,
        "seed": -1,
        "width": 63,
        "guidance_scale": float("nan"),
        "prompt": " ",
    }.items():
        with pytest.raises(ValidationError, match=field):
            Recipe(**{**RECIPE.model_dump(), field: value})


def test_a_compressed_chunk_is_read() -> None:
    other = RECIPE.model_copy(update={"seed": 7})
    assert recipes.extract(with_text(other.model_dump_json().encode(), compressed=True)) == other


def cut(png: bytes) -> bytes:
    return png[: png.index(b"lorafleet\0") + 40]


def flip(png: bytes) -> bytes:
    at = png.index(b'blurry","width')
    return png[:at] + b"B" + png[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda _: b"GIF89a", "this image is not a PNG"),
        (lambda _: b"", "this image is not a PNG"),
        (lambda png: png[:33], "carries no Lorafleet recipe"),
        (cut, "the recipe in this image is damaged"),
        (flip, "the recipe in this image is damaged: its checksum is wrong."),
        (lambda _: with_text(b"{}"), "is damaged: prompt is missing."),
        (lambda _: with_text(b"not json"), "is damaged: Invalid JSON"),
        (lambda _: with_text(b"\xff\xfe"), "is damaged"),
        (lambda _: with_text(b"[" * 50_000), "is damaged"),
        (lambda _: with_text(b" " * 10_000_000, compressed=True), "longer than 64 KiB"),
        (lambda _: with_text(b" " * 70_000), "longer than 64 KiB"),
        (
            lambda _: with_text(RECIPE.model_copy(update={"steps": 999}).model_dump_json().encode()),
            "1 to 150, not 999",
        ),
        (lambda _: b"\x89PNG\r\n\x1a\n" + b"\0" * recipes.MAX_PNG_BYTES, "larger than 64 MiB"),
    ],
)
def test_no_recipe_or_a_damaged_one_is_one_sentence(damage: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        recipes.extract(damage(recipes.embed(image(), RECIPE)))
    assert message in raised.value.message
    assert "\n" not in raised.value.message
    assert raised.value.param == "recipe"


def test_an_unreadable_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot read .*nothing.png: No such file"):
        recipes.extract(tmp_path / "nothing.png")
    with pytest.raises(InvalidRequest, match="cannot read"):
        recipes.extract(tmp_path)


def test_a_huge_picture_is_never_decoded() -> None:
    """30000 x 30000 pixels would be 2.7 GB; only the text chunks are read."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    body = b"lorafleet\0\0\0\0\0" + RECIPE.model_dump_json().encode()
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"?") + chunk(b"iTXt", body)
    assert recipes.extract(png) == RECIPE


def test_an_image_of_another_size_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="its recipe says"):
        recipes.embed(Image.new("RGB", (8, 8)), RECIPE)


def test_versions_name_what_is_installed() -> None:
    assert {"lorafleet", "torch", "diffusers", "transformers"} >= recipes.versions().keys() >= {"lorafleet"}
