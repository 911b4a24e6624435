"""The adapter in training: PEFT's layers put into the base, their parameters by name, and the way out into files.

PEFT decides what a layer computes. Two of its parts are exchanged: dropout, whose masks are keyed here, and the cast of
inputs to float32, in place of which the float32 weights are cast to the inputs' type, so that a bfloat16 base trains
without autocast.
"""

import difflib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save_file

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter, LowRank
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.train.config import AdapterConfig
from lorafleet.train.randomness import KeyedDropout, SampleKeys, key_int32, keyed

SLOT: Final = "default"
"""The name of the one adapter in PEFT's layers."""
_LAYER: Final = re.compile(r"\.layers\.(\d+)\.")


class CastLinear(torch.nn.Module):
    """A linear without bias whose float32 weight is cast to its input's type."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


@dataclass(eq=False)
class TrainedAdapter:
    """The layers in a base by the names that files use, and their parameters: `NAME.a` [rank, in], `NAME.b` [out,
    rank], for DoRA `NAME.m` [out] too. All float32, on the base's device."""

    base: Base
    config: AdapterConfig
    layers: Mapping[str, Any]
    parameters: Mapping[str, torch.nn.Parameter]
    base_sizes: Mapping[str, int]
    """Parameters of each part of the base."""
    sample_keys: SampleKeys = field(default_factory=SampleKeys)

    @property
    def parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if any(name.startswith(f"{part}.") for name in self.layers))

    @property
    def trains_text(self) -> bool:
        return any(part != "unet" for part in self.parts)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the parameters on the CPU."""
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """The other way round; names and shapes must be the same."""
        assert state.keys() == self.parameters.keys()
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])

    def train(self, is_training: bool = True) -> None:
        """Dropout and gradient checkpointing on or off."""
        for part in self.parts:
            getattr(self.base.pipeline, part).train(is_training)

    def enable(self, is_enabled: bool) -> None:
        """Whether the base's pictures are made with the adapter."""
        for layer in self.layers.values():
            layer.enable_adapters(is_enabled)
        if is_enabled:  # PEFT makes disabled weights untrainable, and says nothing when they stay so
            for parameter in self.parameters.values():
                parameter.requires_grad_(True)

    def exported(
        self, state: Mapping[str, torch.Tensor], *, name: str = "", trigger_words: tuple[str, ...] = ()
    ) -> Adapter:
        """A state as an adapter, with the alpha that its scale means (rank-stabilised LoRA scales by alpha /
        sqrt(rank), files mean alpha / rank). Not for DoRA, which `write_dora` writes."""
        assert not self.config.dora
        modules = {
            path: LowRank(
                state[f"{path}.a"].contiguous(), state[f"{path}.b"].contiguous(), layer.scaling[SLOT] * layer.r[SLOT]
            )
            for path, layer in self.layers.items()
        }
        return Adapter(modules, name=name, trigger_words=trigger_words, base_fingerprint=self.base.fingerprint)


def attach(base: Base, config: AdapterConfig, *, seed: int) -> TrainedAdapter:
    """Puts a new adapter into the base's models and makes it the only thing that can be trained.

    B starts at zero and A as PEFT has it, uniform in +-1/sqrt(in) (https://arxiv.org/abs/2106.09685, section 4.1, and
    PEFT's `reset_lora_parameters`), from keyed numbers. The base must have no adapter yet.
    Raises ConfigError for targets that the base does not have.
    """
    targets = targets_of(base)
    sizes = {part: sum(tensor.numel() for tensor in getattr(base.pipeline, part).parameters()) for part in PARTS}
    chosen = _choose(targets.linears, config)
    for part in (*PARTS, "vae"):
        getattr(base.pipeline, part).requires_grad_(False)
    layers: dict[str, Any] = {}
    parameters: dict[str, torch.nn.Parameter] = {}
    keys = SampleKeys()
    for part in PARTS:
        paths = {targets.paths[name][1]: name for name in chosen if name.startswith(f"{part}.")}
        if not paths:
            continue
        model = getattr(base.pipeline, part)
        _inject(model, sorted(paths), config)
        for path, name in paths.items():
            layer: Any = model.get_submodule(path)
            _own(layer, name, config, seed, keys)
            layers[name] = layer
            parameters[f"{name}.a"] = layer.lora_A[SLOT].weight
            parameters[f"{name}.b"] = layer.lora_B[SLOT].weight
            if config.dora:
                parameters[f"{name}.m"] = layer.lora_magnitude_vector[SLOT].weight
    return TrainedAdapter(base, config, layers, parameters, sizes, keys)


