"""Every format gives the same adapter, and what our writer writes is read back bit for bit."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS, Adapter, LowRank
from lorafleet.sdxl.lora_oracle import generate_with_adapters
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import KOHYA_PREFIXES, Targets, kohya_name, sgm_names, targets_of
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.sdxl.reference import generate

REQUEST = GenerationRequest(prompt="red apple on a blue background", steps=3, seed=1)
EVERYWHERE = r"unet\..+\.(attn[12]|ff|proj_(in|out))\b.*|text_encoder(_2)?\..+"


@pytest.fixture(scope="session")
def targets(emojixl: Base) -> Targets:
    return targets_of(emojixl)


@pytest.fixture(scope="session")
def adapter(targets: Targets) -> Adapter:
    """Different ranks, alphas that are not the ranks, text encoders too."""
    made = random_adapter(targets, 0, ranks=(4, 8, 3), alphas=(16, 2.5), modules=EVERYWHERE)
    return dataclasses.replace(made, name="plush", trigger_words=("plush toy", "ぬいぐるみ"))


@pytest.fixture(scope="session")
def evenly_scaled(targets: Targets) -> Adapter:
    """One alpha: what diffusers 0.42 can load from kohya's format."""
    return random_adapter(targets, 1, ranks=(4, 8), alphas=(16,), modules=EVERYWHERE)


def same(one: Adapter, other: Adapter) -> bool:
    return one.digest() == other.digest()


def pixels(base: Base, adapters: list[tuple[Adapter, float]]) -> Any:
    return np.asarray(generate_with_adapters(base, REQUEST, adapters)[0]).astype(int)


def loaded_by_diffusers(base: Base, file: Path, weight: float) -> Any:
    pipeline = copy.copy(base.pipeline)
    for part in PARTS:
        pipeline.register_modules(**{part: copy.deepcopy(getattr(base.pipeline, part))})
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="ours")
    pipeline.set_adapters(["ours"], [weight])
    return np.asarray(generate(dataclasses.replace(base, pipeline=pipeline), REQUEST)[0]).astype(int)


# --- our own files ---


@pytest.mark.parametrize("file_format", ["diffusers", "kohya"])
def test_what_is_written_is_read_back(tmp_path: Path, targets: Targets, adapter: Adapter, file_format: Any) -> None:
    file = tmp_path / "a.safetensors"
    write_adapter(adapter, file, file_format=file_format)
    back = read_adapter(file, targets)
    assert same(adapter, back)
    assert (back.name, back.trigger_words) == ("plush", ("plush toy", "ぬいぐるみ"))
    assert back.base_fingerprint == targets.fingerprint
    before = file.read_bytes()
    write_adapter(back, file, file_format=file_format)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**31),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), min_size=2, max_size=2),
    ranks=st.lists(st.integers(1, 128), min_size=1, max_size=3),
    alphas=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3),
    modules=st.sampled_from(
        [r"unet\..+to_k", r"text_encoder\..+fc1", r"text_encoder_2\..+|unet\.mid.+", r"unet.+emb.+"]
    ),
    file_format=st.sampled_from(["diffusers", "kohya"]),
)
def test_any_adapter_comes_back(
    tmp_path: Path,
    targets: Targets,
    seed: int,
    dtypes: list[torch.dtype],
    ranks: list[int],
    alphas: list[float],
    modules: str,
    file_format: Any,
) -> None:
    drawn = random_adapter(targets, seed, ranks=ranks, alphas=alphas, modules=modules)
    mixed = {
        name: LowRank(module.a.to(dtypes[0]), (module.b / (1 + module.b.abs().max())).to(dtypes[1]), module.alpha)
        for name, module in drawn.modules.items()
    }
    drawn = Adapter(mixed)
    write_adapter(drawn, tmp_path / "a.safetensors", file_format=file_format)
    back = read_adapter(tmp_path / "a.safetensors", targets)
    assert same(drawn, back)
    assert back.modules.keys() == drawn.modules.keys()
    assert back.base_fingerprint is None


# --- the same images elsewhere ---


