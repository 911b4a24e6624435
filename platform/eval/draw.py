"""Draws batches with diffusers: the base, the base with adapters, or another pipeline. In the process that calls it."""

import copy
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from lorafleet.core.errors import BaseNotFound, GenerationFailed, LorafleetError
from lorafleet.core.registry import open_registry
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.images import Drawn
from lorafleet.eval.plan import Batch, Job
from lorafleet.eval.systems import AdapterSource, System
from lorafleet.sdxl.base import DTYPES, Base, load_base, resolve_device
from lorafleet.sdxl.lora_oracle import with_adapters
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.sdxl.schedulers import make_scheduler
from lorafleet.sdxl.vae import decode


class Drawer(Protocol):
    """One system, loaded."""

    def draw(self, batch: Batch, jobs: Sequence[Job]) -> list[Image.Image]:
        """A picture for each of the jobs, which are as many as the batch has rows."""


class Studio:
    """Draws batches of any system; keeps the base and the last system loaded. Not for several threads."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._base: Base | None = None
        self._last: tuple[str, Drawer] | None = None
        device = resolve_device(config.base.device)
        if device.type == "cpu":
            torch.set_num_threads(config.run.threads)

    def draw(self, batch: Batch) -> list[Drawn]:
        """A picture for each job of the batch.

        The initial noise of a picture comes from a CPU generator of its own, seeded with the job's seed, so that all
        systems begin alike. Raises GenerationFailed naming system and prompts, and what loading raises.
        """
        drawer = self._drawer(batch.system)
        padding = batch.rows - len(batch.jobs)
        jobs = [*batch.jobs, *[batch.jobs[-1]] * padding]
        start = time.perf_counter()
        try:
            images = drawer.draw(batch, jobs)
        except LorafleetError:
            raise
        except Exception as error:  # out of memory, or whatever a foreign pipeline raises
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            texts = ", ".join(repr(job.text[:60]) for job in batch.jobs[:2])
            raise GenerationFailed(
                f"system {batch.system.name} could not draw {texts}{' ...' if len(batch.jobs) > 2 else ''}: {reason}"
            ) from error
        seconds = (time.perf_counter() - start) / batch.rows
        return [Drawn(image, seconds) for image in images[: len(batch.jobs)]]

    def _drawer(self, system: System) -> Drawer:
        if self._last is None or self._last[0] != system.fingerprint:
            self._last = None  # its memory goes before the next one comes
            self._last = (system.fingerprint, self._load(system))
        return self._last[1]

    def _load(self, system: System) -> Drawer:
        if system.kind == "pipeline":
            self._base = None
            return PipelineDrawer(_read_pipeline(system, self._config))
        if self._base is None:
            self._base = load_base(self._config.base)
        if not system.adapters:
            return BaseDrawer(self._base)
        targets = targets_of(self._base)
        adapters = [(read_adapter(self._file(each), targets), each.weight) for each in system.adapters]
        return BaseDrawer(with_adapters(self._base, adapters))

    def _file(self, source: AdapterSource) -> Path:
        if source.file is not None:
            return source.file
        assert source.manifest is not None
        return open_registry(self._config.registry).pull(source.manifest)


class BaseDrawer:
    """Our base through diffusers' own pipeline, with whatever adapters it has been given."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def draw(self, batch: Batch, jobs: Sequence[Job]) -> list[Image.Image]:
        base, sampling = self._base, batch.sampling
        width = sampling.width or base.limits.default_width_px
        height = sampling.height or base.limits.default_height_px
        base.check_size(width, height)
        pipeline = copy.copy(base.pipeline)
        pipeline.scheduler = make_scheduler(base, sampling.scheduler or "euler")  # type: ignore[arg-type]
        latents = pipeline(
            **_arguments(batch, jobs), width=width, height=height, output_type="latent", return_dict=True
        ).images
        return [Image.fromarray(pixels) for pixels in decode(base, latents)]


class PipelineDrawer:
    """Any other text-to-image pipeline of diffusers, with the scheduler it comes with."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline

    def draw(self, batch: Batch, jobs: Sequence[Job]) -> list[Image.Image]:
        sampling = batch.sampling
        size = {"width": sampling.width, "height": sampling.height}
        given = {name: side for name, side in size.items() if side is not None}
        images: list[Image.Image] = self._pipeline(**_arguments(batch, jobs), **given, output_type="pil").images
        if any(not np.asarray(image).any() for image in images):
            # diffusers turns NaN into black pictures
            raise GenerationFailed(
                f"system {batch.system.name} drew a black picture, as NaN or a safety checker does: "
                "try base.dtype=float32"
            )
        return images


def _arguments(batch: Batch, jobs: Sequence[Job]) -> dict[str, Any]:
    """What every text-to-image pipeline of diffusers takes."""
    arguments: dict[str, Any] = {
        "prompt": [job.text for job in jobs],
        "num_inference_steps": batch.sampling.steps,
        "guidance_scale": batch.sampling.guidance_scale,
        "generator": [torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
    }
    if any(job.negative for job in jobs):
        arguments["negative_prompt"] = [job.negative for job in jobs]
    return arguments


def _read_pipeline(system: System, config: EvalConfig) -> Any:
    """Safetensors only. Raises BaseNotFound."""
    from diffusers import AutoPipelineForText2Image

    device = resolve_device(config.base.device)
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = DTYPES[usual if config.base.dtype == "auto" else config.base.dtype]
    target = Path(system.target).expanduser()
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(
            target if target.is_dir() else system.target,
            revision=system.revision,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=target.is_dir(),
        ).to(device)
    except Exception as error:  # whatever a folder that is none makes diffusers or the hub's client raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BaseNotFound(
            f"system {system.name}: the pipeline {system.target} does not load: {reason}", param="system"
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
