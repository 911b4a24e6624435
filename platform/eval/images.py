"""Pictures under the hash of all that decides them: none is made twice, and a half-written one is never seen."""

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lorafleet.core.errors import DataUnreadable, StorageUnavailable
from lorafleet.core.pictures import BadPicture, decode, on_white
from lorafleet.core.png import encode_png

CHUNK: Final = "lorafleet-eval"
MAX_PIXELS: Final = 64_000_000


@dataclass(frozen=True)
class Drawn:
    """One picture as it came from its maker. `seconds`: its share of the time its batch took, or a request's."""

    image: Image.Image
    seconds: float


class ImageStore:
    """PNG files in `folder`, by key (64 hex digits). Safe for several processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.png"

    def __contains__(self, key: object) -> bool:
        return self.path(str(key)).is_file()

    def put(self, key: str, drawn: Drawn, about: Mapping[str, Any]) -> None:
        """Whole or not at all; the first one stays. Raises StorageUnavailable."""
        info = PngInfo()
        info.add_itxt(CHUNK, json.dumps({**about, "seconds": drawn.seconds}, ensure_ascii=False, default=str))
        data = encode_png(drawn.image, info)
        path = self.path(key)
        if path.is_file():
            return
        write_atomically(path, data)

    def seconds(self, key: str) -> float:
        """What `put` was told."""
        with Image.open(self.path(key)) as image:
            about = json.loads(image.info[CHUNK])
        return float(about["seconds"])


def read_picture(path: Path) -> Image.Image:
    """RGB, upright, on white where it is transparent. Raises DataUnreadable naming the file."""
    try:
        return on_white(decode(path.read_bytes(), MAX_PIXELS))
    except BadPicture as error:
        raise DataUnreadable(f"{path} {error}.") from error
    except OSError as error:
        raise DataUnreadable(f"{path} cannot be read: {error.strerror}.") from error


def write_atomically(path: Path, data: bytes) -> None:
    """Whole or not at all. Raises StorageUnavailable."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                Path(name).unlink()
            raise
    except OSError as error:
        raise StorageUnavailable(f"{path} cannot be written: {error.strerror}.") from error