def test_diffusers_draws_the_same_from_our_diffusers_export(tmp_path: Path, emojixl: Base, adapter: Adapter) -> None:
    write_adapter(adapter, tmp_path / "a.safetensors")
    ours = pixels(emojixl, [(adapter, 0.8)])
    assert np.abs(ours - pixels(emojixl, [])).mean() > 2  # it does something
    assert np.abs(ours - loaded_by_diffusers(emojixl, tmp_path / "a.safetensors", 0.8)).max() <= 1


def test_diffusers_draws_the_same_from_our_kohya_export(tmp_path: Path, emojixl: Base, evenly_scaled: Adapter) -> None:
    write_adapter(evenly_scaled, tmp_path / "a.safetensors", file_format="kohya")
    ours = pixels(emojixl, [(evenly_scaled, -0.5)])
    assert np.abs(ours - loaded_by_diffusers(emojixl, tmp_path / "a.safetensors", -0.5)).max() <= 1


def test_the_oracle_leaves_the_base_alone_and_adds_adapters_up(emojixl: Base, evenly_scaled: Adapter) -> None:
    plain = np.asarray(generate(emojixl, REQUEST)[0]).astype(int)
    twice = pixels(emojixl, [(evenly_scaled, 0.3), (evenly_scaled, 0.5)])
    assert np.abs(twice - pixels(emojixl, [(evenly_scaled, 0.8)])).max() <= 1
    assert (pixels(emojixl, [(evenly_scaled, 0.0)]) == plain).all()
    assert (np.asarray(generate(emojixl, REQUEST)[0]) == plain).all()


# --- other people's files ---


def peft_saved(base: Base, part: str, folder: Path, **config: Any) -> dict[str, LowRank]:
    """Lets PEFT save an adapter of one model; what it should be read as, by path."""
    torch.manual_seed(0)
    model = PeftModel(
        copy.deepcopy(getattr(base.pipeline, part)),
        LoraConfig(init_lora_weights=False, target_modules=["to_q"], **config),
    )
    model.save_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    paths = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    halves = {path: [tensors[f"base_model.model.{path}.lora_{half}.weight"] for half in "AB"] for path in paths}
    return {path: LowRank(a, b, 0.0) for path, (a, b) in halves.items()}


def test_a_folder_that_peft_saved(tmp_path: Path, emojixl: Base, targets: Targets) -> None:
    special = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    saved = peft_saved(emojixl, "unet", tmp_path, r=4, lora_alpha=12, alpha_pattern={special: 7.0})
    read = read_adapter(tmp_path / "adapter_model.safetensors", targets)
    assert {f"unet.{path}" for path in saved} == read.modules.keys()
    for path, module in saved.items():
        assert torch.equal(read.modules[f"unet.{path}"].a, module.a)
        assert torch.equal(read.modules[f"unet.{path}"].b, module.b)
        assert read.modules[f"unet.{path}"].alpha == (7.0 if path == special else 12.0)


def test_a_rank_stabilised_adapter_keeps_its_strength(tmp_path: Path, emojixl: Base, targets: Targets) -> None:
    peft_saved(emojixl, "unet", tmp_path, r=4, lora_alpha=12, use_rslora=True)
    read = read_adapter(tmp_path / "adapter_model.safetensors", targets)
    assert {module.scale for module in read.modules.values()} == {6.0}  # 12 / sqrt(4)


def test_diffusers_own_export_keeps_alpha(tmp_path: Path, emojixl: Base, targets: Targets) -> None:
    """diffusers writes PEFT's live names (`text_encoder.encoder...` on transformers 5) and its header."""
    pipeline = copy.copy(emojixl.pipeline)
    config = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["to_q", "q_proj"])
    layers: dict[str, Any] = {}
    for part in ("unet", "text_encoder"):
        model = copy.deepcopy(getattr(emojixl.pipeline, part))
        model.add_adapter(config, adapter_name="default")
        names = "to_q" if part == "unet" else "q_proj"
        layers[f"{part}_lora_layers"] = {
            key.replace(".default", ""): value for key, value in model.state_dict().items() if f"{names}.lora_" in key
        }
        layers[f"{part}_lora_adapter_metadata"] = {"r": 4, "lora_alpha": 12, "target_modules": [names]}
    pipeline.save_lora_weights(tmp_path, weight_name="a.safetensors", **layers)
    read = read_adapter(tmp_path / "a.safetensors", targets)
    assert {name.partition(".")[0] for name in read.modules} == {"unet", "text_encoder"}
    assert {module.scale for module in read.modules.values()} == {3.0}


