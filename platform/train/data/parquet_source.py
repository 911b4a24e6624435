"""Pictures in parquet files: a column of bytes (or Hugging Face's struct of bytes and path) and one of captions."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from lorafleet.core.errors import DataUnreadable
from lorafleet.train.data.files import Files
from lorafleet.train.data.source import CAPTION_NAMES, Item, Source, captions_of

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE_NAMES: Final = ("image", "img", "jpg", "png", "webp", "bytes")
GROUPS_KEPT: Final = 2


class ParquetSource(Source):
    """One picture a row. Rows are read a row group at a time, in any order but fastest in theirs."""

    def __init__(self, files: Files, names: Sequence[str]) -> None:
        self.url = files.url
        self._files = files
        self._names = tuple(names)
        self._groups: dict[tuple[str, int], list[Any]] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[object, ...]:
        return ParquetSource, (self._files, self._names)

    def items(self) -> Sequence[Item]:
        items: list[Item] = []
        for name in self._names:
            with self._opened(name) as parquet:
                columns = parquet.schema_arrow.names
                image = next((column for column in IMAGE_NAMES if column in columns), None)
                texts = [column for column in CAPTION_NAMES if column in columns]
                if image is None or not texts:
                    raise DataUnreadable(
                        f"{name} needs a column {' or '.join(IMAGE_NAMES[:3])} of bytes and a column "
                        f"{' or '.join(CAPTION_NAMES[:3])}, its own are {', '.join(columns)}.",
                        param="data",
                    )
                number = 0
                for group in range(parquet.num_row_groups):
                    rows = parquet.read_row_group(group, columns=texts).to_pylist()
                    for row, values in enumerate(rows):
                        key = f"{name} row {number}"
                        captions = [caption for text in texts for caption in captions_of(values[text])]
                        if not captions:
                            raise DataUnreadable(f"{key} has no caption: fill its {' or '.join(texts)}.", param="data")
                        read = partial(self._read, name, group, row, image, key)
                        items.append(Item(key, tuple(dict.fromkeys(captions)), read))
                        number += 1
        if not items:
            raise DataUnreadable(f"{self.url} has parquet files without a row.", param="data")
        return items

    def _read(self, name: str, group: int, row: int, column: str, key: str) -> bytes:
        with self._lock:
            values = self._groups.get((name, group))
            if values is None:
                with self._opened(name) as parquet:
                    values = parquet.read_row_group(group, columns=[column]).column(0).to_pylist()
                while len(self._groups) >= GROUPS_KEPT:
                    del self._groups[next(iter(self._groups))]
                self._groups[name, group] = values
        value = values[row]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise DataUnreadable(
                f"{key} holds no picture's bytes in {column}: fill it or remove the row.", param="data"
            )
        return data

    @contextmanager
    def _opened(self, name: str) -> Iterator["ParquetFile"]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with self._files.open(name) as file:
            try:
                yield pq.ParquetFile(file)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise DataUnreadable(f"{name} is not a whole parquet file: {reason}", param="data") from error
