"""The training loop: draw, add noise, predict, loss, step, report. One process, torchrun or Ray Train: all the same.

Every worker holds the same weights and the same optimizer. A worker computes its portions of a step; the gradients of
all are summed in one go. An adapter is small, so nothing is sharded and nothing overlaps.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lorafleet.core.errors import ConfigError, TrainingFailed
from lorafleet.sdxl.base import Base
from lorafleet.train.adapter import TrainedAdapter
from lorafleet.train.batch import Batch, ahead, load_portion
from lorafleet.train.checkpoint import Checkpoints, Progress, Snapshot
from lorafleet.train.config import TrainConfig
from lorafleet.train.data import EncodedSet
from lorafleet.train.forward import Denoiser
from lorafleet.train.graphs import Graphs
from lorafleet.train.group import Group
from lorafleet.train.optimizer import RunningMean, learning_rate, make_optimizer
from lorafleet.train.preparation import prepare
from lorafleet.train.sampler import Portion, Sampler, StepPlan
from lorafleet.train.stopping import stop_signals
from lorafleet.train.validation import Validator, at_rest, note
from lorafleet.train.watch import StepReport, ValidationReport, Watcher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launched:
    """A step that has been given to the device. `numbers`: loss, gradient's norm and how many workers wish to stop, on
    the CPU once `done` is reached."""

    plan: StepPlan
    rate: float
    numbers: torch.Tensor
    done: torch.cuda.Event | None
    at: float


@dataclass(eq=False)
class Trainer:
    """Everything that a step needs and changes."""

    config: TrainConfig
    base: Base
    data: EncodedSet
    adapter: TrainedAdapter
    group: Group
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        config = self.config
        training = tuple(i for i, item in enumerate(self.data.items) if not item.held_out)
        held_out = tuple(i for i, item in enumerate(self.data.items) if item.held_out)
        if config.validation.patience is not None and not held_out:
            raise ConfigError(
                "validation.patience needs held-out images, and there are none: raise data.validation_share, or leave "
                "patience out",
                param="validation.patience",
            )
        self.sampler = Sampler(
            training,
            [self.data.items[i].bucket for i in training],
            seed=config.loop.seed,
            batch_size=config.loop.batch_size,
            portion=config.loop.portion,
        )
        self.validator = Validator(self.data, held_out, config.loop.seed) if held_out else None
        self.parameters = list(self.adapter.parameters.values())
        self.denoiser = Denoiser.of(self.base, self.adapter, config.objective)
        self.optimizer = make_optimizer(config.optimizer, self.parameters)
        # fp16 gradients of small losses are zero unless scaled: https://arxiv.org/abs/1710.03740, section 3.2
        self.scaler = torch.amp.GradScaler(
            self.group.device.type, init_scale=2.0**12, enabled=self.base.dtype == torch.float16
        )
        decay = config.optimizer.ema_decay
        self.mean = None if decay is None else RunningMean(decay, self.adapter.parameters)
        prepare(self.base, self.adapter, config.loop)
        self.adapter.train()
        self.is_on_gpu = self.group.device.type == "cuda"
        # Where the device itself can leave out a bad step, a step's numbers are read while the next one is computed
        can_skip = config.optimizer.name == "adamw" and self.mean is None and not self.scaler.is_enabled()
        self.lag = 1 if self.is_on_gpu and can_skip else 0
        self.outstanding = 0
        self._settled_at = 0.0
        loop = config.loop
        is_recorded = loop.cuda_graphs and loop.compile != "none" and not loop.gradient_checkpointing and self.lag > 0
        self.graphs = Graphs(self._losses, self.parameters) if is_recorded else None

    def batches(self) -> Iterator[Batch]:
        """This worker's portions from the next step on, made one ahead in a thread, on the CPU."""
        config, loop = self.config, self.config.loop

        def tasks() -> Iterator[Callable[[], Batch]]:
            for step in range(self.progress.step, loop.steps):
                for portion in self.sampler.step(step).portions[self.group.rank :: self.group.size]:
                    yield partial(
                        self._load,
                        portion,
                        step,
                        config=config.objective,
                        seed=loop.seed,
                        timesteps=max(1, round(config.objective.max_timestep * len(self.denoiser.alphas_cumprod))),
                        flip=config.data.flip,
                    )

        return ahead(tasks())

    def _load(self, portion: Portion, step: int, **options: Any) -> Batch:
        batch = load_portion(self.data, portion, step, **options)
        if self.config.loop.compile != "none":  # or the last portion of an epoch would be compiled for itself
            batch = batch.padded(self.config.loop.portion)
        return batch.pinned() if self.is_on_gpu else batch

    def step(self, batches: Iterator[Batch], wants_stop: bool) -> tuple[StepReport, bool]:
        """Takes one step; what it came to, and whether any worker wants to stop."""
        return self.settle(self.launch(batches, wants_stop))

    def launch(self, batches: Iterator[Batch], wants_stop: bool) -> Launched:
        """Gives the next step to the device. At most `lag` may be launched and not settled before it."""
        assert self.outstanding <= self.lag
        at = time.perf_counter()
        config = self.config
        plan = self.sampler.step(self.progress.step + self.outstanding)
        loss = torch.zeros((), device=self.group.device)
        for portion in plan.portions[self.group.rank :: self.group.size]:
            loss += self._passes(next(batches), len(portion), plan.samples)
        loss, wish = self._reduce(loss, wants_stop)
        rate = learning_rate(config.optimizer, plan.step, config.loop.steps)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip)
        numbers = torch.stack([loss, norm, wish])
        done = None
        if self.lag:
            # https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html, `fused`: what a scaler would set
            self.optimizer.found_inf = 1.0 - numbers[:2].isfinite().all().float()  # type: ignore[attr-defined]
            self._update(rate)
            numbers = numbers.to("cpu", non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        self.outstanding += 1
        return Launched(plan, rate, numbers, done, at)

    def settle(self, launched: Launched) -> tuple[StepReport, bool]:
        """What the oldest launched step came to, and whether any worker wants to stop."""
        if launched.done is not None:
            launched.done.synchronize()
        total, size, wish = launched.numbers.tolist()  # the one time that a GPU is waited for
        is_good = math.isfinite(total) and math.isfinite(size)
        progress = self.progress
        if not self.lag:
            if is_good:
                self._update(launched.rate)
                if self.mean is not None:
                    self.mean.update(progress.updates)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        progress.updates += is_good
        self.outstanding -= 1
        self._book(is_good)
        now = time.perf_counter()
        seconds = now - max(launched.at, self._settled_at)
        self._settled_at = now
        progress.seconds += seconds
        plan = launched.plan
        report = StepReport(progress.step, plan.epoch, total, launched.rate, size, plan.samples, seconds, is_good)
        return report, wish > 0

    def _losses(self, batch: Batch) -> torch.Tensor:
        return self.denoiser.losses(batch, min_snr_gamma=self.config.objective.min_snr_gamma)

    def _passes(self, batch: Batch, samples: int, of: int) -> torch.Tensor:
        """Adds a portion's share to the gradients; its share of the loss. Its first samples count, of so many."""
        if self.graphs is None:
            loss = self._losses(batch.to(self.group.device))[:samples].sum() / of
            torch.autograd.backward(self.scaler.scale(loss))
            return loss.detach()
        loss, gradients = self.graphs.run(batch, samples, of)
        sums = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if sums:
            torch._foreach_add_(sums, gradients)
        else:
            for parameter, gradient in zip(self.parameters, torch._foreach_mul(gradients, 1.0), strict=True):
                parameter.grad = gradient
        return loss

    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        if self.lag:
            self.optimizer.zero_grad(set_to_none=True)

    def snapshot(self) -> Snapshot:
        """Copies of everything on the CPU, the run goes on meanwhile."""
        return Snapshot(
            progress=replace(self.progress),
            weights=self.adapter.state(),
            mean=None if self.mean is None else self.mean.state(),
            optimizer=_on_cpu(self.optimizer.state_dict()),
            scaler=self.scaler.state_dict(),
        )

    def restore(self, snapshot: Snapshot) -> None:
        self.progress = replace(snapshot.progress)
        self.adapter.load(snapshot.weights)
        self.optimizer.load_state_dict(dict(snapshot.optimizer))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(snapshot.scaler))
        if self.mean is not None and snapshot.mean is not None:
            self.mean.load(snapshot.mean)

    @contextmanager
    def as_result(self) -> Iterator[None]:
        """The adapter as it would be handed out now: its running mean, without dropout. Nothing is compiled for it."""
        weights = None
        if self.mean is not None:
            weights = self.adapter.state()
            self.adapter.load(self.mean.state())
        try:
            with at_rest(self.adapter), ExitStack() as stack:
                if self.config.loop.compile != "none":
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                yield
        finally:
            if weights is not None:
                self.adapter.load(weights)

    def validate(self) -> float:
        """The validation loss, booked; the same on every worker. There must be held-out images."""
        assert self.validator is not None
        with self.as_result():
            loss = self.validator.loss(self.denoiser, self.group)
        note(self.progress, loss, self.config.validation)
        self.progress = self.group.agreed(self.progress)  # sums may differ in their last bit, decisions must not
        return loss

    def _reduce(self, loss: torch.Tensor, wants_stop: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums loss and gradients over all workers in one go, and with them the wish to stop."""
        for parameter in self.parameters:
            if parameter.grad is None:  # this worker had no portion
                parameter.grad = torch.zeros_like(parameter)
        wish = torch.full_like(loss, float(wants_stop))
        if self.group.size == 1:
            return loss, wish
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        flat = torch.cat([torch.stack([loss, wish]), *(gradient.reshape(-1) for gradient in gradients)])
        self.group.sum_(flat)
        summed = torch.split(flat[2:], [gradient.numel() for gradient in gradients])
        views = [values.view_as(gradient) for values, gradient in zip(summed, gradients, strict=True)]
        torch._foreach_copy_(gradients, views)
        return flat[0], flat[1]

    def _book(self, is_good: bool) -> None:
        progress, limit = self.progress, self.config.loop.max_bad_steps
        progress.step += 1
        progress.bad_in_a_row = 0 if is_good else progress.bad_in_a_row + 1
        progress.bad_steps += not is_good
        if progress.bad_in_a_row >= limit:
            raise TrainingFailed(
                f"the loss or its gradient was NaN or infinite for {limit} steps in a row (to step "
                f"{progress.step}): lower optimizer.lr, or set base.dtype to bfloat16 or float32",
                param="loop.max_bad_steps",
            )


def fit(trainer: Trainer, checkpoints: Checkpoints, watcher: Watcher | None) -> Snapshot:
    """Trains from the newest checkpoint, or from the start, to the end; the state there.

    Every worker calls it; the leading one has the watcher and writes the checkpoints. It ends early when patience is
    at an end (`progress.stopped_early`), and between two steps on SIGTERM or SIGINT, `progress.step` then being below
    `loop.steps`; either way the state is in a checkpoint. Raises TrainingFailed and CheckpointMismatch.
    """
    config = trainer.config
    group = trainer.group
    snapshot = group.agreed(checkpoints.newest() if group.leads else None)
    if snapshot is not None:
        trainer.restore(snapshot)
    elif watcher is not None:
        with trainer.as_result():
            watcher.before(trainer)
    stops = trainer.progress.stopped_early
    batches = trainer.batches()
    waiting: deque[Launched] = deque()
    with stop_signals() as asked:
        while trainer.progress.step < config.loop.steps and not stops:
            waiting.append(trainer.launch(batches, asked.is_set()))
            step = trainer.progress.step + len(waiting)
            is_last = step == config.loop.steps
            looks = is_last or step % config.validation.every_steps == 0
            saves = is_last or step % config.checkpoint.every_steps == 0
            while waiting and (looks or saves or stops or len(waiting) > trainer.lag):
                report, is_asked = trainer.settle(waiting.popleft())
                stops = stops or is_asked
                if watcher is not None:
                    watcher.step(report)
            loss = None
            if looks:
                loss = _look(trainer, watcher)
                stops = stops or trainer.progress.stopped_early
            if group.leads and (saves or stops or loss is not None):
                checkpoints.save(trainer.snapshot(), loss=loss)
    if group.leads:
        checkpoints.wait()
    return trainer.snapshot()


def _look(trainer: Trainer, watcher: Watcher | None) -> float | None:
    """Validation loss and sample pictures; every worker gets the loss, None without held-out images."""
    loss = trainer.validate() if trainer.validator is not None else None
    if watcher is not None:
        with trainer.as_result():
            watcher.validation(ValidationReport(trainer.progress.step, loss), trainer)
    return loss


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return value
