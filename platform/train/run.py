"""A whole run: data encoded, adapter trained by all workers, files written, report made, version pushed.

A run's folder, LORAFLEET_HOME/runs/NAME:
    settings.yaml           what `--config` takes
    checkpoints/            see `lorafleet.train.checkpoint`
    progress.jsonl          a line for each step and validation
    samples/step-0000100/   the sample pictures
    tensorboard/
    adapter.safetensors     the result; adapter-kohya.safetensors if asked for
    summary.json            written with the result
    report.html
"""

import contextlib
import json
import logging
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lorafleet.core.config import dump, home
from lorafleet.core.errors import ConfigError, TrainingStopped
from lorafleet.core.manifest import AdapterFacts, Manifest, TrainingFacts, check_name
from lorafleet.core.registry import open_registry
from lorafleet.sdxl.adapter_file import adapter_facts, base_targets
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.train.adapter import attach, parameter_table, write_dora
from lorafleet.train.checkpoint import Checkpoints, Snapshot
from lorafleet.train.config import TrainConfig
from lorafleet.train.data import EncodedSet, encode_set, open_source
from lorafleet.train.group import Group, joined, own_device
from lorafleet.train.loop import Trainer, fit
from lorafleet.train.metrics import ray_metrics, served_metrics
from lorafleet.train.recorder import Recorder
from lorafleet.train.report import write_report
from lorafleet.train.watch import PROGRESS_FILE, Bar, make_trackers, peak_bytes, read_progress

logger = logging.getLogger(__name__)

ADAPTER_FILE: Final = "adapter.safetensors"
KOHYA_FILE: Final = "adapter-kohya.safetensors"
SUMMARY_FILE: Final = "summary.json"

# Settings that may change between a checkpoint and going on from it: they decide where, not what.
_FREE: Final = frozenset({"base.device", "base.id", "base.vae", "data.endpoint_url", "loop.max_bad_steps"})
_SHAPING: Final = ("base", "data", "adapter", "objective", "optimizer", "loop")


@dataclass(frozen=True)
class Task:
    """A run as every worker is told it. `data`: the cache of encoded images, a folder that all workers see."""

    config: TrainConfig
    name: str
    folder: Path
    data: Path
    exports_kohya: bool = False

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class Result:
    """What a run made. `adapter`: the file; `version`: the registry's, if it was pushed."""

    folder: Path
    adapter: Path
    summary: Mapping[str, Any]
    manifest: Manifest | None


def train(
    config: TrainConfig, data_url: str, name: str, *, resumes: bool = False, exports_kohya: bool = False
) -> Result:
    """Trains an adapter from the images at `data_url` and publishes it as the newest version of `name`.

    Raises TrainingStopped on SIGTERM or SIGINT, and LorafleetError with one sentence for whatever else is wrong;
    nothing is published then, and checkpoints stay.
    """
    folder = home() / "runs" / check_name(name)
    if exports_kohya and config.adapter.dora:
        raise ConfigError("kohya's format is written of LoRAs only: leave --export out, or set adapter.dora=false")
    if torch.distributed.is_torchelastic_launched():
        return _train_under_torchrun(config, data_url, name, folder, resumes, exports_kohya)
    prepare_folder(folder, config, resumes=resumes)
    base = load_base(config.base)
    task = Task(config, name, folder, encoded(config, data_url, base).path, exports_kohya)
    if config.run.workers > 1 or config.run.ray:
        from lorafleet.train.ray_train import train_with_ray

        del base
        train_with_ray(task)
    else:
        work(task, base)
    return finish(task)


def encoded(config: TrainConfig, data_url: str, base: Base) -> EncodedSet:
    """The cache of the images, made if it is not there yet."""
    source = open_source(data_url, endpoint_url=config.data.endpoint_url)
    return encode_set(source, base, config.data, home() / "cache" / "train")


def prepare_folder(folder: Path, config: TrainConfig, *, resumes: bool) -> None:
    """A folder for a new run, or for one to go on. Raises ConfigError where the one would take the other's place."""
    there = sorted((folder / "checkpoints").glob("step-*"))
    if resumes and not there:
        raise ConfigError(f"there is no checkpoint of {folder.name} in {folder}: leave --resume out", param="resume")
    if not resumes and is_unfinished(folder):
        raise ConfigError(
            f"{folder.name} has been trained to {there[-1].name} before: go on with --resume, or choose another name "
            f"(or delete {folder})",
            param="name",
        )
    if not resumes and folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.yaml").write_text(dump(config), "utf-8")


def is_unfinished(folder: Path) -> bool:
    """Whether there are checkpoints of a run that has not come to its end."""
    return any((folder / "checkpoints").glob("step-*")) and not (folder / SUMMARY_FILE).is_file()


def work(task: Task, base: Base | None = None, *, ray_hosted: bool = False) -> None:
    """One worker's part, in whatever process it is. The leading one writes the result's files, and shows a progress bar
    unless Ray hosts it; its metrics go through Ray then.

    Raises TrainingStopped.
    """
    config = task.config
    base = base or load_base(config.base)
    data = EncodedSet.open(task.data, validation_share=config.data.validation_share)
    with joined(base.device, config.run.timeout_s) as group:
        adapter = attach(base, config.adapter, seed=config.loop.seed)
        trainer = Trainer(config, base, data, adapter, group)
        checkpoints = Checkpoints(
            task.checkpoints,
            identity(config, base, data),
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        )
        with contextlib.ExitStack() as stack:
            stack.callback(checkpoints.close)
            recorder = None
            if group.leads:
                checkpoints.clear(partial_only=True)
                trackers = make_trackers(config, task.name, task.folder)
                if ray_hosted:
                    trackers.append(ray_metrics())
                elif config.watch.metrics_port is not None:
                    trackers.append(served_metrics(config.watch.metrics_port))
                bar = None if ray_hosted else Bar(config.loop.steps)
                recorder = Recorder(config, base, task.folder, trackers, bar=bar)
                stack.callback(recorder.close)
            snapshot = fit(trainer, checkpoints, recorder)
            if snapshot.progress.step < config.loop.steps and not snapshot.progress.stopped_early:
                raise TrainingStopped(
                    f"stopped at step {snapshot.progress.step} of {config.loop.steps}, its checkpoint is written: go "
                    "on with --resume"
                )
            if group.leads:
                write_result(task, trainer, checkpoints, snapshot)


