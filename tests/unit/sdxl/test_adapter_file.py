"""What the registry takes and what not, with the model's own check."""

import dataclasses
import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafleet.core.adapter_cache import AdapterCache
from lorafleet.core.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    AdapterUnreadable,
    BaseUnreadable,
    LorafleetError,
)
from lorafleet.core.folder_storage import FolderStorage
from lorafleet.core.registry import Registry
from lorafleet.sdxl.adapter_file import adapter_facts, base_targets, check_against, standalone
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora import MAX_HEADER_BYTES, Adapter
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import Targets, targets_of
from lorafleet.sdxl.lora_write import write_adapter

MID = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="session")
def targets() -> Targets:
    return base_targets(BaseConfig())


@pytest.fixture(scope="session")
def adapter(targets: Targets) -> Adapter:
    made = random_adapter(targets, 0, ranks=(4, 2), alphas=(3.0,), modules=r"unet\.mid.+attn1.+|text_encoder_2.+q_proj")
    return dataclasses.replace(made, trigger_words=("plush toy",))


@pytest.fixture
def fleet(tmp_path: Path) -> Registry:
    return Registry(FolderStorage(tmp_path / "fleet"), AdapterCache(tmp_path / "cache", 1 << 30))


def test_the_targets_without_weights_are_those_of_the_loaded_base(
    targets: Targets, emojixl: Base, tiny: Base, tiny_folder: Path
) -> None:
    assert targets == targets_of(emojixl)
    assert base_targets(BaseConfig(id=str(tiny_folder))) == targets_of(tiny)


def test_a_base_whose_configuration_makes_no_model(tiny_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    file = tmp_path / "base" / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "norm_num_groups": 7}))
    with pytest.raises(BaseUnreadable, match=r"the base in .*/base cannot be built: "):
        base_targets(BaseConfig(id=str(tmp_path / "base")))


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_the_facts_of_a_file(adapter: Adapter, targets: Targets, tmp_path: Path, file_format: str) -> None:
    write_adapter(adapter, tmp_path / "a.safetensors", file_format=file_format)  # type: ignore[arg-type]
    facts = adapter_facts(tmp_path / "a.safetensors", targets)
    names = list(adapter.modules)
    assert facts.model_dump() == {
        "format": file_format,
        "rank": 4,
        "alpha": 3.0,
        "modules": {
            "text_encoder_2": sum(name.startswith("text_encoder_2.") for name in names),
            "unet": sum(name.startswith("unet.") for name in names),
        },
        "trigger_words": ("plush toy",),
        "base_fingerprint": targets.fingerprint,
        "fits_fingerprint": targets.fingerprint,
        "training": None,
    }


def test_somebody_else_s_file_says_no_base(targets: Targets, tmp_path: Path) -> None:
    width = targets.linears[MID][1]
    key = f"base_model.model.{MID.removeprefix('unet.')}"
    save_file(
        {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)},
        tmp_path / "a.safetensors",
    )
    facts = adapter_facts(tmp_path / "a.safetensors", targets)
    assert (facts.format, facts.base_fingerprint, facts.alpha) == ("peft", None, 2.0)


def test_alphas_of_a_file_beside_come_along(targets: Targets, tmp_path: Path, fleet: Registry) -> None:
    """PEFT writes alpha 16 at rank 2 into adapter_config.json: alone, its weights would be served at an eighth."""
    width = targets.linears[MID][1]
    key = f"base_model.model.{MID.removeprefix('unet.')}"
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)}, file)
    assert standalone(file, targets, tmp_path) == file
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 16}))
    (tmp_path / "temporary").mkdir()
    whole = standalone(file, targets, tmp_path / "temporary")
    pushed = fleet.push("plush", whole, check_against(targets))
    assert pushed.alpha == 16.0
    assert read_adapter(fleet.pull(pushed), targets).digest() == read_adapter(file, targets).digest()


def write_bad(kind: str, file: Path, adapter: Adapter, targets: Targets) -> None:
    write_adapter(adapter, file)
    data = file.read_bytes()
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    elif kind == "huge header":
        file.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 100))
    elif kind == "cut":
        file.write_bytes(data[:-10])
    elif kind == "not a number":
        name, module = next(iter(adapter.modules.items()))
        broken = dataclasses.replace(module, a=torch.full_like(module.a, float("nan")))
        write_adapter(dataclasses.replace(adapter, modules={**adapter.modules, name: broken}), file)
    elif kind == "wrong base":
        write_adapter(dataclasses.replace(adapter, base_fingerprint="0" * 64), file)
    elif kind == "other modules":
        save_file({"unet.none.lora_A.weight": torch.ones(1, 2), "unet.none.lora_B.weight": torch.ones(2, 1)}, file)
    elif kind == "control characters":
        write_adapter(dataclasses.replace(adapter, trigger_words=("\x1b[2J",)), file)
    elif kind == "endless words":
        write_adapter(dataclasses.replace(adapter, trigger_words=("x",) * 33), file)


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("pickle", AdapterUnreadable, "is a pickle, which can run code and is not read"),
        ("huge header", AdapterUnreadable, "has a header of 1048577 bytes, at most 1048576 are read"),
        ("cut", AdapterUnreadable, "is no whole safetensors file"),
        ("not a number", AdapterUnreadable, "holds NaN or infinity"),
        ("wrong base", AdapterIncompatible, "was trained on another base"),
        ("other modules", AdapterIncompatible, "modules that this base does not have"),
        ("control characters", AdapterUnreadable, "trigger_words: Value error, trigger_words hold control characters"),
        ("endless words", AdapterUnreadable, "trigger_words: Tuple should have at most 32 items"),
    ],
)
def test_what_cannot_be_served_is_not_stored(
    fleet: Registry,
    adapter: Adapter,
    targets: Targets,
    tmp_path: Path,
    kind: str,
    error: type[LorafleetError],
    words: str,
) -> None:
    file = tmp_path / "mine.safetensors"
    write_bad(kind, file, adapter, targets)
    with pytest.raises(error) as raised:
        fleet.push("plush", file, check_against(targets))
    assert words in raised.value.message
    assert not (tmp_path / "fleet").exists()
    with pytest.raises(AdapterNotFound):
        fleet.resolve("plush")
