"""A base with 8-bit linears: smaller, nearly the same, and trained just so."""

import torch

from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.adapter import attach
from lorafleet.train.config import AdapterConfig
from lorafleet.train.quantise import Int8Linear, quantise_linears


def test_a_rows_error_is_below_a_step_of_its_scale() -> None:
    linear = torch.nn.Linear(64, 32)
    small = Int8Linear(linear)
    assert small.integers.dtype == torch.int8
    errors = (small.weight - linear.weight).abs()
    assert (errors <= linear.weight.abs().amax(1, keepdim=True) / 127 * 0.51).all()
    x = torch.randn(5, 64)
    torch.testing.assert_close(small(x), linear(x), atol=0.05, rtol=0)


def test_the_adapters_own_weights_stay_as_they_are() -> None:
    base = load_base(BaseConfig(device="cpu"))
    adapter = attach(base, AdapterConfig(), seed=0)
    before = sum(tensor.numel() for tensor in base.pipeline.unet.parameters())
    exchanged = quantise_linears(base.pipeline.unet)
    assert exchanged > len(adapter.layers) == 56
    assert sum(tensor.numel() for tensor in base.pipeline.unet.parameters()) < 0.6 * before
    unet_parameters = {id(tensor) for tensor in base.pipeline.unet.parameters()}
    assert all(id(tensor) in unet_parameters and tensor.requires_grad for tensor in adapter.parameters.values())
    assert not any(isinstance(module, torch.nn.Linear) for module in base.pipeline.unet.modules())
