"""The embedded base, and small captioned pictures."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from PIL import Image

from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig

MakePictures = Callable[..., Path]


@pytest.fixture(scope="session")
def emojixl() -> Base:
    return load_base(BaseConfig(device="cpu"))


def picture(number: int, size: tuple[int, int] = (128, 128)) -> Image.Image:
    """No two numbers look alike, nor do left and right, nor top and bottom."""
    red = Image.linear_gradient("L").resize(size)
    green = Image.linear_gradient("L").rotate(90).resize(size)
    blue = Image.new("L", size, 37 * number % 256)
    image = Image.merge("RGB", (red, green, blue))
    image.paste((255, 255, 255), (2 + 5 * (number % 20), 2, 12 + 5 * (number % 20), 12))
    return image


@pytest.fixture
def make_pictures(tmp_path: Path) -> MakePictures:
    """Writes a folder of PNGs 0.png, 1.png, ... with one caption each in metadata.jsonl."""

    def make(sizes: Sequence[tuple[int, int]] = ((128, 128),) * 3, name: str = "pictures") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = []
        for number, size in enumerate(sizes):
            picture(number, size).save(folder / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": f"a thing, number {number}, red, round"}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        return folder

    return make
