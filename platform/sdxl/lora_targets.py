"""Which modules of a base an adapter may change, and all the names under which files speak of them.

Kohya's files write `_` for `.`, and for SDXL often use the block names of the original (sgm) code. Both are resolved
against the modules that the loaded base really has, so they are right for any block layout, emojixl's as SDXL's: sgm
numbers the layers of all blocks through, so counting each block's resnets and samplers gives the number.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS

KOHYA_PREFIXES: Final = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
_TOP_SGM: Final = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET_SGM: Final = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK: Final = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE: Final = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Targets:
    """The modules of one base. Immutable, safe for several threads.

    `linears`: (out, in) features by name. `convolutions`: the names that are there but take no adapter.
    `aliases`: kohya's spellings of both. `paths`: part and path in the loaded base by name of a linear.
    """

    fingerprint: str
    linears: Mapping[str, tuple[int, int]]
    convolutions: frozenset[str]
    aliases: Mapping[str, str]
    paths: Mapping[str, tuple[str, str]]


def targets_of(base: Base) -> Targets:
    """The targets of a loaded base, the same before and while an adapter bank is attached."""
    return find_targets({part: getattr(base.pipeline, part) for part in PARTS}, base.fingerprint)


def find_targets(parts: Mapping[str, torch.nn.Module], fingerprint: str) -> Targets:
    """As `targets_of`, from the models alone; they may be on the meta device."""
    linears: dict[str, tuple[int, int]] = {}
    paths: dict[str, tuple[str, str]] = {}
    convolutions: set[str] = set()
    aliases: dict[str, str] = {}
    for part, model in parts.items():
        names: list[str] = []
        for path, module in model.named_modules():
            if ".processor." in path:
                continue  # what serving puts there is none of the base's
            name = _file_name(part, path)
            if isinstance(module, torch.nn.Linear):
                linears[f"{part}.{name}"] = (module.out_features, module.in_features)
                paths[f"{part}.{name}"] = (part, path)
            elif isinstance(module, torch.nn.Conv2d):
                convolutions.add(f"{part}.{name}")
            else:
                continue
            names.append(name)
        aliases.update({_kohya(part, name): f"{part}.{name}" for name in names})
        if part == "unet":
            aliases.update({_kohya(part, sgm): f"{part}.{name}" for name, sgm in sgm_names(names).items()})
    return Targets(fingerprint, linears, frozenset(convolutions), aliases, paths)


def kohya_name(name: str) -> str:
    """Kohya's spelling of a module's name, with diffusers' block names."""
    part, _, path = name.partition(".")
    return _kohya(part, path)


def sgm_names(names: Iterable[str]) -> dict[str, str]:
    """The original code's path for each path of a diffusers UNet. Only paths that have one are in the result."""
    names = list(names)
    blocks = [match.groups() for match in map(_BLOCK.fullmatch, names) if match]
    resnets: dict[tuple[str, int], int] = {}
    samplers = {("down", int(block)) for _, block, kind, *_ in blocks if kind == "downsamplers"}
    with_attention = {(side, int(block)) for side, block, kind, *_ in blocks if kind == "attentions"}
    for side, block, kind, layer, _ in blocks:
        if kind == "resnets":
            at = (side, int(block))
            resnets[at] = max(resnets.get(at, 0), int(layer) + 1)

    def first(side: str, block: int) -> int:
        """Number of a block's first layer; number 0 on the way down is conv_in, and each downsampler has its own."""
        before = [(side, other) for other in range(block)]
        return (side == "down") + sum(resnets.get(at, 0) + (at in samplers) for at in before)

    found: dict[str, str] = {}
    for name in names:
        if name in _TOP_SGM:
            found[name] = _TOP_SGM[name]
        elif match := _MIDDLE.fullmatch(name):
            kind, layer, rest = match.groups()
            number = 1 if kind == "attentions" else 2 * int(layer)
            found[name] = f"middle_block.{number}.{_RESNET_SGM.get(rest, rest) if kind == 'resnets' else rest}"
        elif match := _BLOCK.fullmatch(name):
            side, block, kind, layer, rest = match.groups()
            at = (side, int(block))
            number = first(*at) + int(layer)
            blocks_name = "input_blocks" if side == "down" else "output_blocks"
            if kind == "resnets":
                found[name] = f"{blocks_name}.{number}.0.{_RESNET_SGM.get(rest, rest)}"
            elif kind == "attentions":
                found[name] = f"{blocks_name}.{number}.1.{rest}"
            elif kind == "downsamplers":
                found[name] = f"input_blocks.{first(*at) + resnets[at]}.0.op"
            else:  # an upsampler closes the last layer of its block
                found[name] = f"output_blocks.{first(*at) + resnets[at] - 1}.{1 + (at in with_attention)}.{rest}"
    return found


def _file_name(part: str, path: str) -> str:
    is_flat = part != "unet" and path.startswith(("encoder.", "embeddings."))
    return f"text_model.{path}" if is_flat else path


def _kohya(part: str, path: str) -> str:
    return KOHYA_PREFIXES[part] + path.replace(".", "_")
