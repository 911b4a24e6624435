"""Makes the sample sets from two npm packages of Microsoft's Fluent emoji (MIT):

    npm pack @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-high-contrast@1.2.6
    (unpack each)
    pip install resvg-py==0.5.0
    python samples/build.py fluent-3d FOLDER/package
    python samples/build.py fluent-ink FOLDER/package

Pictures are 128x128, the embedded base's own size, one emoji over one of its background colours, with captions of its
own form. No emoji of `held_out` is in `train`.
"""

import io
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lorafleet.models.build.captions import canonical, indefinite
from lorafleet.models.build.config import CANVAS_PX, COLOURS
from lorafleet.models.build.data import Emoji, read_names

TRAIN_A_COLOUR, HELD_OUT_A_COLOUR = 6, 2
GROUPS = ("animals-nature", "food-drink", "objects", "travel-places", "activities")
# Colours would contradict the background's; a dozen hours look alike; the rest is a matter of taste.
AVOIDED = {*COLOURS, "o'clock", "oclock", "clock", "thirty", "bikini", "kaaba", "underwear", "knife", "gun", "pistol"}
# Extent of the emoji on the canvas: the upper part of what the base was taught (models/build/render.py).
SCALES = (0.72, 0.98)
SECOND = ("an emoji of {x} on a {c} background", "a picture of {x} on a {c} background", "{x}, {c} background")


@dataclass(frozen=True)
class Style:
    """`open_emoji` gives a square RGBA drawing, or None where the package has none."""

    open_emoji: Callable[[Path, str], Image.Image | None]
    colours: tuple[str, ...]


def open_3d(package: Path, codepoint: str) -> Image.Image | None:
    file = package / "assets" / f"{codepoint.lower()}.webp"
    return Image.open(file).convert("RGBA") if file.exists() else None


def open_ink(package: Path, codepoint: str) -> Image.Image | None:
    from resvg_py import svg_to_bytes

    names = json.loads((package / "chars.json").read_text("utf-8"))
    icons = json.loads((package / "icons.json").read_text("utf-8"))
    name = names.get(codepoint.lower())
    if name not in icons["icons"]:
        return None
    body = icons["icons"][name]["body"].replace("currentColor", "#141414")
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    return Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, width=512, height=512))).convert("RGBA")


STYLES = {
    "fluent-3d": Style(open_3d, tuple(COLOURS)),
    "fluent-ink": Style(open_ink, tuple(colour for colour in COLOURS if colour not in ("black", "brown"))),
}


def draw(emoji: Image.Image, colour: str, chance: random.Random) -> Image.Image:
    """RGB, the emoji without its margins somewhere on the canvas."""
    emoji = emoji.crop(emoji.getchannel("A").getbbox())
    extent = chance.uniform(*SCALES) * CANVAS_PX
    factor = extent / max(emoji.size)
    small = emoji.resize((max(1, round(emoji.width * factor)), max(1, round(emoji.height * factor))), Image.LANCZOS)
    canvas = Image.new("RGBA", (CANVAS_PX, CANVAS_PX), COLOURS[colour])
    place = (chance.randint(0, CANVAS_PX - small.width), chance.randint(0, CANVAS_PX - small.height))
    canvas.alpha_composite(small, place)
    return canvas.convert("RGB")


def captions(emoji: Emoji, colour: str, chance: random.Random) -> list[str]:
    other = chance.choice(SECOND).format(x=indefinite(emoji.name), c=colour)
    return [canonical(emoji.name, colour), other]


def build(style_name: str, package: Path, out: Path) -> None:
    style, chance = STYLES[style_name], random.Random("fluent")  # noqa: S311 # guards nothing
    names = [
        emoji for emoji in read_names() if emoji.group in GROUPS and not set(re.split("[ -]", emoji.name)) & AVOIDED
    ]
    chance.shuffle(names)
    drawable = ((emoji, drawing) for emoji in names if (drawing := style.open_emoji(package, emoji.codepoint)))
    for part, count in (("train", TRAIN_A_COLOUR), ("held_out", HELD_OUT_A_COLOUR)):
        folder = out / part
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(count * len(style.colours)):
            emoji, drawing = next(drawable)
            colour = style.colours[number % len(style.colours)]
            file = f"{emoji.name.replace(' ', '-').replace(chr(39), '')}.png"
            draw(drawing, colour, chance).save(folder / file, optimize=True)
            rows.append({"file_name": file, "text": captions(emoji, colour, chance)})
        rows.sort(key=lambda row: str(row["file_name"]))
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    build(sys.argv[1], Path(sys.argv[2]), Path(__file__).parent / sys.argv[1])
