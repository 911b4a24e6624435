"""The optimizer by name, its learning rate at every step, and a running mean of the weights."""

import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorafleet.core.errors import ConfigError
from lorafleet.train.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Raises ConfigError where its library is not installed or has no kernels for the device."""
    common: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if config.name == "adamw":
        return torch.optim.AdamW(parameters, **common, fused=parameters[0].device.type == "cuda")
    if config.name == "prodigy":
        prodigy: Any = _library("prodigyopt", "prodigy")
        optimizer: torch.optim.Optimizer = prodigy.Prodigy(
            parameters, **common, decouple=True, use_bias_correction=True, safeguard_warmup=True
        )
        return optimizer
    if parameters[0].device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"optimizer.name=adamw8bit needs a CUDA GPU or a CPU, the device is {parameters[0].device.type}: set "
            "optimizer.name=adamw",
            param="optimizer.name",
        )
    bitsandbytes: Any = _library("bitsandbytes", "adamw8bit")
    eight_bit: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **common)
    return eight_bit


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Of step 0 to steps - 1: up in a straight line, then half a cosine (https://arxiv.org/abs/1608.03983, equation
    5)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    low = config.final_lr_share
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)))


class RunningMean:
    """An exponential mean of the weights, float32, on their device. Early on it decays faster, min(decay,
    (1+n)/(10+n)), so that the zeros at the start are forgotten."""

    def __init__(self, decay: float, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._decay = decay
        self._parameters = parameters
        self._mean = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """`updates`: how many there have been before."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        for name, mean in self._mean.items():
            mean.lerp_(self._parameters[name].detach(), 1 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        return {name: mean.to("cpu", copy=True) for name, mean in self._mean.items()}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, mean in self._mean.items():
            mean.copy_(state[name])


def _library(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name={name} needs the package {module}: pip install 'lorafleet[{name}]', or set "
            "optimizer.name=adamw",
            param="optimizer.name",
        ) from error
