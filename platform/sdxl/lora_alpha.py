"""Alphas that stand in no tensor: in the header as diffusers writes it, or in PEFT's adapter_config.json."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from lorafleet.core.errors import AdapterUnreadable
from lorafleet.sdxl.lora import MAX_HEADER_BYTES, PARTS
from lorafleet.sdxl.lora_keys import named

_HEADER_KEYS: Final = ("lora_adapter_metadata", "adapter_config")


def header_alphas(metadata: Mapping[str, str], path: Path, ranks: Mapping[str, int]) -> dict[str, float]:
    """Alpha by module, for the modules that the configuration says something about. `ranks`: all modules'.

    Raises AdapterUnreadable.
    """
    text = next((metadata[key] for key in _HEADER_KEYS if key in metadata), None)
    beside = path.with_name("adapter_config.json")
    if text is None and path.name == "adapter_model.safetensors" and beside.is_file():
        with beside.open("rb") as file:
            text = file.read(MAX_HEADER_BYTES).decode(errors="replace")
    if text is None:
        return {}
    try:
        config = json.loads(text)
        return {
            name: alpha
            for name, rank in ranks.items()
            if (alpha := _alpha(_part_config(config, name.partition(".")[0]), name, rank)) is not None
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise AdapterUnreadable(f"the adapter's PEFT configuration cannot be read: {error}") from error


def _part_config(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """diffusers puts the part before each key, PEFT writes one configuration for the one model it saw."""
    own = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    has_parts = any(key.startswith(tuple(f"{other}." for other in PARTS)) for key in config)
    return own if has_parts else dict(config)


def _alpha(config: Mapping[str, Any], name: str, rank: int) -> float | None:
    if config.get("use_dora"):
        raise AdapterUnreadable("the adapter is a DoRA (use_dora in its configuration), which is not supported")
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if _fits(key, name)), config.get("lora_alpha"))
    if alpha is None:
        return None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError("lora_alpha is not a number")
    # rank-stabilised LoRA scales by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _fits(pattern: str, name: str) -> bool:
    """Whether a name ends in the pattern. PEFT takes patterns as regular expressions; those of a stranger's file may
    take hours, so only plain names are understood."""
    plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
    if not all(char.isalnum() or char in "._" for char in plain):
        raise ValueError(f"alpha_pattern {named([pattern])} is not a module's name")
    return name.endswith(f".{plain}")
