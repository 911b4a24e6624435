"""Writes adapter files, the same bytes for the same adapter, with true alphas in both formats."""

import json
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import torch

from lorafleet.sdxl.lora import PARTS, Adapter, tensor_bytes
from lorafleet.sdxl.lora_targets import kohya_name

Format = Literal["diffusers", "kohya"]
_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


def write_adapter(adapter: Adapter, path: Path, *, file_format: Format = "diffusers") -> None:
    """Writes the file whole or not at all; `read_adapter` gives the same adapter back, bit for bit.

    `diffusers`: alphas stand in the header, where diffusers reads them (`lora_adapter_metadata`); it refuses a file
    with `.alpha` keys, and tools that do not know its header take alpha = rank. `kohya`: alphas are tensors, which
    every tool reads, and diffusers' block names are used; diffusers 0.42 itself loads such a file rightly only where
    all alphas of a part are equal.
    """
    tensors = _diffusers_tensors(adapter) if file_format == "diffusers" else _kohya_tensors(adapter)
    alphas = {module.alpha for module in adapter.modules.values()}
    about = {
        "name": adapter.name,
        "trigger_words": list(adapter.trigger_words),
        "base_fingerprint": adapter.base_fingerprint,
        "rank": adapter.rank,
        "alpha": alphas.pop() if len(alphas) == 1 else None,
        "tensors_sha256": adapter.digest(),
    }
    metadata = {"format": "pt", "lorafleet": json.dumps(about, sort_keys=True)}
    if file_format == "diffusers":
        metadata["lora_adapter_metadata"] = json.dumps(_peft_config(adapter), sort_keys=True)
    else:
        metadata["ss_network_module"] = "networks.lora"
        metadata["ss_network_dim"] = str(adapter.rank)
        metadata["ss_network_alpha"] = str(_usual([module.alpha for module in adapter.modules.values()]))
    _write(path, tensors, metadata)


def _diffusers_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        tensors[f"{name}.lora_A.weight"] = module.a
        tensors[f"{name}.lora_B.weight"] = module.b
    return tensors


def _kohya_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        kohya = kohya_name(name)
        tensors[f"{kohya}.lora_down.weight"] = module.a
        tensors[f"{kohya}.lora_up.weight"] = module.b
        alpha = torch.tensor(module.alpha, dtype=torch.float32)
        exact = float(alpha) == module.alpha
        tensors[f"{kohya}.alpha"] = alpha if exact else torch.tensor(module.alpha, dtype=torch.float64)
    return tensors


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    """The LoraConfig of each part, as diffusers' `save_lora_weights` puts it in the header."""
    config: dict[str, Any] = {}
    for part in PARTS:
        modules = {name: module for name, module in adapter.modules.items() if name.startswith(f"{part}.")}
        if not modules:
            continue
        rank = _usual([module.rank for module in modules.values()])
        alpha = _usual([module.alpha for module in modules.values()])
        # without `text_model.`, which transformers 5 dropped from the first encoder: PEFT compares the ends of names
        paths = {name: name.removeprefix(f"{part}.").removeprefix("text_model.") for name in modules}
        values = {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {paths[name]: module.rank for name, module in modules.items() if module.rank != rank},
            "alpha_pattern": {paths[name]: module.alpha for name, module in modules.items() if module.alpha != alpha},
            "target_modules": sorted(paths.values()),
        }
        config.update({f"{part}.{key}": value for key, value in values.items()})
    return config


def _usual(values: list[Any]) -> Any:
    """The most frequent value, the largest of several: whatever the order of the modules."""
    counts = Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file. The library's own writer puts metadata in a random order, so the same adapter would get
    another hash, that is another version, each time."""
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    at = 0
    for key in order:
        tensor = tensors[key]
        end = at + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(struct.pack("<Q", len(text)) + text)
            for key in order:
                file.write(tensor_bytes(tensors[key]))
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
