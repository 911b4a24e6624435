"""The adapter in PEFT's layers: what is trained, where it sits, and that every file of it draws the same picture."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model_state_dict
from PIL import Image

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_oracle import with_adapters
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.sdxl.reference import generate
from lorafleet.train.adapter import SLOT, TrainedAdapter, attach, parameter_table, write_dora
from lorafleet.train.config import AdapterConfig

REQUEST = GenerationRequest(prompt="a red apple on a blue background", seed=3, steps=3)


@pytest.fixture
def base() -> Base:
    """One that the test may change."""
    return load_base(BaseConfig(device="cpu"))


def attached(base: Base, **settings: Any) -> TrainedAdapter:
    """An adapter that changes pictures plainly, as after training."""
    adapter = attach(base, AdapterConfig(dropout=0, **settings), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            if name.endswith(".b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapter.train(False)
    return adapter


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image).astype(int)


def drawn(base: Base) -> np.ndarray[Any, Any]:
    return pixels(generate(base, REQUEST)[0])


def test_only_the_adapter_is_trained_and_it_is_half_a_percent(base: Base) -> None:
    adapter = attach(base, AdapterConfig(), seed=0)
    trained = [
        tensor
        for part in ("unet", "vae", "text_encoder", "text_encoder_2")
        for tensor in getattr(base.pipeline, part).parameters()
        if tensor.requires_grad
    ]
    assert {id(tensor) for tensor in trained} == {id(tensor) for tensor in adapter.parameters.values()}
    assert all(tensor.dtype == torch.float32 for tensor in trained)
    unet, *texts = parameter_table(adapter)
    assert unet[:2] == ("unet", 56)
    assert 0.005 < unet[2] / unet[3] < 0.03
    assert [row[1:3] for row in texts] == [(0, 0), (0, 0)]


def test_the_first_text_encoders_last_layer_is_left_out(base: Base) -> None:
    # its output is never read, so its adapter would never learn
    names = attach(base, AdapterConfig(text_encoders=True), seed=0).layers
    last = base.pipeline.text_encoder.config.num_hidden_layers - 1
    assert any(f".layers.{last - 1}." in name for name in names if name.startswith("text_encoder."))
    assert not any(f".layers.{last}." in name for name in names if name.startswith("text_encoder."))
    assert any(f".layers.{last}." in name for name in names if name.startswith("text_encoder_2."))


def test_an_unknown_target_is_refused_with_its_neighbours(base: Base) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: to_kk is no linear of the base's unet; it has to_k"):
        attach(base, AdapterConfig(targets=("to_q", "to_kk")), seed=0)


def test_the_start_changes_nothing_and_is_the_seeds(base: Base) -> None:
    plain = drawn(base)
    adapter = attach(base, AdapterConfig(), seed=5)
    adapter.train(False)
    assert np.array_equal(drawn(base), plain)
    again = attach(load_base(BaseConfig(device="cpu")), AdapterConfig(), seed=5).state()
    assert all(torch.equal(tensor, again[name]) for name, tensor in adapter.state().items())


def test_switched_off_it_is_the_base_and_stays_trainable(base: Base) -> None:
    plain = drawn(base)
    adapter = attached(base)
    adapter.enable(False)
    assert np.array_equal(drawn(base), plain)
    adapter.enable(True)
    assert not np.array_equal(drawn(base), plain)
    assert all(parameter.requires_grad for parameter in adapter.parameters.values())


@pytest.mark.parametrize("settings", [{}, {"rslora": True}], ids=["alpha 16, rank 8", "rslora"])
def test_every_file_form_draws_what_training_saw(base: Base, tmp_path: Path, settings: dict[str, Any]) -> None:
    adapter = attached(base, **settings)
    wanted = drawn(base)
    exported = adapter.exported(adapter.state(), name="a")
    assert {module.scale for module in exported.modules.values()} == {16 / 8**0.5 if settings else 2.0}
    fresh = load_base(BaseConfig(device="cpu"))
    assert np.abs(wanted - drawn(fresh)).max() > 20

    for form in ("diffusers", "kohya"):
        file = tmp_path / f"{form}.safetensors"
        write_adapter(exported, file, file_format=form)  # type: ignore[arg-type]
        read = read_adapter(file, targets_of(fresh))
        assert np.abs(drawn(with_adapters(fresh, [(read, 1.0)])) - wanted).max() <= 1, form
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = load_base(BaseConfig(device="cpu")).pipeline
            pipeline.load_lora_weights(file)  # by diffusers alone
        loaded = load_base(BaseConfig(device="cpu"))
        loaded.pipeline.register_modules(unet=pipeline.unet)
        assert np.abs(drawn(loaded) - wanted).max() <= 1, form


def test_pefts_own_folder_draws_the_same(base: Base, tmp_path: Path) -> None:
    adapter = attached(base)
    wanted = drawn(base)
    exported = adapter.exported(adapter.state())
    folder = tmp_path / "peft"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        donor = PeftModel(load_base(BaseConfig(device="cpu")).pipeline.unet, base.pipeline.unet.peft_config[SLOT])
        state = get_peft_model_state_dict(donor)
        for key in state:
            module, half = key.removeprefix("base_model.model.").rsplit(".lora_", 1)
            low_rank = exported.modules[f"unet.{module}"]
            state[key].copy_(low_rank.a if half.startswith("A") else low_rank.b)
        donor.save_pretrained(folder)
        fresh = load_base(BaseConfig(device="cpu"))
        unet: UNet2DConditionModel = PeftModel.from_pretrained(fresh.pipeline.unet, folder).base_model.model
    fresh.pipeline.register_modules(unet=unet)
    assert np.abs(drawn(fresh) - wanted).max() <= 1
    read = read_adapter(folder / "adapter_model.safetensors", targets_of(load_base(BaseConfig(device="cpu"))))
    assert {module.alpha for module in read.modules.values()} == {16.0}


def test_a_dora_is_written_for_diffusers(base: Base, tmp_path: Path) -> None:
    adapter = attached(base, dora=True)
    wanted = drawn(base)
    file = tmp_path / "dora.safetensors"
    write_dora(adapter, adapter.state(), file)
    fresh = load_base(BaseConfig(device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.pipeline.load_lora_weights(file)
    assert np.abs(drawn(fresh) - wanted).max() <= 1
