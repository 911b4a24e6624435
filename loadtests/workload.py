"""What every part of the bench asks for: bases, requests, adapters, and the engine's settings."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import torch
from PIL import Image
from random_sdxl import ARCHITECTURES, random_base
from report import Report

from lorafleet.core.config import load_settings
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import BaseRef, Recipe, embed, versions
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora import Adapter
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Engine, Job, JobAdapter

KINDS: Final = {"none": "no adapter", "one": "one adapter for all", "each": "eight adapters, each job another"}
MANY: Final = 8
RANK: Final = 16
WEIGHT: Final = 0.8
MODULES: Final = r"unet\..+\.attn[12]\.to_(q|k|v|out\.0)"
"""Which linears the adapters change and the bank wraps: what LoRA trainers take, 560 of SDXL's."""
BANK: Final = (f"bank.slots={MANY}", f"bank.max_rank={RANK}", "bank.per_row=1", f"bank.targets={MODULES}")
NO_BANK: Final = "bank=null"


@dataclass(frozen=True)
class Variant:
    """A named set of settings, `key=value` each; those that start with `base.` are the base's."""

    name: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Variant":
        """From `name: key=value key=value`."""
        name, _, overrides = text.partition(":")
        return cls(name.strip(), tuple(overrides.split()))

    def engine_settings(self, *more: str) -> EngineSettings:
        """Raises ConfigError."""
        mine = [override for override in (*self.overrides, *more) if not override.startswith("base.")]
        return load_settings(EngineSettings, overrides=[*BANK, *mine], environ={})

    def base_config(self, id_: str, device: str, *more: str) -> BaseConfig:
        """Raises ConfigError."""
        mine = [o.removeprefix("base.") for o in (*self.overrides, *more) if o.startswith("base.")]
        return load_settings(BaseConfig, overrides=[f"id={id_}", f"device={device}", *mine], environ={})


@dataclass
class Workload:
    """`images`: at least as many are counted for a row. `concurrency`: jobs at a time, each a row, as are those of
    `step_reuse`."""

    report: Report
    base_id: str
    device: torch.device
    steps: int
    images: int
    concurrency: Sequence[int]
    kinds: Sequence[str]
    step_reuse: Sequence[int] = (1,)
    image_s: float = 0.0
    """Seconds that an image took last, to tell what still fits into the budget."""
    _adapters: dict[str, list[Adapter]] = field(default_factory=dict)  # by their base's fingerprint
    _made: int = 0
    _versions: dict[str, str] = field(default_factory=versions)

    @property
    def most(self) -> int:
        return max(self.concurrency)

    def make_base(self, variant: Variant, *more: str) -> Base:
        config = variant.base_config(self.base_id, str(self.device), *more)
        return random_base(config) if config.id in ARCHITECTURES else load_base(config)

    @contextmanager
    def engine(self, variant: Variant, *more: str) -> Iterator[Engine]:
        """A started one on a base of its own, so that nothing that an engine does to its base is left for the next."""
        with Engine(self.make_base(variant), variant.engine_settings(*more)) as engine:
            yield engine

    def adapters(self, base: Base, count: int) -> list[Adapter]:
        """The first `count` ones, made once and kept for all variants of a base."""
        made = self._adapters.setdefault(base.fingerprint, [])
        missing = range(len(made), count)
        if missing:
            make = partial(random_adapter, ranks=(RANK,), alphas=(RANK,), modules=MODULES, dtype=base.dtype)
            targets = targets_of(base)
            with ThreadPoolExecutor() as pool:
                made += pool.map(lambda seed: make(targets, seed), missing)
        return made[:count]

    def job_adapter(self, base: Base, number: int) -> JobAdapter:
        adapter = self.adapters(base, number + 1)[number]
        return JobAdapter(f"bench-{number}", WEIGHT, lambda: adapter)

    def jobs(self, base: Base, kind: str, steps: int | None = None, step_reuse: int = 1) -> Callable[[int], Job]:
        """Makes the i-th job. No two calls give jobs with the same prompt: none is in the engine's cache."""
        self._made += 1
        first = 1000 * self._made
        count = {"none": 0, "one": 1, "each": MANY}[kind]
        used = [self.job_adapter(base, i) for i in range(count)]

        def job(i: int) -> Job:
            return Job(self.request(first + i, steps, step_reuse), seed=i, adapters=(used[i % count],) if used else ())

        return job

    def request(self, number: int, steps: int | None = None, step_reuse: int = 1) -> GenerationRequest:
        """Each with a prompt of its own."""
        return GenerationRequest(
            prompt=f"a red apple on a blue background, number {number}",
            steps=steps or self.steps,
            guidance_scale=5.0,
            scheduler="euler",
            step_reuse=step_reuse,
        )

    def png(self, base: Base, request: GenerationRequest, seed: int, image: Image.Image) -> bytes:
        chosen = {"width": image.width, "height": image.height, "seed": seed}
        recipe = Recipe(
            **{**request.model_dump(exclude={"num_images"}), **chosen},
            base=BaseRef(id=base.id, fingerprint=base.fingerprint),
            versions=self._versions,
        )
        return embed(image, recipe)
