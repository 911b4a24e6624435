"""Reads adapter files, which strangers made: everything is checked from the header before a tensor is read."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from lorafleet.core.errors import AdapterIncompatible, AdapterUnreadable
from lorafleet.sdxl.lora import MAX_HEADER_BYTES, MAX_RANK, Adapter, LowRank
from lorafleet.sdxl.lora_alpha import header_alphas
from lorafleet.sdxl.lora_keys import ModuleKeys, named, sort_keys
from lorafleet.sdxl.lora_targets import Targets

_FLOATS: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SCALARS: Final = {**_FLOATS, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32}
_PICKLE_NAMES: Final = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"})


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_adapter(path: Path, targets: Targets) -> Adapter:
    """The adapter in a safetensors file in diffusers', PEFT's or kohya's format, checked against the base.

    Alphas come from `.alpha` tensors, else from the header, else from PEFT's `adapter_config.json` beside an
    `adapter_model.safetensors`; where none says, alpha is the rank, as all three formats have it. At most
    `MAX_HEADER_BYTES` and what the base's own shapes at rank 128 take are allocated, whatever the file claims.

    Raises AdapterUnreadable (pickle, damage, other methods, unknown keys) or AdapterIncompatible (other base,
    modules, shapes or a rank above 128), each one sentence naming the keys. Safe for several threads.
    """
    if path.suffix.lower() in _PICKLE_NAMES:
        raise AdapterUnreadable(f"{path.name} is a pickle, which can run code and is not read: {_CONVERT}")
    try:
        with path.open("rb") as file:
            entries, metadata, start = _read_header(file, path.name)
            modules = sort_keys(entries, targets)
            for name, module in modules.items():
                _check_shapes(module, entries, targets.linears[name])
            about = _about(metadata)
            fingerprint = about.get("base_fingerprint")
            if fingerprint is not None and fingerprint != targets.fingerprint:
                raise AdapterIncompatible(
                    f"the adapter was trained on another base (fingerprint {str(fingerprint)[:12]}, this one is "
                    f"{targets.fingerprint[:12]}): serve it on its own base or train it again"
                )
            ranks = {name: entries[module.keys["a"]].shape[0] for name, module in modules.items()}
            alphas = header_alphas(metadata, path, ranks)
            adapter = Adapter(
                {name: _load(file, start, module, entries, alphas.get(name)) for name, module in modules.items()},
                name=str(about.get("name", "")),
                trigger_words=tuple(str(word) for word in about.get("trigger_words", ())),
                base_fingerprint=fingerprint,
            )
    except OSError as error:
        raise AdapterUnreadable(f"{path.name} cannot be read: {error.strerror}") from error
    promised = about.get("tensors_sha256")
    if promised is not None and promised != adapter.digest():
        raise AdapterUnreadable(f"{path.name} is damaged: its tensors are not those its header has the hash of")
    return adapter


_CONVERT: Final = "convert it to safetensors"


def _read_header(file: BinaryIO, name: str) -> tuple[dict[str, _Entry], dict[str, str], int]:
    """Entries, metadata and the offset of the data in bytes."""
    size = file.seek(0, 2)
    file.seek(0)
    first = file.read(9)
    header_bytes = struct.unpack("<Q", first[:8])[0] if len(first) == 9 else 0
    if first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] in b"\2\3\4\5" and first[8:] != b"{"):
        raise AdapterUnreadable(f"{name} is a pickle, which can run code and is not read: {_CONVERT}")
    if len(first) < 9 or header_bytes > size - 8:
        raise AdapterUnreadable(f"{name} is no whole safetensors file: it is shorter than its header says")
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterUnreadable(
            f"{name} has a header of {header_bytes} bytes, at most {MAX_HEADER_BYTES} are read: drop its metadata"
        )
    file.seek(8)
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_without_twins)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not made of strings")
        entries = {key: _entry(key, value) for key, value in header.items()}
        _check_offsets(entries, size - 8 - header_bytes)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise AdapterUnreadable(f"{name} is no whole safetensors file: {error}") from error
    return entries, metadata, 8 + header_bytes


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header holds a key twice")
    return result


def _entry(key: str, value: Any) -> _Entry:
    begin, end = value["data_offsets"]
    shape = tuple(value["shape"])
    numbers = (*shape, begin, end)
    if any(type(number) is not int or not 0 <= number < 1 << 48 for number in numbers) or len(shape) > 8:
        raise ValueError(f"{named([key])} has an impossible shape or place")
    return _Entry(str(value["dtype"]), shape, begin, end)


def _check_offsets(entries: Mapping[str, _Entry], data_bytes: int) -> None:
    """Tensors lie one behind the other, without gaps, to the end of the file, each as long as its shape says."""
    at = 0
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        dtype = _SCALARS.get(entry.dtype)
        if dtype is None:
            raise ValueError(f"{named([key])} is of type {entry.dtype[:20]}, not one of {', '.join(_FLOATS)}")
        if entry.begin != at or entry.end - at != math.prod(entry.shape) * dtype.itemsize:
            raise ValueError(f"{named([key])} does not lie where its header says")
        at = entry.end
    if at != data_bytes:
        raise ValueError(f"it holds {data_bytes} bytes of tensors, its header says {at}")


def _check_shapes(module: ModuleKeys, entries: Mapping[str, _Entry], features: tuple[int, int]) -> None:
    keys = module.keys
    a, b = entries[keys["a"]], entries[keys["b"]]
    for key, entry in ((keys["a"], a), (keys["b"], b)):
        if entry.dtype not in _FLOATS:
            raise AdapterUnreadable(f"{named([key])} is of type {entry.dtype}, not one of {', '.join(_FLOATS)}")
        # 1x1 convolutions are linears: trainers on a base with `use_linear_projection=False` write them so
        if len(entry.shape) not in (2, 4) or entry.shape[2:] not in ((), (1, 1)):
            raise AdapterIncompatible(
                f"the adapter changes convolutions, which is not supported (LoCon): {named([key])} is "
                f"{list(entry.shape)}; train linears only"
            )
    rank = a.shape[0]
    if not 1 <= rank <= MAX_RANK:
        raise AdapterIncompatible(f"{named([keys['a']])} has rank {rank}, allowed are 1 to {MAX_RANK}")
    wanted = (rank, features[1]), (features[0], rank)
    if (a.shape[:2], b.shape[:2]) != wanted:
        raise AdapterIncompatible(
            f"{named([module.spelled])} is {list(a.shape[:2])} and {list(b.shape[:2])}, but this base needs "
            f"{list(wanted[0])} and {list(wanted[1])}: use an adapter trained on it"
        )
    alpha = entries[keys["alpha"]] if "alpha" in keys else None
    if alpha is not None and math.prod(alpha.shape) != 1:
        raise AdapterUnreadable(f"{named([keys['alpha']])} is {list(alpha.shape)}, an alpha is one number")


def _load(
    file: BinaryIO, start: int, module: ModuleKeys, entries: Mapping[str, _Entry], alpha: float | None
) -> LowRank:
    a, b = (_tensor(file, start, module.keys[half], entries) for half in ("a", "b"))
    if "alpha" in module.keys:
        alpha = float(_tensor(file, start, module.keys["alpha"], entries))
    return LowRank(a.flatten(1), b.flatten(1), float(a.shape[0]) if alpha is None else alpha)


def _tensor(file: BinaryIO, start: int, key: str, entries: Mapping[str, _Entry]) -> torch.Tensor:
    entry = entries[key]
    data = bytearray(entry.end - entry.begin)
    file.seek(start + entry.begin)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise AdapterUnreadable(f"the adapter file ends within {named([key])}")
    tensor = torch.frombuffer(data, dtype=_SCALARS[entry.dtype]).reshape(entry.shape)
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterUnreadable(f"{named([key])} holds NaN or infinity: train the adapter again")
    return tensor


def _about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our own writer says about the adapter; nothing for other people's files."""
    if "lorafleet" not in metadata:
        return {}
    try:
        about = json.loads(metadata["lorafleet"])
        words = about.get("trigger_words", [])
        if not isinstance(words, list) or not isinstance(about.get("base_fingerprint"), str | None):
            raise ValueError("trigger_words is no list or base_fingerprint no text")
    except (ValueError, AttributeError, RecursionError) as error:
        raise AdapterUnreadable(f"the adapter's `lorafleet` metadata cannot be read: {error}") from error
    return dict(about)
