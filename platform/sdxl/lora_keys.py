"""The keys of LoRA files: which module and which half of it each one names.

Known are diffusers' (`unet.X.lora_A.weight`, and the older `X.lora.down.weight`, `X.lora_linear_layer.down.weight`,
`attn1.processor.to_q_lora.down.weight`), PEFT's (`base_model.model.X.lora_A.default.weight`) and kohya's
(`lora_unet_X.lora_down.weight`, `lora_te1_X.alpha`).
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

from lorafleet.core.errors import AdapterIncompatible, AdapterUnreadable
from lorafleet.sdxl.lora import PARTS
from lorafleet.sdxl.lora_targets import Targets

Half = Literal["a", "b", "alpha"]

_KEY: Final = re.compile(
    r"(?P<module>[^\s]+?)"
    r"(?:\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|\.(?P<alpha>alpha))"
)
_HALVES: Final[dict[str, Half]] = {"A": "a", "down": "a", "B": "b", "up": "b", "alpha": "alpha"}
_OTHER_METHODS: Final = {
    "DoRA": ("dora_scale", "lora_magnitude_vector"),
    "LoHa": ("hada_w",),
    "LoKr": ("lokr_",),
    "convolution LoRA (LoCon)": ("lora_mid", "lora_cp"),
}
_OLD_TEXT_NAMES: Final = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class ModuleKeys:
    """The keys of one module in a file."""

    spelled: str
    keys: dict[Half, str] = field(default_factory=dict)


def sort_keys(keys: Iterable[str], targets: Targets) -> dict[str, ModuleKeys]:
    """Each module's keys by its name in `targets`.

    Raises AdapterUnreadable for other methods than LoRA, unknown keys, a module named twice and a missing half, and
    AdapterIncompatible for modules that the base does not have or that are convolutions.
    """
    keys = list(keys)
    for method, marks in _OTHER_METHODS.items():
        if found := [key for key in keys if any(mark in key for mark in marks)]:
            raise AdapterUnreadable(f"the adapter is a {method}, which is not supported ({named(found)}): train a LoRA")
    matches = {key: _KEY.fullmatch(key) for key in keys}
    if unknown := [key for key, match in matches.items() if match is None]:
        raise AdapterUnreadable(f"the adapter holds keys that no known LoRA format has: {named(unknown)}")
    modules: dict[str, ModuleKeys] = {}
    missing: list[str] = []
    twice: list[str] = []
    for key, match in matches.items():
        assert match is not None
        half = _HALVES[match["peft"] or match["kohya"] or match["old"] or match["alpha"]]
        name = _resolve(match["module"], targets)
        if name is None:
            missing.append(key)
            continue
        module = modules.setdefault(name, ModuleKeys(match["module"]))
        if half in module.keys:
            twice.append(key)
        module.keys[half] = key
    if missing:
        raise AdapterIncompatible(
            f"the adapter changes modules that this base does not have: {named(missing)}; use one trained on this base"
        )
    if twice:
        raise AdapterUnreadable(f"the adapter names a module twice: {named(twice)}")
    if convolutions := [keys.spelled for name, keys in modules.items() if name in targets.convolutions]:
        raise AdapterIncompatible(
            f"the adapter changes convolutions, which is not supported (LoCon): {named(convolutions)}; "
            "train linears only"
        )
    halves = [keys.spelled for keys in modules.values() if "a" not in keys.keys or "b" not in keys.keys]
    if halves:
        raise AdapterUnreadable(f"the adapter lacks one half of its A/B (down/up) pairs for {named(halves)}")
    if not modules:
        raise AdapterUnreadable("the adapter file holds no tensors")
    return modules


def named(keys: Iterable[str]) -> str:
    """The first three of `keys`, cut to a readable length, and how many there are."""
    listed = list(keys)
    first = ", ".join(repr(key if len(key) <= 120 else key[:117] + "...") for key in listed[:3])
    return first if len(listed) <= 3 else f"{first} and {len(listed) - 3} more ({len(listed)} in all)"


def _resolve(spelled: str, targets: Targets) -> str | None:
    """The module's name in `targets`. Raises AdapterIncompatible where two parts of the base have it."""
    if "." not in spelled and spelled.startswith("lora_"):
        return targets.aliases.get(re.sub(r"^lora_te_", "lora_te1_", spelled))
    path = spelled.removeprefix("base_model.model.").replace(".processor.", ".")
    part, _, rest = path.partition(".")
    parts = (part,) if part in PARTS else PARTS
    found = []
    for candidate in parts:
        for name in _spellings(candidate, rest if part in PARTS else path):
            if name in targets.linears or name in targets.convolutions:
                found.append(name)
                break
    if len(found) > 1:
        raise AdapterIncompatible(
            f"the adapter's key {named([spelled])} fits several parts of the base ({', '.join(found)}): "
            f"start its keys with one of {', '.join(PARTS)}"
        )
    return found[0] if found else None


def _spellings(part: str, path: str) -> Iterable[str]:
    """What a path may be called in `targets`, likeliest first."""
    if part == "unet":
        yield f"{part}.{path}"
        yield f"{part}.{path}.0"  # the older `to_out_lora` is to_out.0
        return
    head, _, last = path.rpartition(".")
    path = f"{head}.{_OLD_TEXT_NAMES[last]}" if last in _OLD_TEXT_NAMES else path
    yield f"{part}.{path}"
    yield f"{part}.text_model.{path}"
