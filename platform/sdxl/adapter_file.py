"""Checks an adapter's file against a base for the registry, without loading the base's weights."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from pydantic import ValidationError
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lorafleet.core.errors import AdapterUnreadable, BaseUnreadable
from lorafleet.core.manifest import AdapterFacts, FileFormat
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.fingerprint import fingerprint
from lorafleet.sdxl.folder import BaseFolder, find_base, read_json
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import Targets, find_targets
from lorafleet.sdxl.lora_write import write_adapter


def base_targets(config: BaseConfig) -> Targets:
    """As `targets_of` of the loaded base, from its configurations alone; its weight files are hashed, 1 s per GB.

    Raises BaseNotFound, BaseUnreadable or ConfigError.
    """
    folder = find_base(config)
    return find_targets(_without_weights(folder), fingerprint(folder))


def adapter_facts(file: Path, targets: Targets) -> AdapterFacts:
    """What a file is, after all that `read_adapter` checks. Raises AdapterUnreadable or AdapterIncompatible."""
    adapter = read_adapter(file, targets)
    alphas = {module.alpha for module in adapter.modules.values()}
    try:
        return AdapterFacts(
            format=_format(file),
            rank=adapter.rank,
            alpha=alphas.pop() if len(alphas) == 1 else None,
            modules=Counter(name.partition(".")[0] for name in sorted(adapter.modules)),
            trigger_words=adapter.trigger_words,
            base_fingerprint=adapter.base_fingerprint,
            fits_fingerprint=targets.fingerprint,
        )
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise AdapterUnreadable(f"the adapter's metadata cannot be kept: {where}: {problem['msg']}") from error


def check_against(targets: Targets) -> Callable[[Path], AdapterFacts]:
    """The registry's check for one base."""
    return lambda file: adapter_facts(file, targets)


def standalone(file: Path, targets: Targets, folder: Path) -> Path:
    """The file itself, or where its alphas stand in an `adapter_config.json` beside it, as PEFT writes them, a copy in
    `folder` that says them itself: alone in the registry it would be served at another strength."""
    if file.name != "adapter_model.safetensors" or not file.with_name("adapter_config.json").is_file():
        return file
    copy = folder / "adapter.safetensors"
    write_adapter(read_adapter(file, targets), copy)
    return copy


def _without_weights(folder: BaseFolder) -> dict[str, torch.nn.Module]:
    configs: dict[str, dict[str, Any]] = {
        part: read_json(folder.parts[part] / "config.json") for part in ("unet", "text_encoder", "text_encoder_2")
    }
    try:
        with torch.device("meta"):
            return {
                "unet": UNet2DConditionModel.from_config(configs["unet"]),
                "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(configs["text_encoder"])),
                "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(configs["text_encoder_2"])),
            }
    except Exception as error:  # whatever a damaged configuration makes diffusers or transformers raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseUnreadable(f"the base in {folder.root} cannot be built: {reason[0]}", param="base.id") from error


def _format(file: Path) -> FileFormat:
    with safe_open(os.fspath(file), framework="pt") as opened:
        keys = list(opened.keys())
    if any(key.startswith("base_model.model.") for key in keys):
        return "peft"
    return "kohya" if any(key.startswith("lora_") for key in keys) else "diffusers"
