"""Makes the sample sets from an npm package of emoji drawings:

    npm pack @iconify-json/noto@1.2.9
    (unpack it)
    pip install resvg-py==0.5.0
    python samples/build.py noto-sticker FOLDER/package
    python samples/build.py noto-spotlight FOLDER/package

Pictures are 128x128, the embedded base's own size: a drawing over one of its background colours in one finish, with
captions of its own form. `subjects.json` says which emoji go over which colour; no emoji of `held_out` is in `train`.
"""

import argparse
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from lorafleet.models.build.captions import canonical, indefinite
from lorafleet.models.build.config import CANVAS_PX, COLOURS
from lorafleet.models.build.data import Emoji, read_names

HERE = Path(__file__).parent
SUBJECTS = HERE / "subjects.json"
SECOND = ("an emoji of {x} on a {c} background", "a picture of {x} on a {c} background", "{x}, {c} background")
FINER = 3
"""Pictures are drawn in so many times more pixels a side, then averaged."""
SIDE = CANVAS_PX * FINER

Finish = Callable[[Image.Image], list[Image.Image]]
"""From a layer that holds the drawing to the layers that go below it, bottom first."""


@dataclass(frozen=True)
class Style:
    """`extents`: of the drawing's longer side, share of the canvas; `reach`: how far to the right and down it may lie,
    share of the free room; `margin_px`: room that the finish needs around it."""

    finish: Finish
    extents: tuple[float, float]
    reach: float
    margin_px: float


def sticker(layer: Image.Image, edge_px: float = 3.5, drop_px: int = 3) -> list[Image.Image]:
    """A white edge all around, cut out and lying on the ground: a soft shadow below."""
    cut = _grown(layer.getchannel("A"), round(edge_px * FINER))
    shadow = Image.new("L", cut.size)
    shadow.paste(cut, (drop_px * FINER * 2 // 3, drop_px * FINER))
    shadow = shadow.filter(ImageFilter.GaussianBlur(2 * FINER))
    return [_filled((0, 0, 0), shadow.point(lambda value: value * 55 // 100)), _filled((255, 255, 255), cut)]


def spotlight(layer: Image.Image, strength: float = 0.6, radius: float = 0.62) -> list[Image.Image]:
    """A glow of white light behind, from the middle of the canvas; `radius` is where it ends, as a share of a side."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    light = np.clip(1 - np.hypot(x, y) / radius, 0, 1) * strength
    return [_filled((255, 255, 255), Image.fromarray((255 * light).astype(np.uint8)))]


STYLES = {
    "noto-sticker": Style(sticker, extents=(0.72, 0.98), reach=1.0, margin_px=5),
    "noto-spotlight": Style(spotlight, extents=(0.62, 0.86), reach=1.0, margin_px=5),
}


class Package:
    """Icons of an Iconify package, by code point."""

    def __init__(self, folder: Path) -> None:
        self._names = json.loads((folder / "chars.json").read_text("utf-8"))
        self._icons = json.loads((folder / "icons.json").read_text("utf-8"))

    def drawing(self, emoji: Emoji) -> Image.Image | None:
        """RGBA without empty margins; None where the package has none."""
        from resvg_py import svg_to_bytes

        point = emoji.codepoint.lower()
        name = self._names.get(point) or self._names.get(f"{point}-fe0f")
        if name not in self._icons["icons"]:
            return None
        body = self._icons["icons"][name]["body"]
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {self._icons["width"]} {self._icons["height"]}">{body}</svg>'
        )
        image = Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, width=512, height=512))).convert("RGBA")
        return image.crop(image.getchannel("A").getbbox())


def draw(drawing: Image.Image, colour: str, style: Style, chance: random.Random) -> Image.Image:
    """RGB, the drawing somewhere on the canvas."""
    margin = round(style.margin_px * FINER)
    room = SIDE - 2 * margin
    factor = chance.uniform(*style.extents) * room / max(drawing.size)
    width, height = (max(1, round(side * factor)) for side in drawing.size)
    layer = Image.new("RGBA", (SIDE, SIDE))
    place = tuple(margin + chance.randint(0, int((room - side) * style.reach)) for side in (width, height))
    layer.alpha_composite(drawing.resize((width, height), Image.Resampling.LANCZOS), place)
    canvas = Image.new("RGBA", (SIDE, SIDE), COLOURS[colour])
    for each in [*style.finish(layer), layer]:
        canvas.alpha_composite(each)
    return canvas.convert("RGB").resize((CANVAS_PX, CANVAS_PX), Image.Resampling.BOX)


def _grown(mask: Image.Image, radius: int) -> Image.Image:
    """The mask, wider by a disc: the highest value of its copies around two circles."""
    values = np.asarray(mask)
    wide, grown = np.pad(values, radius), values.copy()
    for ring, copies in ((radius, 48), (radius // 2, 16)):
        for angle in np.linspace(0, 2 * np.pi, copies, endpoint=False):
            x, y = radius + round(ring * np.cos(angle)), radius + round(ring * np.sin(angle))
            np.maximum(grown, wide[y : y + SIDE, x : x + SIDE], out=grown)
    return Image.fromarray(grown)


def _filled(colour: tuple[int, int, int], mask: Image.Image) -> Image.Image:
    layer = Image.new("RGBA", mask.size, colour)
    layer.putalpha(mask)
    return layer


def captions(emoji: Emoji, colour: str, chance: random.Random) -> list[str]:
    other = chance.choice(SECOND).format(x=indefinite(emoji.name), c=colour)
    return [canonical(emoji.name, colour), other]


def build(name: str, package: Package, subjects: Mapping[str, Mapping[str, str]]) -> None:
    """`subjects`: for `train` and `held_out` colours by code point."""
    known = {emoji.codepoint: emoji for emoji in read_names()}
    for part, colours in subjects.items():
        folder = HERE / name / part
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for codepoint, colour in colours.items():
            emoji = known[codepoint]
            picture, chance = picture_of(name, package, emoji, colour)
            assert picture is not None
            file = f"{emoji.name.replace(' ', '-').replace(chr(39), '')}.png"
            picture.save(folder / file, optimize=True)
            rows.append({"file_name": file, "text": captions(emoji, colour, chance)})
        rows.sort(key=lambda row: str(row["file_name"]))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def picture_of(name: str, package: Package, emoji: Emoji, colour: str) -> tuple[Image.Image | None, random.Random]:
    """One emoji over one colour in the style, None without a drawing; and what is left of its chance."""
    chance = random.Random(f"{name} {emoji.codepoint} {colour}")  # noqa: S311 # guards nothing
    drawing = package.drawing(emoji)
    return drawing and draw(drawing, colour, STYLES[name], chance), chance


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("style", choices=STYLES)
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    given = parser.parse_args()
    build(given.style, Package(given.package), json.loads(SUBJECTS.read_text("utf-8"))[given.style])


if __name__ == "__main__":
    main()
