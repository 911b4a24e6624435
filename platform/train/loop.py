"""The training loop: draw, add noise, predict, loss, step, report. One process, torchrun or Ray Train: all the same.

Every worker holds the same weights and the same optimizer. A worker computes its portions of a step; the gradients of
all are summed in one go. An adapter is small, so nothing is sharded and nothing overlaps.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from lorafleet.train.group import Group
from lorafleet.train.optimizer import RunningMean, learning_rate, make_optimizer
from lorafleet.train.quantise import quantise_linears
from lorafleet.train.sampler import Sampler
from lorafleet.train.validation import Validator, at_rest, note
from lorafleet.train.watch import StepReport, ValidationReport, Watcher

logger = logging.getLogger(__name__)


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
        if config.loop.gradient_checkpointing:
            _checkpoint_gradients(self.base, self.adapter.parts)
        if config.loop.quantise_base:
            quantise_linears(self.base.pipeline.unet)
        if config.loop.compile != "none":
            _compile(self.base.pipeline.unet, is_whole=config.loop.compile == "full")
        self.adapter.train()

    def batches(self) -> Iterator[Batch]:
        """This worker's portions from the next step on, made one ahead in a thread, on the CPU."""
        config, loop = self.config, self.config.loop

        def tasks() -> Iterator[Callable[[], Batch]]:
            for step in range(self.progress.step, loop.steps):
                for portion in self.sampler.step(step).portions[self.group.rank :: self.group.size]:
                    yield partial(
                        load_portion,
                        self.data,
                        portion,
                        step,
                        config=config.objective,
                        seed=loop.seed,
                        timesteps=max(1, round(config.objective.max_timestep * len(self.denoiser.alphas_cumprod))),
                        flip=config.data.flip,
                    )

        return ahead(tasks())

    def step(self, batches: Iterator[Batch], wants_stop: bool) -> tuple[StepReport, bool]:
        """Takes one step; what it came to, and whether any worker wants to stop."""
        started = time.perf_counter()
        config, progress = self.config, self.progress
        plan = self.sampler.step(progress.step)
        loss = torch.zeros((), device=self.group.device)
        for _ in plan.portions[self.group.rank :: self.group.size]:
            batch = next(batches).to(self.group.device)
            losses = self.denoiser.losses(batch, min_snr_gamma=config.objective.min_snr_gamma)
            portion_loss = losses.sum() / plan.samples
            torch.autograd.backward(self.scaler.scale(portion_loss))
            loss += portion_loss.detach()
        loss, stops = self._reduce(loss, wants_stop)
        rate = learning_rate(config.optimizer, progress.step, config.loop.steps)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip)
        total, size = torch.stack([loss, norm]).tolist()  # the one time that a GPU is waited for
        is_good = math.isfinite(total) and math.isfinite(size)
        if is_good:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(self.optimizer)
            if self.mean is not None:
                self.mean.update(progress.updates)
            progress.updates += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._book(is_good)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        return StepReport(progress.step, plan.epoch, total, rate, size, plan.samples, seconds, is_good), stops

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
        """The adapter as it would be handed out now: its running mean, without dropout."""
        weights = None
        if self.mean is not None:
            weights = self.adapter.state()
            self.adapter.load(self.mean.state())
        try:
            with at_rest(self.adapter):
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

    def _reduce(self, loss: torch.Tensor, wants_stop: bool) -> tuple[torch.Tensor, bool]:
        """Sums loss and gradients over all workers in one go, and with them the wish to stop."""
        for parameter in self.parameters:
            if parameter.grad is None:  # this worker had no portion
                parameter.grad = torch.zeros_like(parameter)
        if self.group.size == 1:
            return loss, wants_stop
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        wish = loss.new_tensor([float(wants_stop)])
        flat = torch.cat([loss.reshape(1), wish, *(gradient.reshape(-1) for gradient in gradients)])
        self.group.sum_(flat)
        summed = torch.split(flat[2:], [gradient.numel() for gradient in gradients])
        for gradient, values in zip(gradients, summed, strict=True):
            gradient.copy_(values.view_as(gradient))
        return flat[0], bool(flat[1] > 0)

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
    with _stop_signals() as asked:
        while trainer.progress.step < config.loop.steps and not stops:
            report, stops = trainer.step(batches, asked.is_set())
            if watcher is not None:
                watcher.step(report)
            step = trainer.progress.step
            is_last = step == config.loop.steps
            loss = None
            if is_last or step % config.validation.every_steps == 0:
                loss = _look(trainer, watcher)
                stops = stops or trainer.progress.stopped_early
            if group.leads and (stops or is_last or step % config.checkpoint.every_steps == 0 or loss is not None):
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


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set on the first SIGTERM or SIGINT, if this is the main thread; the second one ends the process as ever."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_signal(number: int, _: object) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checkpoint_gradients(base: Base, parts: tuple[str, ...]) -> None:
    for part in parts:
        model = getattr(base.pipeline, part)
        if part == "unet":
            model.enable_gradient_checkpointing()
        else:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})


def _compile(unet: Any, *, is_whole: bool) -> None:
    """In place. Convolutions like channels last once the norms around them are compiled too."""
    if is_whole:
        unet.to(memory_format=torch.channels_last)
        unet.compile(fullgraph=True)
    else:
        unet.compile_repeated_blocks(fullgraph=True)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _on_cpu(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(inner) for inner in value)
    return value
