"""The recipe of one image: everything needed to make it again, carried inside its PNG.

A PNG holds it twice: as a JSON `lorafleet` chunk, which can be sent back to `POST /generate` as it is, and as the
`parameters` text that other image tools show (A1111's format).
"""

import json
import struct
import zlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import (
    AdapterUses,
    GenerationRequest,
    Guidance,
    NegativePrompt,
    Prompt,
    SchedulerName,
    Seed,
    SidePx,
    StepReuse,
    Steps,
)
from lorafleet.core.ranges import invalid_request

CHUNK: Final = "lorafleet"
MAX_PNG_BYTES: Final = 64 << 20
MAX_RECIPE_BYTES: Final = 64 << 10
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_SAMPLERS: Final[dict[str, str]] = {
    "euler": "Euler",
    "euler_a": "Euler a",
    "ddim": "DDIM",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "heun": "Heun",
    "euler_trailing": "Euler trailing",
}


class BaseRef(BaseModel):
    """Which base model made an image; the fingerprint decides, the rest is for people."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str = Field(max_length=1000, description="the id or path it was loaded from")
    revision: str | None = Field(default=None, max_length=200, description="the revision asked for")
    fingerprint: str = Field(min_length=1, max_length=200, description="hash of its weights")


class RecipeStart(BaseModel):
    """The pictures that an image was made from, by the SHA-256 of their pixels at its size; they are not inside."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the picture: RGB")
    mask: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="of what was drawn anew: grey")
    strength: float = Field(ge=0, le=1, description="the part of the steps that was taken")


class Recipe(BaseModel):
    """One image, every choice made: a GenerationRequest with nothing left open, and what ran it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Prompt
    negative_prompt: NegativePrompt = ""
    width: SidePx
    height: SidePx
    steps: Steps
    guidance_scale: Guidance
    scheduler: SchedulerName
    seed: Seed
    base: BaseRef
    versions: dict[str, str]
    start: RecipeStart | None = None
    step_reuse: StepReuse = 1
    adapters: AdapterUses = Field(default=[], description="each by its whole version")

    def request(self) -> GenerationRequest:
        """The request for this one image."""
        return GenerationRequest(**self.model_dump(exclude={"base", "versions", "start"}))


def versions() -> dict[str, str]:
    """The versions of what shapes an image, as installed."""
    found = {}
    for name in ("lorafleet", "torch", "diffusers", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def embed(image: Image.Image, recipe: Recipe) -> bytes:
    """`image` as PNG bytes carrying `recipe`; equal input gives equal bytes."""
    from lorafleet.core.png import encode_png  # numpy, which who only reads recipes need not have

    if image.size != (recipe.width, recipe.height):
        raise ValueError(f"the image is {image.size}, its recipe says {(recipe.width, recipe.height)}")
    info = PngInfo()
    info.add_text("parameters", parameters(recipe))
    usual: dict[str, object] = {"start": None, "step_reuse": 1, "adapters": []}
    info.add_itxt(
        CHUNK, recipe.model_dump_json(exclude={name for name, value in usual.items() if getattr(recipe, name) == value})
    )
    return encode_png(image, info)


def extract(png: bytes | Path) -> Recipe:
    """The recipe inside a PNG; its pixels are never decoded.

    Raises InvalidRequest if this is no PNG, holds no recipe, or a damaged one.
    """
    name = "this image" if isinstance(png, bytes) else str(png)
    data = png if isinstance(png, bytes) else _read(png)
    if len(data) > MAX_PNG_BYTES:
        raise InvalidRequest(f"{name} is larger than {MAX_PNG_BYTES >> 20} MiB.", param="recipe")
    if not data.startswith(_SIGNATURE):
        raise InvalidRequest(f"{name} is not a PNG.", param="recipe")
    try:
        text = next(_recipe_texts(data), None)
        if text is None:
            raise InvalidRequest(
                f"{name} carries no Lorafleet recipe: it was made elsewhere or saved again without it.",
                param="recipe",
            )
        return Recipe.model_validate_json(text)
    except ValidationError as error:
        cause = invalid_request(error, Recipe).message
        raise InvalidRequest(f"the recipe in {name} is damaged: {cause}", param="recipe") from None
    except (ValueError, struct.error, zlib.error) as error:
        raise InvalidRequest(f"the recipe in {name} is damaged: {error}.", param="recipe") from None


def parameters(recipe: Recipe) -> str:
    """The recipe as A1111's text: prompt, negative prompt, then one line of settings."""
    tags = [f"<lora:{adapter.name.partition('@')[0]}:{adapter.weight:g}>" for adapter in recipe.adapters]
    lines = [" ".join([recipe.prompt, *tags])]
    if recipe.negative_prompt:
        lines.append(f"Negative prompt: {recipe.negative_prompt}")
    settings: dict[str, object] = {
        "Steps": recipe.steps,
        "Sampler": _SAMPLERS[recipe.scheduler],
        "CFG scale": recipe.guidance_scale,
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.base.fingerprint.rpartition(":")[2][:10],
        "Model": recipe.base.id.rstrip("/").rpartition("/")[2],
        "Version": f"lorafleet {recipe.versions.get('lorafleet', '')}".rstrip(),
    }
    if recipe.step_reuse > 1:
        settings["Step reuse"] = recipe.step_reuse
    if recipe.start is not None:
        settings["Denoising strength"] = recipe.start.strength
    if recipe.adapters:
        hashes = (adapter.name.partition("@") for adapter in recipe.adapters)
        settings["Lora hashes"] = ", ".join(f"{name}: {version[:12]}" for name, _, version in hashes)
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in settings.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if set(value) & set(',:"\n') else value


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_PNG_BYTES + 1)
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}.", param="recipe") from None


def _recipe_texts(data: bytes) -> Iterator[str]:
    """The texts of all `lorafleet` iTXt chunks. PNG specification, third edition, sections 5.3 and 11.3.3.4."""
    at = len(_SIGNATURE)
    while at < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        if kind == b"iTXt" and body.startswith(CHUNK.encode() + b"\0"):
            (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
            if zlib.crc32(kind + body) != checksum:
                raise ValueError("its checksum is wrong")
            yield _text(body[len(CHUNK) + 1 :])
        at += length + 12


def _text(body: bytes) -> str:
    compressed, rest = body[:1] == b"\1", body[2:]
    text = rest.split(b"\0", 2)[2] if rest.count(b"\0") >= 2 else b""
    if compressed:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(text, MAX_RECIPE_BYTES + 1)
    if len(text) > MAX_RECIPE_BYTES:
        raise ValueError(f"it is longer than {MAX_RECIPE_BYTES >> 10} KiB")
    return text.decode("utf-8")
