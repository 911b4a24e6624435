"""From the font and Unicode's names to arrays: bitmaps, phrases with weights, and which pairs are held out."""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lorafleet.models.build import config

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")  # Debian's fonts-noto-color-emoji
NAMES = Path(__file__).parent / "emoji.json"
MIRRORED_GROUPS = ("animals-nature", "food-drink")  # no letters, no arrows: a mirror image is another pose


@dataclass(frozen=True)
class Emoji:
    """One emoji that both the font and the name list know."""

    codepoint: str
    name: str
    keywords: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Data:
    """What training sees. `bitmaps`: uint8 [N, 128, 128, 4], straight alpha; `held_out`: bool [N, colours]."""

    emoji: tuple[Emoji, ...]
    bitmaps: np.ndarray
    held_out: np.ndarray

    @property
    def phrases(self) -> list[list[tuple[str, float]]]:
        """For each emoji its phrases with sampling weights.

        The name weighs as much as all keywords together; a keyword shared by n emoji weighs 1/n, and one that is
        another emoji's own name (or a colour) is left to that.
        """
        names = {e.name for e in self.emoji} | set(config.COLOURS)
        shared = Counter(k for e in self.emoji for k in set(e.keywords))
        result = []
        for e in self.emoji:
            keywords = [(k, 1 / shared[k]) for k in e.keywords if k not in names]
            total = sum(w for _, w in keywords) or 1.0
            result.append([(e.name, 1.0), *((k, w / total) for k, w in keywords)])
        return result

    @property
    def mirrored(self) -> np.ndarray:
        """bool [N]: whether the emoji may be flipped left to right."""
        return np.array([e.group in MIRRORED_GROUPS for e in self.emoji])


def plain(text: str) -> str:
    """Lower case without the punctuation that nobody types."""
    text = text.lower().replace("’", "'")
    return " ".join("".join(c if c.isalnum() or c in "'-" else " " for c in text).split())


def read_names(path: Path = NAMES) -> list[Emoji]:
    rows = json.loads(path.read_text("utf-8"))
    return [Emoji(r["codepoint"], r["name"], tuple(r["keywords"]), r["group"]) for r in rows]


def write_names(emojibase_en: Path, emojibase_groups: Path, path: Path = NAMES) -> None:
    """Distil `emojibase-data`'s en/data.json and meta/groups.json to what is used here: one code point, no flags."""
    groups = json.loads(emojibase_groups.read_text("utf-8"))["groups"]
    rows = []
    for e in json.loads(emojibase_en.read_text("utf-8")):
        points = [p for p in e["hexcode"].split("-") if p != "FE0F"]
        if len(points) != 1 or "group" not in e:
            continue
        name = plain(e["label"])
        keywords = sorted(k for k in {plain(t) for t in e.get("tags", ())} - {name} if not k.isdigit() and k)
        rows.append(dict(codepoint=points[0], name=name, keywords=keywords, group=groups[str(e["group"])]))
    path.write_text("[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n]\n", "utf-8")


def prepare(font: Path, out: Path) -> Data:
    """Read the font's 128-px strikes and write `out` (npz). Needs fontTools."""
    from fontTools.ttLib import TTFont

    ttf = TTFont(font)
    glyphs, strike = ttf.getBestCmap(), ttf["CBDT"].strikeData[0]
    emoji, bitmaps, seen = [], [], set()
    for e in read_names():
        glyph = glyphs.get(int(e.codepoint, 16))
        if glyph not in strike or e.name in seen:
            continue
        seen.add(e.name)
        image = Image.open(io.BytesIO(strike[glyph].imageData)).convert("RGBA")  # 136 x 128, drawn in the middle
        left = (image.width - config.CANVAS_PX) // 2
        emoji.append(e)
        bitmaps.append(np.asarray(image.crop((left, 0, left + config.CANVAS_PX, config.CANVAS_PX))))
    pairs = len(emoji) * len(config.COLOURS)
    held_out = np.zeros(pairs, dtype=bool)
    held_out[np.random.default_rng(config.SEED).permutation(pairs)[: int(pairs * config.HELD_OUT_SHARE)]] = True
    data = Data(tuple(emoji), np.stack(bitmaps), held_out.reshape(len(emoji), -1))
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out, codepoints=np.array([e.codepoint for e in emoji]), bitmaps=data.bitmaps, held_out=data.held_out
    )
    return data


def load(path: Path) -> Data:
    """Read what `prepare` wrote."""
    arrays = np.load(path)
    known = {e.codepoint: e for e in read_names()}
    return Data(tuple(known[c] for c in arrays["codepoints"]), arrays["bitmaps"], arrays["held_out"])