def _diffusers(name: str) -> tuple[str, str, str]:
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight", f"{name}.alpha"


def _older(name: str) -> tuple[str, str, str]:
    return f"{name}.lora.down.weight", f"{name}.lora.up.weight", f"{name}.alpha"


def _processor(name: str) -> tuple[str, str, str]:
    """diffusers of 2023."""
    head, _, last = name.removesuffix(".0").rpartition(".")
    if name.startswith("unet."):
        name = f"{head}.processor.{last}_lora"
    else:
        name = f"{head}.{ {'q_proj': 'to_q', 'k_proj': 'to_k', 'v_proj': 'to_v', 'out_proj': 'to_out'}[last] }_lora"
    return f"{name}.down.weight", f"{name}.up.weight", f"{name.removesuffix('_lora')}.alpha"


def _text_linear(name: str) -> tuple[str, str, str]:
    return f"{name}.lora_linear_layer.down.weight", f"{name}.lora_linear_layer.up.weight", f"{name}.alpha"


def _peft(name: str) -> tuple[str, str, str]:
    name = f"base_model.model.{name}"
    return f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight", f"{name}.alpha"


def _kohya(name: str) -> tuple[str, str, str]:
    name = kohya_name(name)
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


def _kohya_sgm(name: str) -> tuple[str, str, str]:
    part, _, path = name.partition(".")
    path = sgm_names(SGM_PATHS)[path] if part == "unet" else path
    name = KOHYA_PREFIXES[part] + path.replace(".", "_")
    return f"{name}.lora_down.weight", f"{name}.lora_up.weight", f"{name}.alpha"


SGM_PATHS: list[str] = []


@pytest.mark.parametrize(
    "spell", [_diffusers, _older, _processor, _text_linear, _peft, _kohya, _kohya_sgm], ids=lambda spell: spell.__name__
)
def test_every_spelling_is_the_same_adapter(
    tmp_path: Path, targets: Targets, spell: Callable[[str], tuple[str, str, str]]
) -> None:
    SGM_PATHS[:] = [name.removeprefix("unet.") for name in (*targets.linears, *targets.convolutions)]
    adapter = random_adapter(targets, 2, ranks=(2, 5), alphas=(4, 1))
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        for key, value in zip(spell(name), (module.a, module.b, torch.tensor(module.alpha)), strict=True):
            tensors[key] = value
    save_file(tensors, tmp_path / "a.safetensors")
    assert same(read_adapter(tmp_path / "a.safetensors", targets), adapter)


def test_projections_as_1x1_convolutions_and_whole_number_alphas(tmp_path: Path, targets: Targets) -> None:
    adapter = random_adapter(targets, 3, ranks=(4,), alphas=(2,), modules=r"unet.+proj_in")
    tensors: dict[str, torch.Tensor] = {}
    for name, module in adapter.modules.items():
        a, b, alpha = _kohya(name)
        tensors |= {a: module.a[..., None, None], b: module.b[..., None, None], alpha: torch.tensor([2])}
    save_file(tensors, tmp_path / "a.safetensors")
    assert same(read_adapter(tmp_path / "a.safetensors", targets), adapter)


def test_without_any_alpha_it_is_the_rank(tmp_path: Path, targets: Targets, adapter: Adapter) -> None:
    halves = {key: value for name, module in adapter.modules.items() for key, value in _halves(name, module)}
    save_file(halves, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert {module.scale for module in read_adapter(tmp_path / "a.safetensors", targets).modules.values()} == {1.0}


def test_the_header_says_what_is_in_the_file(tmp_path: Path, adapter: Adapter) -> None:
    write_adapter(adapter, tmp_path / "a.safetensors", file_format="kohya")
    raw = (tmp_path / "a.safetensors").read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    about = json.loads(metadata["lorafleet"])
    assert (about["rank"], about["tensors_sha256"]) == (8, adapter.digest())
    assert (metadata["ss_network_dim"], metadata["ss_network_module"]) == ("8", "networks.lora")


def _halves(name: str, module: LowRank) -> list[tuple[str, torch.Tensor]]:
    a, b, _ = _diffusers(name)
    return [(a, module.a), (b, module.b)]