def parameter_table(adapter: TrainedAdapter) -> list[tuple[str, int, int, int]]:
    """(part, linears with an adapter, trainable parameters, the part's own parameters), for each part."""
    rows = []
    for part in PARTS:
        trained = [tensor for name, tensor in adapter.parameters.items() if name.startswith(f"{part}.")]
        ours = sum(tensor.numel() for tensor in trained)
        linears = sum(name.startswith(f"{part}.") for name in adapter.layers)
        rows.append((part, linears, ours, adapter.base_sizes[part]))
    return rows


def write_dora(adapter: TrainedAdapter, state: Mapping[str, torch.Tensor], path: Path) -> None:
    """A DoRA as diffusers writes and reads it; our own engine does not serve them."""
    endings = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, Any] = {}
    for name, tensor in state.items():
        module, _, half = name.rpartition(".")
        tensors[f"{module}.{endings[half]}"] = tensor.contiguous()
    for part in adapter.parts:
        values = {
            "r": adapter.config.rank,
            "lora_alpha": adapter.config.alpha,
            "use_dora": True,
            "use_rslora": adapter.config.rslora,
            "target_modules": sorted(
                name.removeprefix(f"{part}.").removeprefix("text_model.")
                for name in adapter.layers
                if name.startswith(f"{part}.")
            ),
        }
        metadata.update({f"{part}.{key}": value for key, value in values.items()})
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)}
    save_file(tensors, path, metadata=header)


def _choose(linears: Mapping[str, tuple[int, int]], config: AdapterConfig) -> list[str]:
    """The names of the linears that the settings ask for."""
    wanted = [("unet", config.targets)]
    if config.text_encoders:
        wanted += [("text_encoder", config.text_targets), ("text_encoder_2", config.text_targets)]
    chosen: list[str] = []
    for part, endings in wanted:
        names = [name for name in linears if name.startswith(f"{part}.")]
        if part == "text_encoder":
            # SDXL reads its penultimate hidden states: the last layer would never get a gradient
            last = max(int(match[1]) for name in names if (match := _LAYER.search(name)))
            names = [name for name in names if f".layers.{last}." not in name]
        for ending in endings:
            found = [name for name in names if name.endswith(f".{ending}")]
            if not found:
                setting = "adapter.targets" if part == "unet" else "adapter.text_targets"
                known = sorted({_ending(name) for name in names})
                near = difflib.get_close_matches(ending, known, n=3) or known
                raise ConfigError(
                    f"{setting}: {ending} is no linear of the base's {part}; it has {', '.join(near[:12])}.",
                    param=setting,
                )
            chosen += found
    return sorted(set(chosen))


def _ending(name: str) -> str:
    """The last part of a path that is no number, and what follows."""
    parts = name.split(".")
    at = max(i for i, part in enumerate(parts) if not part.isdigit())
    return ".".join(parts[at:])


def _inject(model: torch.nn.Module, paths: list[str], config: AdapterConfig) -> None:
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=paths,
    )
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        inject_adapter_in_model(lora, model, adapter_name=SLOT)


@torch.no_grad()
def _own(layer: Any, name: str, config: AdapterConfig, seed: int, keys: SampleKeys) -> None:
    a = layer.lora_A[SLOT].weight
    bound = 1 / math.sqrt(a.shape[1])
    fresh = (torch.rand(a.shape, generator=keyed(seed, "adapter", name)) * 2 - 1) * bound
    layer.lora_A[SLOT] = CastLinear(fresh.to(a.device))
    layer.lora_B[SLOT] = CastLinear(torch.zeros_like(layer.lora_B[SLOT].weight))
    if config.dropout > 0:
        dropout = KeyedDropout(config.dropout, key_int32(seed, "dropout", name), keys)
        layer.lora_dropout[SLOT] = dropout.to(a.device)
    if config.dora:
        layer.lora_magnitude_vector[SLOT].weight.data = layer.lora_magnitude_vector[SLOT].weight.data.float()
        layer.lora_magnitude_vector[SLOT].weight.requires_grad_(True)
    layer.cast_input_dtype_enabled = False
