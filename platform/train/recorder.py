"""The watcher of a run: writes its folder, tells the trackers, makes the sample pictures."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.clip_score import ClipScorer, clip_scores, scorer_of
from lorafleet.sdxl.reference import generate
from lorafleet.train.config import TrainConfig, ValidationConfig
from lorafleet.train.parking import unparked
from lorafleet.train.watch import (
    PROGRESS_FILE,
    Bar,
    ProgressFile,
    SampleReport,
    StepReport,
    Tracker,
    ValidationReport,
    step_line,
    step_numbers,
)

if TYPE_CHECKING:
    from lorafleet.train.loop import Trainer

logger = logging.getLogger(__name__)


class Recorder:
    """A Watcher. What a tracker raises is logged and the tracker left out: no run ends for its watchers."""

    def __init__(
        self, config: TrainConfig, base: Base, folder: Path, trackers: Sequence[Tracker], *, bar: Bar | None = None
    ) -> None:
        self._config = config
        self._folder = folder
        self._trackers = list(trackers)
        self._file = ProgressFile(folder / PROGRESS_FILE)
        self._bar = bar
        self._scorer: ClipScorer | None = None
        if config.validation.prompts:
            self._scorer = scorer_of(base.folder.root, base.device)

    def before(self, trainer: "Trainer") -> None:
        if self._config.validation.prompts:
            self._sample(trainer.base, 0)

    def step(self, report: StepReport) -> None:
        self._file.write("step", report.step, step_line(report))
        self._numbers(step_numbers(report), report.step)
        if self._bar is not None:
            self._bar.step(report)

    def validation(self, report: ValidationReport, trainer: "Trainer") -> None:
        numbers = {} if report.loss is None else {"validation/loss": report.loss}
        scores = self._sample(trainer.base, report.step) if self._config.validation.prompts else None
        if scores is not None:
            numbers["validation/clip_score"] = sum(scores) / len(scores)
        clip_score = numbers.get("validation/clip_score")
        self._file.write("validation", report.step, {"loss": report.loss, "clip_score": clip_score})
        self._numbers(numbers, report.step)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._file.close()
        for tracker in self._trackers:
            try:
                tracker.close()
            except Exception:  # a tracker's server may be gone
                logger.exception("%s could not be closed", type(tracker).__name__)

    def _sample(self, base: Base, step: int) -> tuple[float, ...] | None:
        report = sample_pictures(base, self._config.validation, step, self._scorer)
        folder = self._folder / "samples" / f"step-{step:07}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(report.images):
            image.save(folder / f"{i:02}.png")
        for tracker in list(self._trackers):
            self._told(tracker, partial(tracker.images, report))
        return report.clip_scores

    def _numbers(self, numbers: dict[str, float], step: int) -> None:
        for tracker in list(self._trackers):
            self._told(tracker, partial(tracker.numbers, numbers, step))

    def _told(self, tracker: Tracker, tell: Callable[[], None]) -> None:
        try:
            tell()
        except Exception:  # trackers are other people's code and servers
            logger.exception("%s failed and is left out from now on", type(tracker).__name__)
            self._trackers.remove(tracker)


def sample_pictures(base: Base, config: ValidationConfig, step: int, scorer: ClipScorer | None) -> SampleReport:
    """A picture of each prompt, by diffusers' own pipeline on the base as it is now."""
    images = []
    with unparked(base):
        for i, prompt in enumerate(config.prompts):
            request = GenerationRequest(
                prompt=prompt,
                steps=config.sample_steps,
                guidance_scale=config.guidance_scale,
                seed=config.sample_seed + i,
            )
            images += generate(base, request)
    scores = None
    if scorer is not None:
        scores = tuple(clip_scores(scorer.images(images), scorer.texts(config.prompts)).tolist())
    return SampleReport(step, config.prompts, tuple(images), scores)
