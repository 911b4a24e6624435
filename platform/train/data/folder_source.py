"""Pictures as files of a folder, with captions in metadata.jsonl, metadata.csv, or a .txt file beside each."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any, Final

from lorafleet.core.errors import DataUnreadable
from lorafleet.train.data.files import Files
from lorafleet.train.data.source import (
    CAPTION_NAMES,
    IMAGE_ENDINGS,
    OTHER_IMAGE_ENDINGS,
    Item,
    Source,
    captions_of,
)

METADATA: Final = ("metadata.jsonl", "metadata.csv")


class FolderSource(Source):
    """Files below the folder, those in folders of it too; the metadata file lies in the folder itself.

    A picture that several rows name has several captions.
    """

    def __init__(self, files: Files, names: Sequence[str]) -> None:
        self.url = files.url
        self._files = files
        self._names = tuple(names)

    def items(self) -> Sequence[Item]:
        pictures = [name for name in self._names if name.lower().endswith((*IMAGE_ENDINGS, *OTHER_IMAGE_ENDINGS))]
        metadata = [name for name in METADATA if name in self._names]
        if len(metadata) > 1:
            raise DataUnreadable(f"{self.url} has both {' and '.join(METADATA)}: keep one of them.", param="data")
        captions = self._from_rows(metadata[0]) if metadata else self._from_text_files(pictures)
        where = f"a row of {metadata[0]}" if metadata else "a .txt file of the same name"
        without = [name for name in pictures if not captions.get(name)]
        if without:
            others = f", like {len(without) - 1} others," if len(without) > 1 else ""
            raise DataUnreadable(f"{without[0]}{others} has no caption: give it one in {where}.", param="data")
        return [Item(name, tuple(captions[name]), partial(self._files.read, name)) for name in pictures]

    def _from_text_files(self, pictures: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Each line is a caption."""
        there = set(self._names)
        beside = {name: str(PurePosixPath(name).with_suffix(".txt")) for name in pictures}
        texts = self._files.read_all(sorted({text for text in beside.values() if text in there}))
        return {
            name: captions_of(_text(texts[text], text).splitlines()) for name, text in beside.items() if text in texts
        }

    def _from_rows(self, metadata: str) -> Mapping[str, Sequence[str]]:
        """Captions by file name, of the rows in their order."""
        text = _text(self._files.read(metadata), metadata)
        rows = _json_rows(text, metadata) if metadata.endswith(".jsonl") else _csv_rows(text, metadata)
        there = set(self._names)
        found: dict[str, list[str]] = defaultdict(list)
        for line, row in rows:
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise DataUnreadable(f"{metadata} line {line} has no file_name.", param="data")
            name = name.removeprefix("./")
            if name not in there:
                raise DataUnreadable(
                    f"{metadata} line {line} names {name}, which is not in {self.url}: correct file_name, a path below "
                    "that folder, or remove the line.",
                    param="data",
                )
            captions = [caption for key in CAPTION_NAMES for caption in captions_of(row.get(key))]
            found[name] += [caption for caption in captions if caption not in found[name]]
            if not found[name]:
                raise DataUnreadable(
                    f"{metadata} line {line}, {name}, has no caption: give it one as {' or '.join(CAPTION_NAMES[:3])}.",
                    param="data",
                )
        return found


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataUnreadable(f"{name} is not UTF-8 text: save it as such.", param="data") from None


def _json_rows(text: str, name: str) -> Sequence[tuple[int, Mapping[str, Any]]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataUnreadable(
                f'{name} line {number} is no JSON object such as {{"file_name": "1.png", "text": "a cat"}}.',
                param="data",
            )
        rows.append((number, row))
    return rows


def _csv_rows(text: str, name: str) -> Sequence[tuple[int, Mapping[str, Any]]]:
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise DataUnreadable(f"{name} is not CSV: {error}.", param="data") from None
    if "file_name" not in (reader.fieldnames or ()):
        raise DataUnreadable(
            f"{name} must begin with a line of column names such as file_name,text, the file's own are "
            f"{','.join(reader.fieldnames or ())}.",
            param="data",
        )
    return rows
