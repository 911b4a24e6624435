"""Files that are not read: each gets one sentence with the keys at fault, before anything large is allocated."""

import contextlib
import json
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lorafleet.core.errors import AdapterIncompatible, AdapterUnreadable, LorafleetError
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import MAX_HEADER_BYTES, Adapter
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import Targets, targets_of
from lorafleet.sdxl.lora_write import write_adapter

Tensors = dict[str, torch.Tensor]
MID = "unet.mid_block.attentions.0.transformer_blocks.0"
A, B = f"{MID}.attn1.to_q.lora_A.weight", f"{MID}.attn1.to_q.lora_B.weight"


@pytest.fixture(scope="session")
def targets(emojixl: Base) -> Targets:
    return targets_of(emojixl)


@pytest.fixture
def file(tmp_path: Path, targets: Targets) -> Path:
    """A sound adapter of a few modules."""
    write_adapter(random_adapter(targets, 0, ranks=(2,), modules=r"unet\.mid.+attn1.+"), tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


def pair(rank: int = 2, width: int = 160) -> Tensors:
    return {A: torch.ones(rank, width), B: torch.ones(width, rank)}


def refusal(file: Path, targets: Targets, kind: type[LorafleetError]) -> str:
    with pytest.raises(kind) as caught:
        read_adapter(file, targets)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 700
    return caught.value.message


# --- what is no safetensors file ---


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.bin", "a.PTH", "a.pkl"])
def test_pickles_are_known_by_name_and_not_opened(tmp_path: Path, targets: Targets, name: str) -> None:
    assert "pickle" in refusal(tmp_path / name, targets, AdapterUnreadable)  # it is not even there


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_are_known_by_their_first_bytes(tmp_path: Path, targets: Targets, protocol: int) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(pickle.dumps({"a": list(range(1000))}, protocol=protocol))
    assert "is a pickle" in refusal(file, targets, AdapterUnreadable)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    assert "is a pickle" in refusal(file, targets, AdapterUnreadable)


def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, targets: Targets) -> None:
    """640 bytes are 80 02 in hexadecimal, as a pickle starts."""
    file = tmp_path / "a.safetensors"
    save_file(pair(), file)
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    file.write_bytes(struct.pack("<Q", 640) + raw[8 : 8 + length].ljust(640) + raw[8 + length :])
    assert read_adapter(file, targets).rank == 2


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "claims terabytes": (lambda h: h[A].update(shape=[1 << 40, 160], data_offsets=[0, 1 << 45]), "header says"),
    "negative shape": (lambda h: h[A].update(shape=[-2, -160]), "impossible"),
    "truth for a number": (lambda h: h[A].update(shape=[True, 160]), "impossible"),
    "no offsets": (lambda h: h[A].pop("data_offsets"), "whole"),
    "overlap": (lambda h: h[A].update(data_offsets=h[B]["data_offsets"]), "header says"),
    "unknown type": (lambda h: h[A].update(dtype="F8_E4M3"), "F8_E4M3"),
    "entry is a list": (lambda h: h.update({A: []}), "whole"),
    "metadata is a number": (lambda h: h.update(__metadata__={"a": 1}), "metadata"),
    "metadata is a list": (lambda h: h.update(__metadata__=[]), "whole"),
    "header over the limit": (lambda h: h.update(__metadata__={"x": "y" * MAX_HEADER_BYTES}), "at most 1048576"),
    "bad own metadata": (lambda h: h.update(__metadata__={"lorafleet": "[]"}), "lorafleet"),
    "bad trigger words": (lambda h: h.update(__metadata__={"lorafleet": '{"trigger_words": 3}'}), "lorafleet"),
    "bad PEFT config": (lambda h: h.update(__metadata__={"adapter_config": "{"}), "configuration"),
    "alpha is a word": (lambda h: h.update(__metadata__={"adapter_config": '{"lora_alpha": "x"}'}), "lora_alpha"),
    "alpha is NaN": (lambda h: h.update(__metadata__={"adapter_config": '{"lora_alpha": NaN}'}), "lora_alpha"),
    "alpha beyond floats": (
        lambda h: h.update(__metadata__={"adapter_config": '{"lora_alpha": 1' + "0" * 400 + "}"}),
        "configuration",
    ),
    "a slow pattern": (
        lambda h: h.update(__metadata__={"adapter_config": '{"alpha_pattern": {"(a+)+$": 1}}'}),
        "alpha_pattern",
    ),
    "DoRA by config": (lambda h: h.update(__metadata__={"adapter_config": '{"use_dora": true}'}), "DoRA"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(tmp_path: Path, targets: Targets, case: str) -> None:
    change, words = HEADERS[case]
    file = tmp_path / "a.safetensors"
    save_file(pair(), file)
    with_header(file, change)
    tracemalloc.start()
    assert words in refusal(file, targets, AdapterUnreadable)
    assert tracemalloc.get_traced_memory()[1] < 8 * MAX_HEADER_BYTES
    tracemalloc.stop()


def test_deep_and_doubled_json(tmp_path: Path, targets: Targets) -> None:
    for text in (b'{"a":' * 50_000, b'{"a": {}, "a": {}}', b"{not json", b"[1, 2]   ", b"\xff\xfe"):
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
        refusal(tmp_path / "a.safetensors", targets, AdapterUnreadable)


def test_short_long_and_missing_files(file: Path, targets: Targets) -> None:
    raw = file.read_bytes()
    for damaged in (b"", raw[:5], raw[:8], raw[:100], raw[:-1], raw + b"\0"):
        file.write_bytes(damaged)
        refusal(file, targets, AdapterUnreadable)
    assert "cannot be read" in refusal(file.with_name("none.safetensors"), targets, AdapterUnreadable)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bytes_are_refused_or_change_no_number(file: Path, targets: Targets, data: st.DataObject) -> None:
    """The hash in the header sees what the checks of the structure do not."""
    sound = file.read_bytes()
    digest = read_adapter(file, targets).digest()
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        header = 8 + struct.unpack("<Q", sound[:8])[0]
        where = data.draw(st.one_of(st.integers(0, header - 1), st.integers(0, len(sound) - 1)))
        damaged[where] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    with contextlib.suppress(AdapterUnreadable, AdapterIncompatible):
        has_hash = b'"lorafleet"' in damaged and b"tensors_sha256" in damaged
        assert read_adapter(file, targets).digest() == digest or not has_hash
    file.write_bytes(sound)


# --- what is a safetensors file, but no adapter of this base ---

CASES: dict[str, tuple[Tensors, type[LorafleetError], str]] = {
    "empty": ({}, AdapterUnreadable, "no tensors"),
    "a checkpoint": ({"unet.conv_in.weight": torch.ones(2)}, AdapterUnreadable, "'unet.conv_in.weight'"),
    "one unknown": ({**pair(), "bundle_emb.x": torch.ones(2)}, AdapterUnreadable, "'bundle_emb.x'"),
    "only A": ({A: torch.ones(2, 160)}, AdapterUnreadable, "attn1.to_q'"),
    "only alpha": (
        {**pair(), f"{MID}.attn1.to_k.alpha": torch.tensor(1.0)},
        AdapterUnreadable,
        "one half of its A/B (down/up) pairs for 'unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k'",
    ),
    "named twice": (
        {**pair(), "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_down.weight": torch.ones(2, 160)},
        AdapterUnreadable,
        "twice",
    ),
    "DoRA": ({**pair(), f"{MID}.attn1.to_q.lora_magnitude_vector": torch.ones(2)}, AdapterUnreadable, "a DoRA"),
    "kohya's DoRA": ({"lora_unet_x.dora_scale": torch.ones(2)}, AdapterUnreadable, "'lora_unet_x.dora_scale'"),
    "LoHa": ({"lora_unet_x.hada_w1_a": torch.ones(2)}, AdapterUnreadable, "a LoHa"),
    "LoKr": ({"lora_unet_x.lokr_w1": torch.ones(2)}, AdapterUnreadable, "a LoKr"),
    "whole numbers": ({A: torch.ones(2, 160).int(), B: torch.ones(160, 2)}, AdapterUnreadable, "type I32"),
    "two alphas": ({**pair(), f"{MID}.attn1.to_q.alpha": torch.ones(2)}, AdapterUnreadable, "one number"),
    "NaN": ({A: torch.full((2, 160), float("nan")), B: torch.ones(160, 2)}, AdapterUnreadable, "NaN"),
    "Inf": ({**pair(), B: torch.full((160, 2), float("inf"))}, AdapterUnreadable, f"'{B}' holds NaN or infinity"),
    "alpha NaN": ({**pair(), f"{MID}.attn1.to_q.alpha": torch.tensor(float("nan"))}, AdapterUnreadable, "alpha"),
    "LoCon": (
        {
            "lora_unet_middle_block_0_in_layers_2.lora_down.weight": torch.ones(2, 160, 3, 3),
            "lora_unet_middle_block_0_in_layers_2.lora_up.weight": torch.ones(160, 2, 1, 1),
        },
        AdapterIncompatible,
        "'lora_unet_middle_block_0_in_layers_2'",
    ),
    "3x3 on a linear": ({**pair(), A: torch.ones(2, 160, 3, 3)}, AdapterIncompatible, "LoCon"),
    "rank 129": (pair(rank=129), AdapterIncompatible, "rank 129, allowed are 1 to 128"),
    "rank 0": (pair(rank=0), AdapterIncompatible, "rank 0"),
    "ranks differ": ({A: torch.ones(2, 160), B: torch.ones(160, 3)}, AdapterIncompatible, "[160, 3]"),
    "another width": (pair(width=640), AdapterIncompatible, "this base needs [2, 160] and [160, 2]"),
    "other blocks": (
        {
            f"lora_unet_input_blocks_{n}_1_proj_in.lora_{half}.weight": torch.ones(2, 2)
            for n in range(20, 25)
            for half in ("down", "up")
        },
        AdapterIncompatible,
        "and 7 more (10 in all)",
    ),
    "which text encoder": (
        {
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 128),
            "base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.ones(128, 2),
        },
        AdapterIncompatible,
        "several parts",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_files_that_are_no_adapter_for_this_base(tmp_path: Path, targets: Targets, case: str) -> None:
    tensors, kind, words = CASES[case]
    save_file(tensors, tmp_path / "a.safetensors")
    assert words in refusal(tmp_path / "a.safetensors", targets, kind)


def test_another_bases_adapter(tmp_path: Path, targets: Targets) -> None:
    made = random_adapter(targets, 0, modules=r"unet\.mid.+")
    write_adapter(Adapter(made.modules, base_fingerprint="f" * 64), tmp_path / "a.safetensors")
    assert "another base (fingerprint ffffffffffff" in refusal(tmp_path / "a.safetensors", targets, AdapterIncompatible)


def test_sizes_are_checked_before_a_tensor_is_read(tmp_path: Path, targets: Targets) -> None:
    """A file may be as long as it says and still ask for too much: 100 MB for one module."""
    path = tmp_path / "a.safetensors"
    rows = 25_000_000 // 160
    header = json.dumps({A: {"dtype": "F32", "shape": [rows, 160], "data_offsets": [0, rows * 640]}}).encode()
    with path.open("wb") as sparse:
        sparse.write(struct.pack("<Q", len(header)) + header)
        sparse.truncate(8 + len(header) + rows * 640)
    tracemalloc.start()
    refusal(path, targets, AdapterUnreadable)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
