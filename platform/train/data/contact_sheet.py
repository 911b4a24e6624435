"""A picture of pictures: what training sees of a set, with captions beneath, problems marked."""

from typing import Final

from PIL import Image, ImageDraw, ImageFont

from lorafleet.train.data.inspection import Inspection

TILE_PX: Final = 160
MARGIN_PX: Final = 8
TEXT_PX: Final = 12
TEXT_LINES: Final = 3
COLUMNS: Final = 8
MAX_TILES: Final = 96
BACKGROUND, INK, FAINT, PROBLEM = "#ffffff", "#202124", "#70757a", "#c5221f"


def contact_sheet(found: Inspection) -> Image.Image:
    """RGB: the pictures that have a tile, each as its bucket cuts it out."""
    shown = [(each, each.tile) for each in found.seen if each.tile is not None]
    columns = min(COLUMNS, max(1, len(shown)))
    rows = -(-len(shown) // columns)
    cell = (TILE_PX + 2 * MARGIN_PX, TILE_PX + 2 * MARGIN_PX + (TEXT_LINES + 1) * (TEXT_PX + 3))
    header = TEXT_PX + 3 * MARGIN_PX
    sheet = Image.new("RGB", (columns * cell[0], header + rows * cell[1]), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(TEXT_PX)
    title = f"{len(shown)} of {len(found.seen)} pictures, {len(found.bad)} bad"
    draw.text((MARGIN_PX, MARGIN_PX), _fitting(draw, title, font, sheet.width - 2 * MARGIN_PX), INK, font)
    for number, (each, tile) in enumerate(shown):
        left = number % columns * cell[0] + MARGIN_PX
        top = header + number // columns * cell[1]
        place = (left + (TILE_PX - tile.width) // 2, top + (TILE_PX - tile.height) // 2)
        sheet.paste(tile, place)
        draw.rectangle((*place, place[0] + tile.width - 1, place[1] + tile.height - 1), outline=FAINT)
        problems = [f"cut {each.cut_share:.0%}"] * (each.cut_share >= 0.2) + ["enlarged"] * each.is_enlarged
        line = top + TILE_PX + MARGIN_PX // 2
        about = f"{each.size[0]}x{each.size[1]} in {each.bucket[0]}x{each.bucket[1]} {' '.join(problems)}"
        draw.text((left, line), _fitting(draw, about, font, TILE_PX), PROBLEM if problems else FAINT, font)
        for text in _wrapped(draw, each.captions[0], font):
            line += TEXT_PX + 3
            draw.text((left, line), text, INK, font)
    return sheet


def _wrapped(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """At most TEXT_LINES lines."""
    lines: list[str] = []
    words = text.split()
    while words and len(lines) < TEXT_LINES:
        count = next((n for n in range(len(words), 0, -1) if draw.textlength(" ".join(words[:n]), font) <= TILE_PX), 1)
        is_last = len(lines) == TEXT_LINES - 1
        lines.append(_fitting(draw, " ".join(words if is_last else words[:count]), font, TILE_PX))
        words = words[count:]
    return lines


def _fitting(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width_px: int
) -> str:
    if draw.textlength(text, font) <= width_px:
        return text
    while text and draw.textlength(text + "…", font) > width_px:
        text = text[:-1]
    return text + "…"
