"""Adapters in CPU memory, packed and ready to be copied: the tier between the disk and the device's slots."""

from collections import OrderedDict

from lorafleet.serve.engine.adapter_pack import Packed


class HostCache:
    """Packed adapters by key, the least recently used dropped first. Not locked: its owner's lock guards it."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[str, Packed] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> list[str]:
        """The most recently used last."""
        return list(self._entries)

    def get(self, key: str) -> Packed | None:
        if key in self._entries:
            self._entries.move_to_end(key)
        return self._entries.get(key)

    def put(self, key: str, packed: Packed) -> None:
        """Keeps it unless it alone is over the budget; whoever fills from a dropped one holds it."""
        self.drop(key)
        if packed.lines.nbytes > self.max_bytes:
            return
        self._entries[key] = packed
        self.bytes += packed.lines.nbytes
        while self.bytes > self.max_bytes:
            self.drop(next(iter(self._entries)))

    def drop(self, key: str) -> None:
        if (packed := self._entries.pop(key, None)) is not None:
            self.bytes -= packed.lines.nbytes
