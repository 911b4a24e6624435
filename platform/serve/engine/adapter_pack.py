"""How an adapter lies in its slot, and which adapters fit: the same for CPU memory and for the device."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from lorafleet.core.errors import AdapterIncompatible
from lorafleet.sdxl.lora import Adapter
from lorafleet.sdxl.lora_keys import named

_ALIGNMENT: Final = 8  # elements: 16 bytes in bfloat16, what vector loads want


@dataclass(frozen=True)
class Place:
    """Where one module's values lie within a line: columns [a, a + in) and [b, b + out)."""

    a: int
    in_features: int
    b: int
    out_features: int


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter as a slot holds it. `lines`: [adapter.rank, width], on the CPU.

    `changes_text`: it has modules in a text encoder, so that prompts are other embeddings with it.
    """

    lines: torch.Tensor
    changes_text: bool


class SlotLayout:
    """The places of all modules. `width`: elements of a line. Immutable."""

    def __init__(self, linears: Mapping[str, tuple[int, int]], fingerprint: str, max_rank: int) -> None:
        """`linears`: (out, in) features by name. `fingerprint`: the base's."""
        at = 0
        places: dict[str, Place] = {}
        for name, (out_features, in_features) in linears.items():
            b = at + _aligned(in_features)
            places[name] = Place(at, in_features, b, out_features)
            at = b + _aligned(out_features)
        self.places: Mapping[str, Place] = places
        self.width = at
        self._fingerprint = fingerprint
        self._max_rank = max_rank

    def pack(self, adapter: Adapter, dtype: torch.dtype, *, pinned: bool = False) -> Packed:
        """The adapter in `dtype`. alpha / rank goes into B in float32 before that is cast.

        Raises AdapterIncompatible for another base, modules, shapes or rank, and for numbers that are not finite.
        """
        self._check(adapter)
        lines = torch.zeros(adapter.rank, self.width, dtype=dtype, pin_memory=pinned)
        for name, module in adapter.modules.items():
            place = self.places[name]
            lines[: module.rank, place.a : place.a + place.in_features] = module.a
            b = module.b.float() * module.scale
            lines[: module.rank, place.b : place.b + place.out_features] = b.T
        if not bool(torch.isfinite(lines).all()):
            raise AdapterIncompatible(
                f"the adapter holds NaN, infinity or numbers too large for {dtype}: train it again"
            )
        return Packed(lines, any(not name.startswith("unet.") for name in adapter.modules))

    def _check(self, adapter: Adapter) -> None:
        fingerprint = adapter.base_fingerprint
        if fingerprint is not None and fingerprint != self._fingerprint:
            raise AdapterIncompatible(
                f"the adapter was trained on another base (fingerprint {fingerprint[:12]}, this one is "
                f"{self._fingerprint[:12]}): serve it on its own base or train it again"
            )
        if not adapter.modules:
            raise AdapterIncompatible("the adapter changes no module: train it again")
        if unknown := [name for name in adapter.modules if name not in self.places]:
            raise AdapterIncompatible(
                f"the adapter changes modules that take no adapters here: {named(unknown)}; widen the bank's targets"
            )
        if adapter.rank > self._max_rank:
            raise AdapterIncompatible(
                f"the adapter has rank {adapter.rank}, the bank serves up to {self._max_rank}: raise max_rank"
            )
        for name, module in adapter.modules.items():
            place = self.places[name]
            shapes = tuple(module.a.shape), tuple(module.b.shape)
            if shapes != ((module.rank, place.in_features), (place.out_features, module.rank)):
                raise AdapterIncompatible(
                    f"{named([name])} is {shapes[0]} and {shapes[1]}, the base has {place.in_features} inputs and "
                    f"{place.out_features} outputs there: use an adapter trained on it"
                )


def _aligned(features: int) -> int:
    return -(-features // _ALIGNMENT) * _ALIGNMENT