def identity(config: TrainConfig, base: Base, data: EncodedSet) -> dict[str, Any]:
    """What a checkpoint must agree on with the run that goes on from it, by setting."""
    flat = {"base": base.fingerprint, "base.dtype": str(base.dtype).removeprefix("torch."), "data": data.fingerprint}
    for section in _SHAPING:
        values = getattr(config, section).model_dump(mode="json")
        flat.update({f"{section}.{key}": value for key, value in values.items()})
    flat["base.dtype"] = str(base.dtype).removeprefix("torch.")
    return {key: value for key, value in flat.items() if key not in _FREE}


def write_result(task: Task, trainer: Trainer, checkpoints: Checkpoints, snapshot: Snapshot) -> None:
    """The adapter's files and, last, the summary."""
    config, adapter = task.config, trainer.adapter
    best = checkpoints.best() if config.publish_best else None
    chosen = (best and checkpoints.load(best)) or snapshot
    words = (config.data.trigger,) if config.data.trigger else ()
    if config.adapter.dora:
        write_dora(adapter, chosen.result, task.folder / ADAPTER_FILE)
    else:
        made = adapter.exported(chosen.result, name=task.name, trigger_words=words)
        write_adapter(made, task.folder / ADAPTER_FILE)
        if task.exports_kohya:
            write_adapter(made, task.folder / KOHYA_FILE, file_format="kohya")
    items = trainer.data.items
    summary = {
        "name": task.name,
        "base": trainer.base.id,
        "base_revision": config.base.revision,
        "base_fingerprint": trainer.base.fingerprint,
        "data_fingerprint": trainer.data.fingerprint,
        "images": sum(not item.held_out for item in items),
        "held_out": sum(item.held_out for item in items),
        "progress": asdict(snapshot.progress),
        "exported_step": chosen.progress.step,
        "parameters": [
            dict(zip(("part", "linears", "trainable", "base"), row, strict=True)) for row in parameter_table(adapter)
        ],
        "workers": trainer.group.size,
        "device": _device_name(trainer.group),
        "dtype": str(trainer.base.dtype).removeprefix("torch."),
        "peak_bytes": peak_bytes(),
        "torch": torch.__version__,
    }
    path = task.folder / SUMMARY_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(summary, indent=1), "utf-8")
    partial.replace(path)


def finish(task: Task) -> Result:
    """Report and registry, from the files in the run's folder."""
    summary = json.loads((task.folder / SUMMARY_FILE).read_text("utf-8"))
    manifest = publish(task, summary) if task.config.publish else None
    write_report(task.folder, task.config, summary, manifest)
    return Result(task.folder, task.folder / ADAPTER_FILE, summary, manifest)


def publish(task: Task, summary: Mapping[str, Any]) -> Manifest:
    """Pushes the result, checked as every other adapter, with how it was made."""
    targets = base_targets(task.config.base)
    validations = read_progress(task.folder / PROGRESS_FILE, "validation", until_step=summary["exported_step"])
    last = validations[-1] if validations else {}
    training = TrainingFacts(
        base_id=summary["base"],
        base_revision=summary["base_revision"],
        data_fingerprint=summary["data_fingerprint"],
        images=summary["images"],
        steps=summary["exported_step"],
        seconds=summary["progress"]["seconds"],
        validation_loss=last.get("loss"),
        clip_score=last.get("clip_score"),
        settings={key: task.config.model_dump(mode="json")[key] for key in ("adapter", "data", *_SHAPING[3:])},
    )

    def check(file: Path) -> AdapterFacts:
        return adapter_facts(file, targets).model_copy(update={"training": training})

    return open_registry(task.config.registry).push(task.name, task.folder / ADAPTER_FILE, check)


def _train_under_torchrun(
    config: TrainConfig, data_url: str, name: str, folder: Path, resumes: bool, exports_kohya: bool
) -> Result:
    """Each of torchrun's processes is a worker; the first one prepares and finishes for all."""
    device = own_device(config.base.device)
    base = load_base(config.base.model_copy(update={"device": device}))
    with joined(base.device, config.run.timeout_s) as group:
        problem: Exception | None = None
        path: Path | None = None
        if group.leads:
            try:
                # torchrun starts all processes again when one dies: then they go on by themselves
                prepare_folder(folder, config, resumes=resumes or is_unfinished(folder))
                path = encoded(config, data_url, base).path
            except Exception as error:  # the others wait for an answer, whatever it is
                problem = error
        path, problem = group.agreed((path, problem))
        if problem is not None:
            raise problem
        assert path is not None
        task = Task(config, name, folder, path, exports_kohya)
        work(task, base)
        result = finish(task) if group.leads else None
        group.agreed(None)
        return result or Result(folder, folder / ADAPTER_FILE, {}, None)


def _device_name(group: Group) -> str:
    if group.device.type == "cuda":
        return torch.cuda.get_device_name(group.device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
