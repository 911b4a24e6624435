import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn import functional

from lorafleet.serve.engine import resnets


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda")


@pytest.mark.parametrize(
    ("rows", "channels", "height", "width"),
    [(1, 128, 1024, 1024), (16, 320, 128, 128), (2, 960, 24, 40), (3, 64, 5, 7)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_a_normalisation_with_what_is_around_it(
    rows: int, channels: int, height: int, width: int, dtype: torch.dtype, tolerance: float
) -> None:
    from lorafleet.serve.engine.norm_kernels import group_norm

    torch.manual_seed(0)
    x = (noise(rows, channels, height, width) + 3).to(dtype).to(memory_format=torch.channels_last)
    offset, weight, bias = noise(rows, channels).to(dtype), noise(channels).to(dtype), noise(channels).to(dtype)
    for added, is_activated in ((None, False), (offset, True), (offset[:1], True)):
        moved = x.float() if added is None else x.float() + added[:, :, None, None].float()
        expected = functional.group_norm(moved, 32, weight.float(), bias.float(), 1e-5)
        expected = functional.silu(expected) if is_activated else expected
        y = group_norm(x, added, weight, bias, 32, 1e-5, is_activated)
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert (y.float() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("time_features", [None, 48])
def test_a_resnet_is_itself_again_afterwards(time_features: int | None) -> None:
    model = nn.Sequential(
        ResnetBlock2D(in_channels=64, out_channels=128, temb_channels=time_features, groups=32),
        ResnetBlock2D(in_channels=64, out_channels=128, temb_channels=time_features, groups=32, up=True),
    )
    model = model.cuda().eval().requires_grad_(False)
    resnets.put_channels_last(model)
    x = noise(2, 64, 12, 12).to(memory_format=torch.channels_last)
    time = None if time_features is None else noise(2, time_features)
    before = [resnet(x, time) for resnet in model]
    resnets.quicken(model)
    assert [type(resnet) for resnet in model] == [resnets.QuickResnet, ResnetBlock2D]
    for resnet, expected in zip(model, before, strict=True):
        assert (resnet(x, time) - expected).norm() / expected.norm() < 1e-3  # tensor cores' float32 in convolutions
    resnets.restore(model)
    assert [type(resnet) for resnet in model] == [ResnetBlock2D, ResnetBlock2D]
