"""Resnets as a GPU computes them, on a CPU: with PyTorch's own normalisation in place of the GPU's kernel."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from lorafleet.sdxl.base import Base
from lorafleet.serve.engine import resnets


def normalised(
    norm: nn.GroupNorm, x: torch.Tensor, offset: torch.Tensor | None = None, *, is_activated: bool = False
) -> torch.Tensor:
    moved = x if offset is None else x + offset[:, :, None, None]
    y = functional.group_norm(moved, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return functional.silu(y) if is_activated else y


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resnets, "_has_kernels", lambda: True)
    monkeypatch.setattr(resnets, "_normalised", normalised)


def kinds(model: nn.Module) -> list[type[nn.Module]]:
    found = [type(module) for module in model.modules()]
    return [kind for kind in found if kind in (resnets.QuickResnet, resnets.QuickGroupNorm)]


@torch.inference_mode()
def test_a_unet(own: Base) -> None:
    unet = own.pipeline.unet
    draw = torch.Generator().manual_seed(0)
    noise, hidden, pooled, time_ids = (
        torch.randn(2, *shape, generator=draw) for shape in ((4, 8, 8), (40, 256), (128,), (6,))
    )

    def run() -> torch.Tensor:
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        y: torch.Tensor = unet(noise, 500, hidden, added_cond_kwargs=conditions, return_dict=False)[0]
        return y

    expected = run()
    resnets.quicken(unet)
    count = sum(isinstance(module, ResnetBlock2D) for module in unet.modules())
    assert kinds(unet) == [resnets.QuickResnet] * count + [resnets.QuickGroupNorm]
    assert (run() - expected).abs().max() < 1e-4
    resnets.restore(unet)
    assert not kinds(unet)
    assert torch.equal(run(), expected)


@torch.inference_mode()
def test_a_decoder(own: Base) -> None:
    """Its resnets take no time."""
    vae = own.pipeline.vae
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents).sample
    resnets.quicken(vae.decoder)
    try:
        assert resnets.QuickResnet in kinds(vae.decoder)
        assert (vae.decode(latents).sample - expected).abs().max() < 1e-4
    finally:
        resnets.restore(vae.decoder)


def test_what_does_more_is_left_alone() -> None:
    model = nn.Sequential(
        ResnetBlock2D(in_channels=32, temb_channels=8, up=True),
        ResnetBlock2D(in_channels=32, temb_channels=8, time_embedding_norm="scale_shift"),
        ResnetBlock2D(in_channels=32, temb_channels=8, output_scale_factor=2.0),
        ResnetBlock2D(in_channels=32, temb_channels=8, non_linearity="mish"),
        nn.GroupNorm(4, 32),
    )
    resnets.quicken(model)
    assert not kinds(model)
