"""The learning rate of every step, and optimizers by name."""

import io

import pytest
import torch

from lorafleet.core.errors import ConfigError
from lorafleet.train.config import OptimizerConfig
from lorafleet.train.optimizer import RunningMean, learning_rate, make_optimizer


def test_the_rate_rises_in_a_line_and_falls_as_half_a_cosine() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, final_lr_share=0.1)
    rates = [learning_rate(config, step, 104) for step in range(104)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_prodigy_takes_a_step_by_itself() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(OptimizerConfig(name="prodigy", lr=1.0), [weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()


def test_eight_bits_need_a_device_that_has_them() -> None:
    with pytest.raises(ConfigError, match=r"adamw8bit needs a CUDA GPU or a CPU.*optimizer\.name=adamw"):
        make_optimizer(OptimizerConfig(name="adamw8bit"), [torch.nn.Parameter(torch.ones(3, device="meta"))])


def test_eight_bits_go_on_from_a_checkpoint_as_they_were() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'lorafleet[adamw8bit]'")
    gradients = [torch.randn(64, 128, generator=torch.Generator().manual_seed(i)) for i in range(5)]

    def stepped(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: list[torch.Tensor]) -> None:
        for gradient in steps:
            weight.grad = gradient.clone()
            optimizer.step()

    weight = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = make_optimizer(OptimizerConfig(name="adamw8bit", lr=1e-2), [weight])
    stepped(weight, optimizer, gradients[:3])
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    stream = io.BytesIO()
    torch.save(optimizer.state_dict(), stream)
    stream.seek(0)
    other = torch.nn.Parameter(weight.detach().clone())
    again = make_optimizer(OptimizerConfig(name="adamw8bit", lr=1e-2), [other])
    again.load_state_dict(torch.load(stream, weights_only=True))
    stepped(weight, optimizer, gradients[3:])
    stepped(other, again, gradients[3:])
    assert (weight < 1).any()
    assert torch.equal(weight, other)


def test_the_running_mean_follows_and_comes_back() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    mean = RunningMean(0.5, {"w": weight})
    with torch.no_grad():
        weight.fill_(1.0)
    mean.update(0)
    assert mean.state()["w"].tolist() == pytest.approx([0.9, 0.9])  # (1 + 0) / (10 + 0) of the old one is left
    for updates in range(100, 103):
        mean.update(updates)
    assert mean.state()["w"].tolist() == pytest.approx([1 - 0.1 / 8] * 2)
    other = RunningMean(0.5, {"w": weight})
    other.load(mean.state())
    assert torch.equal(other.state()["w"], mean.state()["w"])
