"""The loss that says whether training helps: held-out images at eight fixed timesteps, the same noise every time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from lorafleet.train.adapter import TrainedAdapter
from lorafleet.train.batch import fixed_sample
from lorafleet.train.checkpoint import Progress
from lorafleet.train.config import ValidationConfig
from lorafleet.train.data import EncodedSet
from lorafleet.train.forward import Denoiser
from lorafleet.train.group import Group

TIMESTEPS: Final = 8


@dataclass(frozen=True)
class Validator:
    """Measures all workers' share of the held-out images; every worker must call it and gets the same number."""

    data: EncodedSet
    held_out: tuple[int, ...]
    seed: int

    @torch.no_grad()
    def loss(self, denoiser: Denoiser, group: Group) -> float:
        """The mean squared error without weights, over images and timesteps."""
        length = len(denoiser.alphas_cumprod)
        steps = [length * (2 * i + 1) // (2 * TIMESTEPS) for i in range(TIMESTEPS)]
        pairs = [(item, timestep) for item in self.held_out for timestep in steps]
        total = torch.zeros(1, dtype=torch.float64, device=group.device)
        for item, timestep in pairs[group.rank :: group.size]:
            batch = fixed_sample(self.data, item, timestep, self.seed).to(group.device)
            total += denoiser.losses(batch, min_snr_gamma=None).double().sum()
        group.sum_(total)
        return float(total) / len(pairs)


def note(progress: Progress, loss: float, config: ValidationConfig) -> None:
    """Books a validation: the best loss so far, and whether patience is at an end."""
    if progress.best_loss is None or loss < progress.best_loss - config.min_delta:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.validations_without_gain = 0
    else:
        progress.validations_without_gain += 1
    progress.stopped_early = config.patience is not None and progress.validations_without_gain >= config.patience


@contextmanager
def at_rest(adapter: TrainedAdapter) -> Iterator[None]:
    """The adapter as it will be used: without dropout."""
    adapter.train(False)
    try:
        yield
    finally:
        adapter.train()
