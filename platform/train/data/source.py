"""Where captioned pictures lie: a folder, parquet files or webdataset tars, on a disk or any fsspec URL."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


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
        """All items, in the order of their names. Reads the captions, no picture.

        Raises DataNotFound where there are no pictures, DataUnreadable for captions that are missing or damaged, and
        StorageUnavailable.
        """


def open_source(url: str, *, endpoint_url: str | None = None) -> Source:
    """A path or an fsspec URL of a folder or a single .parquet or .tar file; what lies there decides the kind.

    Raises DataNotFound, ConfigError or StorageUnavailable.
    """
    raise NotImplementedError
