"""Who is told how a run goes: one protocol, and the watchers that write files or show a bar."""

import importlib
import json
import math
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lorafleet.core.errors import ConfigError
from lorafleet.train.config import TrainConfig

if TYPE_CHECKING:
    from PIL import Image

    from lorafleet.train.loop import Trainer

PROGRESS_FILE = "progress.jsonl"


@dataclass(frozen=True)
class StepReport:
    """One step. `step` counts from 1; `norm`: of the whole gradient before clipping; `samples`: of all workers."""

    step: int
    epoch: int
    loss: float
    lr: float
    norm: float
    samples: int
    seconds: float
    is_good: bool


@dataclass(frozen=True)
class ValidationReport:
    """A validation. `loss`: None without held-out images."""

    step: int
    loss: float | None


@dataclass(frozen=True)
class SampleReport:
    """Sample pictures, one a prompt. `clip_scores`: 100 times the cosine, None for a base without a scorer."""

    step: int
    prompts: tuple[str, ...]
    images: "tuple[Image.Image, ...]"
    clip_scores: tuple[float, ...] | None


class Watcher(Protocol):
    """Told by the leading worker only."""

    def before(self, trainer: "Trainer") -> None:
        """Before the first step of a run that starts anew; the adapter changes nothing yet."""

    def step(self, report: StepReport) -> None: ...

    def validation(self, report: ValidationReport, trainer: "Trainer") -> None:
        """The adapter is as it would be handed out."""


class Tracker(Protocol):
    """Somewhere that numbers and pictures go."""

    def numbers(self, values: Mapping[str, float], step: int) -> None: ...

    def images(self, report: SampleReport) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def images(self, report: SampleReport) -> None:
        import numpy

        for i, image in enumerate(report.images):
            self._writer.add_image(f"samples/{i}", numpy.asarray(image), report.step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Mlflow:
    """A run on an MLflow server or in a database; in a folder where MLflow is told to allow it. Raises ConfigError."""

    def __init__(self, uri: str, name: str, settings: Mapping[str, Any]) -> None:
        self._mlflow = _library("mlflow", "watch.mlflow_uri", "mlflow")
        try:
            self._mlflow.set_tracking_uri(uri)
            self._mlflow.set_experiment("lorafleet")
            self._mlflow.start_run(run_name=name)
            self._mlflow.log_params(_flat(settings))
        except self._mlflow.exceptions.MlflowException as error:
            raise ConfigError(
                f"watch.mlflow_uri={uri} cannot be used: {' '.join(str(error).split())}", param="watch.mlflow_uri"
            ) from error

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({name.replace(" ", "_"): value for name, value in values.items()}, step=step)

    def images(self, report: SampleReport) -> None:
        for i, image in enumerate(report.images):
            self._mlflow.log_image(image, f"samples/{report.step:07}-{i}.png")

    def close(self) -> None:
        self._mlflow.end_run()


class WeightsAndBiases:
    """A run of Weights & Biases; its own environment variables say where."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        self._wandb = _library("wandb", "watch.wandb_project", "wandb")
        self._run = self._wandb.init(project=project, name=name, config=dict(settings), dir=str(folder))

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def images(self, report: SampleReport) -> None:
        pairs = zip(report.images, report.prompts, strict=True)
        self._run.log({"samples": [self._wandb.Image(image, caption=text) for image, text in pairs]}, step=report.step)

    def close(self) -> None:
        self._run.finish()


@dataclass
class ProgressFile:
    """A line of JSON for each step and validation. A step that is taken again after a crash has a line again: the last
    one counts."""

    path: Path

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, **values, "step": step}) + "\n")

    def close(self) -> None:
        self._file.close()


def read_progress(path: Path, kind: str, *, until_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a kind in the order of their steps, the last one of each; torn lines are left out."""
    found: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text("utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("kind") == kind and (until_step is None or entry["step"] <= until_step):
                found[entry["step"]] = entry
    return [found[step] for step in sorted(found)]


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then. Both on stderr."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self._steps = steps
        self._every_steps = max(1, steps // 20)
        self._mean_loss: float | None = None
        self._seconds = 0.0
        self._samples = 0.0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=steps, said="")
        self._progress.start()

    def step(self, report: StepReport) -> None:
        if report.is_good:
            mean = self._mean_loss
            self._mean_loss = report.loss if mean is None else 0.95 * mean + 0.05 * report.loss
        self._seconds = 0.9 * self._seconds + report.seconds
        self._samples = 0.9 * self._samples + report.samples
        said = (
            f"{self._samples / max(self._seconds, 1e-9):.1f} img/s  loss {self._mean_loss or math.nan:.4f}  "
            f"lr {report.lr:.2e}  {peak_bytes() / 2**30:.1f} GiB"
        )
        self._progress.update(self._task, completed=report.step, said=said)
        if self._progress.disable and (report.step % self._every_steps == 0 or report.step == self._steps):
            print(f"step {report.step}/{self._steps}  {said}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._progress.stop()


@contextmanager
def following(path: Path, steps: int, poll_s: float = 0.5) -> Iterator[None]:
    """A bar over a progress file that other processes write."""
    ended = threading.Event()
    bar = Bar(steps)

    def follow() -> None:
        at = path.stat().st_size if path.is_file() else 0
        is_over = False
        while not is_over:
            is_over = ended.wait(poll_s)  # and then looks once more
            if not path.is_file():
                continue
            with path.open("rb") as file:
                file.seek(at)
                whole, newline, _ = file.read().rpartition(b"\n")
            at += len(whole) + len(newline)
            for line in whole.splitlines():
                entry: dict[str, Any] = json.loads(line)
                if entry.pop("kind") == "step":
                    entry.update({name: math.nan for name, value in entry.items() if value is None})
                    bar.step(StepReport(**entry))

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        bar.close()


def make_trackers(config: TrainConfig, name: str, folder: Path) -> list[Tracker]:
    """TensorBoard, and what the settings name. Raises ConfigError for a library that is not installed."""
    settings = config.model_dump(mode="json")
    trackers: list[Tracker] = [TensorBoard(folder / "tensorboard")]
    if config.watch.mlflow_uri is not None:
        trackers.append(Mlflow(config.watch.mlflow_uri, name, settings))
    if config.watch.wandb_project is not None:
        trackers.append(WeightsAndBiases(config.watch.wandb_project, name, settings, folder))
    return trackers


def peak_bytes() -> int:
    """The most memory that tensors took on the GPU so far; without one, that this process took."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_numbers(report: StepReport) -> dict[str, float]:
    """A step for the trackers, by their names."""
    return {
        "train/loss": report.loss,
        "train/lr": report.lr,
        "train/gradient_norm": report.norm,
        "train/images_per_second": report.samples / max(report.seconds, 1e-9),
        "train/epoch": report.epoch,
    }


def step_line(report: StepReport) -> dict[str, Any]:
    """A step for the progress file; JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in asdict(report).items()}


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat.update(_flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value})
    return flat


def _library(module: str, setting: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{setting} needs the package {module}: pip install 'lorafleet[{extra}]', or leave the setting out",
            param=setting,
        ) from error
