"""Pictures that came in from outside: checked before they are decoded, turned upright, brought to the size to draw.

Everything here computes; call it off the event loop.
"""

import base64
import binascii
import hashlib
import io
import math
from dataclasses import dataclass, field

from PIL import Image

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.pictures import SPOILED, BadPicture, decode, on_white
from lorafleet.core.recipe import RecipeStart
from lorafleet.sdxl.limits import BaseLimits
from lorafleet.serve.work import Start


@dataclass(frozen=True)
class Upload:
    """A picture to begin with, as it came, and how to begin. The names are those that the caller knows them by.

    `is_mask_alpha`: what is transparent in the mask is drawn anew, or in the picture itself if there is no mask
    (OpenAI's way); else what is white in the mask is (diffusers' way).
    """

    image: bytes = field(repr=False)
    mask: bytes | None = field(default=None, repr=False)
    strength: float = 0.8
    is_mask_alpha: bool = False
    image_name: str = "init_image"
    mask_name: str = "mask"


def from_base64(text: str, name: str) -> bytes:
    """Also a data URL's. Raises InvalidRequest."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidRequest(f"{name} {SPOILED} in base64", param=name) from None


def prepare(upload: Upload, request: GenerationRequest, limits: BaseLimits) -> tuple[GenerationRequest, Start]:
    """The request with a size, the picture's proportions if it names none, and what to start from at that size.

    Raises InvalidRequest, naming the picture at fault.
    """
    image = _decode(upload.image, upload.image_name)
    mask = None if upload.mask is None else _decode(upload.mask, upload.mask_name)
    if mask is not None and mask.size != image.size:
        raise InvalidRequest(
            f"{upload.mask_name} must be as large as {upload.image_name}, {image.width}x{image.height} pixels, "
            f"got {mask.width}x{mask.height}",
            param=upload.mask_name,
        )
    if request.width is None and request.height is None:
        width, height = _fitting(image.width, image.height, limits)
        request = request.model_copy(update={"width": width, "height": height})
    limits.check(request)
    size = limits.size_of(request)
    drawn_anew = _drawn_anew(image, mask, upload)
    if drawn_anew is not None:
        drawn_anew = drawn_anew.resize(size, Image.Resampling.LANCZOS)
        if drawn_anew.getextrema()[1] < 128:  # type: ignore[operator] # one band: two numbers
            what = "transparent" if upload.is_mask_alpha else "white"
            raise InvalidRequest(
                f"{upload.mask_name} has no {what} area to draw anew at {size[0]}x{size[1]} pixels",
                param=upload.mask_name,
            )
    # diffusers' image processor scales in the same way, and leaves alone what has the size already
    pixels = on_white(image).resize(size, Image.Resampling.LANCZOS)
    strength = max(upload.strength, (1 + 1e-9) / request.steps)  # at least one step is taken
    recipe = RecipeStart(
        image=_digest(pixels),
        mask=None if drawn_anew is None else _digest(drawn_anew),
        strength=min(strength, 1.0),
    )
    return request, Start(_png(pixels), None if drawn_anew is None else _png(drawn_anew), recipe)


def enlarge(png: bytes, size: tuple[int, int]) -> bytes:
    """A preview at the size of the image."""
    with Image.open(io.BytesIO(png)) as image:
        return _png(image.resize(size, Image.Resampling.BICUBIC))


def _decode(data: bytes, name: str) -> Image.Image:
    try:
        return decode(data)
    except BadPicture as error:
        raise InvalidRequest(f"{name} {error}", param=name) from error


def _drawn_anew(image: Image.Image, mask: Image.Image | None, upload: Upload) -> Image.Image | None:
    """Grey, white where to draw; None: everywhere."""
    if not upload.is_mask_alpha:
        return None if mask is None else mask.convert("RGB").convert("L")
    carrier = image if mask is None else mask
    if carrier.mode != "RGBA":
        if mask is None:
            return None
        raise InvalidRequest(f"{upload.mask_name} must have transparent areas: these are drawn anew", param="mask")
    is_transparent = carrier.getchannel("A").point(lambda alpha: 255 if alpha == 0 else 0)
    if mask is None and not is_transparent.getbbox():
        return None
    return is_transparent


def _fitting(width: int, height: int, limits: BaseLimits) -> tuple[int, int]:
    """The base's own area in these proportions, as far as its grid and limits let it be."""
    scale = math.sqrt(limits.default_width_px * limits.default_height_px / (width * height))
    fitting = []
    for side in (width, height):
        on_grid = round(side * scale / limits.grid_px) * limits.grid_px
        fitting.append(min(max(on_grid, limits.min_side_px), limits.max_side_px))
    return fitting[0], fitting[1]


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
