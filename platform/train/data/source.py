"""Where captioned pictures lie: a folder, parquet files or webdataset tars, on a disk or any fsspec URL."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lorafleet.core.errors import DataNotFound
from lorafleet.train.data.files import Files

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
# Pictures too, which are refused by name instead of being passed over in silence.
OTHER_IMAGE_ENDINGS = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".avif", ".jp2", ".jxl")
CAPTION_NAMES = ("text", "prompt", "caption", "captions")


@dataclass(frozen=True)
class Item:
    """One picture as it is stored, and its captions (at least one).

    `key` names it to people: a path below the source, a row, a member of a tar. `read` may be called from any thread
    and raises DataUnreadable or StorageUnavailable.
    """

    key: str
    captions: tuple[str, ...]
    read: Callable[[], bytes] = field(repr=False, compare=False)


class Source(ABC):
    """Captioned pictures in a stable order, the same in every process. Can be pickled."""

    url: str

    @abstractmethod
    def items(self) -> Sequence[Item]:
        """All items, in the order of their names; at least one. Reads the captions, no picture.

        Raises DataNotFound where there are no pictures, DataUnreadable for captions that are missing or damaged, and
        StorageUnavailable.
        """


def open_source(url: str, *, endpoint_url: str | None = None) -> Source:
    """A path or an fsspec URL of a folder or a single .parquet or .tar file; what lies there decides the kind.

    Raises DataNotFound, ConfigError or StorageUnavailable.
    """
    from lorafleet.train.data.folder_source import FolderSource
    from lorafleet.train.data.parquet_source import ParquetSource
    from lorafleet.train.data.tar_source import TarSource

    files = Files(url, endpoint_url)
    names = files.list()
    parquet = [name for name in names if name.endswith(".parquet")]
    tars = [name for name in names if name.endswith(".tar")]
    pictures = [name for name in names if name.lower().endswith((*IMAGE_ENDINGS, *OTHER_IMAGE_ENDINGS))]
    kinds = {"parquet files": parquet, "webdataset tars": tars, "pictures": pictures}
    found = [kind for kind, those in kinds.items() if those]
    if not found:
        raise DataNotFound(
            f"{url} holds no pictures: put PNG, JPEG or WebP files there with captions in metadata.jsonl, metadata.csv "
            "or .txt files, or parquet files, or webdataset tars.",
            param="data",
        )
    if len(found) > 1:
        raise DataNotFound(f"{url} holds {' and '.join(found)}: keep one kind in it.", param="data")
    if parquet:
        return ParquetSource(files, parquet)
    return TarSource(files, tars) if tars else FolderSource(files, names)


def captions_of(value: object) -> tuple[str, ...]:
    """The captions in a field of metadata: one text or a list of texts. Empty if there is none."""
    values = value if isinstance(value, list | tuple) else [value]
    texts = [text.strip() for text in values if isinstance(text, str)]
    return tuple(text for text in texts if text)
