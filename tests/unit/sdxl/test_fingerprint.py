import json
import shutil
import time
from pathlib import Path

import pytest
from diffusers import UNet2DConditionModel

from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.fingerprint import fingerprint
from lorafleet.sdxl.folder import find_base


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))


def fingerprint_of(folder: Path) -> str:
    return fingerprint(find_base(BaseConfig(id=str(folder))))


def test_it_does_not_depend_on_place_or_dtype_at_load(tiny: Base, tiny_folder: Path, copy: Path) -> None:
    assert fingerprint_of(copy) == tiny.fingerprint
    assert load_base(BaseConfig(id=str(tiny_folder), device="cpu", dtype="bfloat16")).fingerprint == tiny.fingerprint


def test_shards_and_notes_do_not_count(tiny: Base, copy: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(copy / "unet")
    shutil.rmtree(copy / "unet")
    unet.save_pretrained(copy / "unet", max_shard_size="100KB")
    assert len(list((copy / "unet").glob("*.safetensors"))) > 1
    config = json.loads((copy / "unet" / "config.json").read_text())
    (copy / "unet" / "config.json").write_text(json.dumps({**config, "_diffusers_version": "9.9"}))
    assert fingerprint_of(copy) == tiny.fingerprint
    assert load_base(BaseConfig(id=str(copy), device="cpu")).fingerprint == tiny.fingerprint


def test_one_changed_weight_counts(tiny: Base, copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint_of(copy) != tiny.fingerprint


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("vae/config.json", "scaling_factor", 0.5),
        ("scheduler/scheduler_config.json", "prediction_type", "v_prediction"),
        ("model_index.json", "force_zeros_for_empty_prompt", False),
        ("tokenizer_2/tokenizer_config.json", "pad_token", "?"),
    ],
)
def test_configuration_that_changes_the_image_counts(
    tiny: Base, copy: Path, file: str, key: str, value: object
) -> None:
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), key: value}))
    assert fingerprint_of(copy) != tiny.fingerprint


def test_emojixl_takes_less_than_a_fifth_of_a_second(emojixl: Base) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        fingerprint(emojixl.folder)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.2
