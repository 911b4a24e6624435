import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from lorafleet.core.errors import BaseNotFound, BaseUnreadable, ConfigError
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.folder import find_base


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "broken"))


def test_limits_come_from_the_models_own_configuration(tiny: Base, emojixl: Base) -> None:
    assert (tiny.limits.default_width_px, tiny.limits.grid_px, tiny.limits.max_prompt_tokens) == (64, 8, 24)
    assert (emojixl.limits.default_width_px, emojixl.limits.min_side_px, emojixl.limits.max_side_px) == (128, 64, 256)
    assert emojixl.limits.grid_px == 32


def test_weights_are_in_the_asked_dtype_and_in_eval_mode(tiny_folder: Path) -> None:
    base = load_base(BaseConfig(id=str(tiny_folder), device="cpu", dtype="bfloat16"))
    for part in (base.pipeline.unet, base.pipeline.vae, base.pipeline.text_encoder, base.pipeline.text_encoder_2):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.bfloat16}
        assert not part.training


def test_a_folder_is_known_by_its_name_so_that_no_path_leaves_the_machine(tiny: Base) -> None:
    assert tiny.id == "tiny"


def test_auto_means_float32_on_a_cpu(tiny: Base) -> None:
    assert tiny.dtype == torch.float32


def test_low_memory_slices_and_tiles_the_vae(tiny_folder: Path) -> None:
    vae = load_base(BaseConfig(id=str(tiny_folder), device="cpu", low_memory=True)).pipeline.vae
    assert vae.use_slicing
    assert vae.use_tiling


def test_another_vae_is_taken_from_its_folder(tiny_folder: Path, emojixl: Base) -> None:
    base = load_base(BaseConfig(id="emojixl", device="cpu", vae=str(emojixl.folder.parts["vae"])))
    assert base.fingerprint == emojixl.fingerprint
    other = load_base(BaseConfig(id=str(tiny_folder), device="cpu", vae=str(emojixl.folder.parts["vae"])))
    assert other.limits.grid_px == 16  # this VAE's factor of 8, halved once by this UNet
    assert other.limits.default_width_px == 128


def test_xformers_falls_back_with_one_warning(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lorafleet"):
        load_base(BaseConfig(id=str(tiny_folder), attention="xformers"))
    if torch.cuda.is_available():
        pytest.skip("this machine may have xformers")
    assert [record.message for record in caplog.records if "xformers" in record.message] == [
        "base.attention=xformers is not usable here, sdpa runs instead: it needs a CUDA GPU, the device is cpu"
    ]


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"device": "cpu", "dtype": "float16"}, "set dtype=float32 or device=cuda"),
        ({"device": "cpu", "attention": "xformers"}, "set attention=sdpa"),
        ({"vae_revision": "main"}, "set vae to the hub id"),
        ({"revision": "main"}, "leave them out"),
        ({"device": "gpu"}, "match pattern"),
    ],
)
def test_settings_that_contradict_each_other_say_what_to_change(settings: dict[str, str], cure: str) -> None:
    with pytest.raises(ValidationError, match=cure):
        BaseConfig(**settings)  # type: ignore[arg-type]


def test_a_missing_gpu_is_a_setting_to_change(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="set base.device=cpu"):
        load_base(BaseConfig(id=str(tiny_folder), device="cuda:63"))


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="no base model folder .*nowhere"):
        find_base(BaseConfig(id=str(tmp_path / "nowhere")))


def test_a_hub_id_without_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseNotFound, match="no folder lorafleet/none, and .* could not be had from the model hub"):
        find_base(BaseConfig(id="lorafleet/none"))


def test_a_revision_belongs_to_a_hub_id(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="leave its revision out"):
        find_base(BaseConfig(id=str(tiny_folder), revision="main"))


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder_2/model.safetensors",
        "scheduler/scheduler_config.json",
        "tokenizer_2/tokenizer.json",
    ],
)
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(BaseUnreadable, match=Path(name).name):
        find_base(BaseConfig(id=str(broken)))


def test_a_variant_that_is_not_there_is_named(tiny_folder: Path) -> None:
    with pytest.raises(BaseUnreadable, match=r"diffusion_pytorch_model\.fp16\.safetensors is missing"):
        find_base(BaseConfig(id=str(tiny_folder), variant="fp16"))


def test_another_architecture_is_named(broken: Path) -> None:
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(BaseUnreadable, match="holds a StableDiffusionPipeline, not an SDXL base"):
        find_base(BaseConfig(id=str(broken)))


def test_a_unet_without_micro_conditioning_is_refused(broken: Path) -> None:
    file = broken / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "addition_embed_type": None}))
    with pytest.raises(BaseUnreadable, match="not the UNet of an SDXL base"):
        find_base(BaseConfig(id=str(broken)))


@pytest.mark.parametrize("keep_bytes", [0, 4, 100, 2000, -1])
def test_cut_off_weights_are_found_without_loading_them(broken: Path, keep_bytes: int) -> None:
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    with pytest.raises(BaseUnreadable, match=r"diffusion_pytorch_model\.safetensors is (damaged|not a safetensors)"):
        find_base(BaseConfig(id=str(broken)))


def test_weights_of_another_shape_are_unreadable(broken: Path) -> None:
    file = broken / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "cross_attention_dim": 48}))
    with pytest.raises(BaseUnreadable, match="does not load"):
        load_base(BaseConfig(id=str(broken)))
