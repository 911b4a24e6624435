"""Pictures in webdataset tars: members of one name, the picture and its caption as .txt or .json."""

import json
import tarfile
from collections.abc import Sequence
from functools import partial

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

MAX_TEXT_BYTES = 1 << 20


class TarSource(Source):
    """Members are found once, by the tars' headers; pictures are then read by their place, nothing is unpacked."""

    def __init__(self, files: Files, names: Sequence[str]) -> None:
        self.url = files.url
        self._files = files
        self._names = tuple(names)

    def items(self) -> Sequence[Item]:
        items = [item for name in self._names for item in self._items_of(name)]
        if not items:
            raise DataUnreadable(f"{self.url} has tars without a picture.", param="data")
        return items

    def _items_of(self, name: str) -> list[Item]:
        pictures: dict[str, tuple[str, int, int]] = {}
        captions: dict[str, list[str]] = {}
        with self._files.open(name) as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        stem, ending = _parts(member.name)
                        if not member.isfile():
                            continue
                        if ending in (*IMAGE_ENDINGS, *OTHER_IMAGE_ENDINGS):
                            pictures[stem] = (member.name, member.offset_data, member.size)
                        elif ending in (".txt", ".json") and member.size <= MAX_TEXT_BYTES:
                            content = tar.extractfile(member)
                            assert content is not None, "a plain file"
                            captions.setdefault(stem, []).extend(_captions(content.read(), name, member.name))
            except tarfile.TarError as error:
                raise DataUnreadable(f"{name} is not a whole, uncompressed tar: {error}.", param="data") from error
        items = []
        for stem, (member_name, start, size) in pictures.items():
            key = f"{name}/{member_name}"
            if not captions.get(stem):
                raise DataUnreadable(f"{key} has no caption: add {stem}.txt or {stem}.json beside it.", param="data")
            read = partial(self._files.read, name, start, start + size)
            items.append(Item(key, tuple(dict.fromkeys(captions[stem])), read))
        return items


def _parts(name: str) -> tuple[str, str]:
    """webdataset's way: the key ends at the first dot of the file's name."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}{slash}{stem}", f".{ending.lower()}"


def _captions(data: bytes, tar: str, member: str) -> tuple[str, ...]:
    try:
        text = data.decode("utf-8-sig")
        if member.endswith(".txt"):
            return captions_of(text.splitlines())
        fields = json.loads(text)
    except ValueError:
        raise DataUnreadable(
            f"{tar}/{member} is not UTF-8 text or not JSON: make the tar anew.", param="data"
        ) from None
    if not isinstance(fields, dict):
        return captions_of(fields)
    return tuple(caption for key in CAPTION_NAMES for caption in captions_of(fields.get(key)))
