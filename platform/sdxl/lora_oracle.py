"""The oracle with adapters: diffusers' pipeline and PEFT's own layers, alone, that faster code is tested against.

Needs peft. Nothing here shares code with the bank or with our readers and writers of files.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.sdxl.reference import OnStep, generate


def generate_with_adapters(
    base: Base,
    request: GenerationRequest,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """As `lorafleet.sdxl.reference.generate`, with the adapters at their weights. `base` stays untouched.

    The same adapter may be given twice. Raises InvalidRequest.
    """
    return generate(with_adapters(base, adapters), request, on_step=on_step)


def with_adapters(base: Base, adapters: Sequence[tuple[Adapter, float]]) -> Base:
    """A base with copies of those of its UNet and text encoders that PEFT's layers are put into."""
    pipeline = copy.copy(base.pipeline)
    keys = [key for adapter, _ in adapters for key in adapter.modules]
    changed = [part for part in PARTS if any(key.startswith(f"{part}.") for key in keys)]
    models = {part: copy.deepcopy(getattr(base.pipeline, part)) for part in changed}
    paths = targets_of(base).paths
    for number, (adapter, weight) in enumerate(adapters):
        # PEFT looks for names within keys, so that one name must not be the start of another
        name = f"adapter_{number:03d}"
        for part in changed:
            modules = {paths[key][1]: module for key, module in adapter.modules.items() if key.startswith(f"{part}.")}
            if modules:
                _inject(models[part], modules, name, weight)
    names = [f"adapter_{number:03d}" for number in range(len(adapters))]
    for part, model in models.items():
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter([name for name in names if name in layer.scaling])
        model.requires_grad_(False).eval()
        pipeline.register_modules(**{part: model})
    return dataclasses.replace(base, pipeline=pipeline)


def _inject(model: torch.nn.Module, modules: dict[str, Any], name: str, weight: float) -> None:
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        rank_pattern=_patterns({path: module.rank for path, module in modules.items()}),
        alpha_pattern=_patterns({path: module.alpha for path, module in modules.items()}),
        target_modules=_any_of(modules),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what we want
        inject_adapter_in_model(config, model, adapter_name=name)
    for path, module in modules.items():
        layer: Any = model.get_submodule(path)
        layer.lora_A[name].weight.data.copy_(module.a)
        layer.lora_B[name].weight.data.copy_(module.b)
        layer.set_scale(name, weight)


def _patterns(values: dict[str, Any]) -> dict[str, Any]:
    """Values by paths as PEFT looks them up, one expression after the other: so one for all paths of a value."""
    return {f"^{_any_of(path for path in values if values[path] == value)}": value for value in set(values.values())}


def _any_of(paths: Iterable[str]) -> str:
    return f"(?:{'|'.join(map(re.escape, paths))})"
