"""Joined self attentions, which engines have on a GPU only, on a CPU: the numbers are the same, and nothing is left."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.serve.config import BankConfig
from lorafleet.serve.engine import fp8, resnets
from lorafleet.serve.engine.bank import AdapterBank, Lease
from lorafleet.serve.engine.self_attention import SelfAttention, _Joined
from lorafleet.serve.engine.slots import SlotLinear

MODULES = r"unet\..+\.attn[12]\..+"
ROWS = 3


@pytest.fixture
def bank(own: Base) -> Iterator[AdapterBank]:
    with AdapterBank(own, BankConfig(slots=2, max_rank=8, per_row=2, rows=ROWS, targets=MODULES)) as bank:
        yield bank


@pytest.fixture
def leases(bank: AdapterBank) -> Iterator[list[Lease]]:
    adapters = [random_adapter(bank.targets, i, ranks=(3 + i,), alphas=(4.0,), modules=MODULES) for i in range(2)]
    leases = [bank.acquire(str(i), lambda adapter=adapter: adapter) for i, adapter in enumerate(adapters)]  # type: ignore[misc]
    bank.publish()
    yield leases
    for lease in leases:
        lease.release()


@torch.inference_mode()
def unet(base: Base) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(ROWS, *shape, generator=draw) for shape in ((4, 8, 8), (40, 256), (128,), (6,))]
    noise, hidden, pooled, time_ids = inputs
    conditions = {"text_embeds": pooled, "time_ids": time_ids}
    output: torch.Tensor = base.pipeline.unet(
        noise, 500, encoder_hidden_states=hidden, added_cond_kwargs=conditions, return_dict=False
    )[0]
    return output


def joined(base: Base) -> list[str]:
    return [path for path, module in base.pipeline.unet.named_modules() if isinstance(module, _Joined)]


def test_without_a_bank(own: Base) -> None:
    expected = unet(own)
    projections = {path: m for path, m in own.pipeline.unet.named_modules() if ".attn1.to_" in path}
    together = SelfAttention(own)
    assert len(joined(own)) == 7
    assert (unet(own) - expected).abs().max() < 1e-4
    together.close()
    assert not joined(own)
    assert {path: m for path, m in own.pipeline.unet.named_modules() if ".attn1.to_" in path} == projections
    assert torch.equal(unet(own), expected)


@pytest.mark.parametrize("goes_row_by_row", [True, False])
def test_with_adapters(own: Base, bank: AdapterBank, leases: list[Lease], goes_row_by_row: bool) -> None:
    """Rows with none, one and two, where all three projections are of one shape that fills the GPU kernels' tiles."""
    first, second = (lease.slot for lease in leases)
    bank.set_rows([[], [(first, 0.7)], [(second, -1.0), (first, 1.5)]])
    expected = unet(own)
    together = SelfAttention(own, bank)
    assert 0 < len(joined(own)) < 7  # 128 features are joined, 160 are not
    for module in own.pipeline.unet.modules():
        if isinstance(module, SlotLinear):
            module.goes_row_by_row = goes_row_by_row
    assert (unet(own) - expected).abs().max() < 1e-4
    bank.set_rows([])
    assert (unet(own)[1:] - expected[1:]).abs().max() > 1e-3
    together.close()


@pytest.mark.parametrize("has_bank", [True, False])
def test_eight_bit_products_take_the_joined_one(own: Base, has_bank: bool) -> None:
    settings = BankConfig(slots=2, max_rank=8, rows=ROWS, targets=MODULES)
    with contextlib.ExitStack() as stack:
        bank = stack.enter_context(AdapterBank(own, settings)) if has_bank else None
        expected = unet(own)
        together = SelfAttention(own, bank)
        with fp8.emulated():
            weights = fp8.Fp8Weights(own, dict.fromkeys(fp8._linears(own), 8.0))
            together.share_weights()
        products = [own.pipeline.unet.get_submodule(f"{path}.joined").product for path in joined(own)]
        assert products
        assert all(isinstance(product, fp8.Fp8Product) for product in products)
        error = (unet(own) - expected).norm() / expected.norm()
        assert 1e-3 < error < 0.3
        weights.close()
        together.share_weights()
        together.close()
        assert torch.equal(unet(own), expected)


def test_convolutions_get_channels_last_and_slots_stay_where_they_are(
    own: Base, bank: AdapterBank, leases: list[Lease]
) -> None:
    bank.set_rows([[(leases[0].slot, 1.0)]] * ROWS)
    expected = unet(own)
    resnets.put_channels_last(own.pipeline.unet)
    assert (unet(own) - expected).abs().max() < 1e-4
    convolutions = [module for module in own.pipeline.unet.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.weight.is_contiguous(memory_format=torch.channels_last) for module in convolutions)
    whole = bank._storage.untyped_storage().data_ptr()
    slots = [module for module in own.pipeline.unet.modules() if isinstance(module, SlotLinear)]
    assert {view.untyped_storage().data_ptr() for slot in slots for view in (slot.slot_a, slot.slot_b)} == {whole}
    for module in convolutions:  # others compare this base's images with diffusers' bit for bit
        module.weight.data = module.weight.data.contiguous()
