"""Folders of ready pictures with captions: what a closed system drew, or real ones."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from lorafleet.core.errors import DataNotFound, DataUnreadable

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp")
MAX_METADATA_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class Captioned:
    """A picture's file and its captions, of which there may be none."""

    file: Path
    captions: tuple[str, ...]


def read_captioned(folder: Path) -> list[Captioned]:
    """All pictures of a folder by name; captions from `metadata.jsonl` or `metadata.csv` (columns file_name and text),
    else from a `.txt` beside each. Raises DataNotFound, or DataUnreadable naming the line or file.
    """
    if not folder.is_dir():
        raise DataNotFound(f"there is no folder {folder} of pictures.")
    listed: dict[str, list[str]] = defaultdict(list)
    for name in ("metadata.jsonl", "metadata.csv"):
        if (folder / name).is_file():
            for file_name, captions in _metadata(folder / name):
                listed[file_name] += captions
    if listed:
        missing = [name for name in listed if not (folder / name).is_file()]
        if missing:
            raise DataUnreadable(f"{folder} lacks {_some(missing)}, which its metadata names.")
        return [Captioned(folder / name, tuple(listed[name])) for name in sorted(listed)]
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataNotFound(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return [Captioned(file, _sidecar(file)) for file in files]


def _metadata(path: Path) -> Iterator[tuple[str, list[str]]]:
    """File names and captions, line by line."""
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise DataUnreadable(f"{path} is larger than {MAX_METADATA_BYTES >> 20} MiB.")
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataUnreadable(f"{path} cannot be read: {error}.") from error
    rows: list[Any] = list(csv.DictReader(lines)) if path.suffix == ".csv" else []
    for number, line in enumerate(lines, 1):
        if path.suffix == ".jsonl" and line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataUnreadable(f"{path} line {number} is not JSON: {error}.") from None
    for number, row in enumerate(rows, 1):
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        captions = [text] if isinstance(text, str) else text
        if not isinstance(name, str) or not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise DataUnreadable(f"{path} entry {number} needs file_name and text.")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataUnreadable(f"{path} entry {number} names a file outside of its folder: {name}.")
        yield name, [caption.strip() for caption in captions]


def _sidecar(file: Path) -> tuple[str, ...]:
    sidecar = file.with_suffix(".txt")
    try:
        return (sidecar.read_text("utf-8").strip(),) if sidecar.is_file() else ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataUnreadable(f"{sidecar} cannot be read: {error}.") from error


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{rest}"
