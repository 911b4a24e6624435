"""One training loop for all stages: seeded by (stage, step), resumable, with a progress bar."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lorafleet.models.build import config
from lorafleet.models.build.config import Stage

StepLoss = Callable[[int, torch.Generator], Mapping[str, Tensor]]
"""(step, generator) -> losses: "loss" is minimised, the others are shown."""

SAVE_EVERY_S = 90.0
REPORT_EVERY = 200  # steps
WARM_STEPS = 20  # compiling and caches; left out of the pace


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator that depends on `key` alone, so that a resumed run draws what an undisturbed one would."""
    digest = hashlib.sha256(repr((config.SEED, *key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


class Average:
    """Exponential moving average of a module's parameters (Polyak averaging)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.parameters: list[Tensor] = list(module.parameters())
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 100))
        torch._foreach_lerp_(self.values, self.parameters, 1 - decay)

    @torch.no_grad()
    def copy_to_module(self) -> None:
        torch._foreach_copy_(self.parameters, self.values)


def rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to a hundredth."""
    return stage.peak_lr * min(1.0, (step + 1) / stage.warmup) * max(0.01, 1 - step / steps)


def train(
    name: str,
    stage: Stage,
    module: nn.Module,
    loss_of: StepLoss,
    folder: Path,
    deadline_s: float | None = None,
    fit: bool = False,
) -> bool:
    """Train `module` in place on `loss_of`.

    Goes on from `folder/<name>.pt` if that is there. At `deadline_s` (`time.monotonic()`) it stops, saved, and says
    False; with `fit` the number of steps is instead stretched or cut to end there, at the pace measured. True when all
    steps are done, with the averaged weights in the module if the stage averages.
    """
    device = next(module.parameters()).device
    optimizer = torch.optim.AdamW(
        module.parameters(), stage.peak_lr, weight_decay=stage.weight_decay, fused=device.type == "cuda"
    )
    average = Average(module, stage.ema_decay) if stage.ema_decay else None
    path, step, steps = folder / f"{name}.pt", 0, stage.steps
    if path.exists():
        state = torch.load(path, map_location=device)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.values = state["average"]
        step, steps = state["step"], state["steps"]

    def save() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        values = average.values if average else None
        state = dict(module=module.state_dict(), optimizer=optimizer.state_dict(), average=values)
        torch.save(state | dict(step=step, steps=steps), part)
        part.replace(path)

    bar = tqdm(initial=step, total=steps, desc=name, mininterval=5.0)
    saved, first, mark = time.monotonic(), step, (step, 0.0)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(stage, step, steps)
        losses = loss_of(step, generator(device, name, step))
        optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if average:
            average.update(step)
        step += 1
        bar.update()
        if step == first + WARM_STEPS:
            mark = (step, time.monotonic())
        if step % REPORT_EVERY == 0 or step == steps:
            values = {k: v.item() for k, v in losses.items()}
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(f"{name}: loss is not finite at step {step}: {values}")
            bar.set_postfix({k: f"{v:.4f}" for k, v in values.items()})
            now = time.monotonic()
            if fit and deadline_s is not None and step - mark[0] >= REPORT_EVERY:
                pace = (step - mark[0]) / (now - mark[1])
                steps, mark = max(step, step + int(pace * (deadline_s - now))), (step, now)
                bar.total = steps
            if now - saved > SAVE_EVERY_S:
                save()
                saved = now
        if not fit and deadline_s is not None and time.monotonic() > deadline_s:
            break
    save()
    bar.close()
    if step == steps and average:
        average.copy_to_module()
    return step == steps
