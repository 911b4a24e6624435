"""Which pictures a run needs, under which keys, and in which batches they are drawn. Imports no torch.

On a CPU the last bits of a picture depend on how many are drawn at once, but neither on its neighbours nor on its place
among them (seen with torch 2.13: tests/integration/test_eval.py). So every batch has the same number of rows, the last
one filled up, that number is part of the key, and a run that goes on gets the very pictures it would have got.
"""

import hashlib
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Final

from lorafleet.core.generation import MAX_SEED
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.suites import Suite
from lorafleet.eval.systems import System, digest_of

LIBRARIES: Final = ("torch", "diffusers", "transformers")
FORMAT: Final = 1
"""Raised when what a key stands for changes."""


@dataclass(frozen=True)
class Sampling:
    """How one system draws. `scheduler`: None is the model's own. Sizes None: the model's own."""

    steps: int
    guidance_scale: float
    scheduler: str | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Job:
    """One picture to be drawn: `prompt` counts the suite's prompts, `index` the seeds of that prompt."""

    key: str
    prompt: int
    index: int
    text: str
    negative: str
    seed: int


@dataclass(frozen=True)
class Batch:
    """Jobs of one system that are drawn at once, padded to `rows`; all or none of them have a negative prompt."""

    system: System
    sampling: Sampling
    jobs: tuple[Job, ...]
    rows: int


@dataclass(frozen=True)
class Plan:
    """All pictures of a run: `jobs[system name]` in the suite's order, seeds of a prompt one after the other."""

    suite: Suite
    systems: tuple[System, ...]
    sampling: Mapping[str, Sampling]
    jobs: Mapping[str, tuple[Job, ...]]
    seeds: int
    rows: int
    device: str

    @property
    def digest(self) -> str:
        """The same for the same question: names, prompts and keys of all pictures."""
        keys = {system.name: [job.key for job in self.jobs.get(system.name, ())] for system in self.systems}
        return digest_of([self.suite.digest, [[each.name, each.fingerprint] for each in self.systems], keys])

    def batches(self, done: Container[str]) -> Iterator[Batch]:
        """Of the pictures that are not in `done` yet."""
        for system in self.systems:
            missing: dict[bool, list[Job]] = defaultdict(list)
            for job in self.jobs.get(system.name, ()):
                if job.key not in done:
                    missing[bool(job.negative)].append(job)
            for jobs in missing.values():
                for at in range(0, len(jobs), self.rows):
                    part = tuple(jobs[at : at + self.rows])
                    yield Batch(system, self.sampling[system.name], part, self.rows)


def make_plan(suite: Suite, systems: Sequence[System], config: EvalConfig, *, device: str, run: str = "") -> Plan:
    """`device`: the kind of device that draws here, part of the keys as its last bits differ. `run`: tells the pictures
    of endpoints of one run from another's: what stands behind an address changes.
    """
    suite = suite.limited(config.sampling.limit)
    seeds = config.sampling.seeds or suite.settings.seeds
    sampling = {system.name: _sampling(suite, system, config) for system in systems}
    jobs = {
        system.name: tuple(_jobs(suite, system, sampling[system.name], config, seeds, device, run))
        for system in systems
        if system.kind != "folder"
    }
    return Plan(suite, tuple(systems), sampling, jobs, seeds, config.run.batch_size, device)


def seed_of(text: str, index: int, seed: int) -> int:
    """Of a prompt's picture number `index`: the same for every system and in every suite that has the prompt."""
    digest = hashlib.sha256(f"{seed}\0{index}\0{text}".encode()).digest()
    return int.from_bytes(digest[:4], "big") & MAX_SEED


def _sampling(suite: Suite, system: System, config: EvalConfig) -> Sampling:
    """The system's own, else the configuration's, else the suite's."""
    own, wanted, usual = system, config.sampling, suite.settings
    scheduler = own.scheduler or wanted.scheduler or (None if system.kind == "pipeline" else usual.scheduler)
    guidance = own.guidance_scale if own.guidance_scale is not None else wanted.guidance_scale
    return Sampling(
        steps=own.steps or wanted.steps or usual.steps,
        guidance_scale=usual.guidance_scale if guidance is None else guidance,
        scheduler=scheduler,
        width=wanted.width or usual.width,
        height=wanted.height or usual.height,
    )


def _jobs(
    suite: Suite, system: System, sampling: Sampling, config: EvalConfig, seeds: int, device: str, run: str
) -> Iterator[Job]:
    common = {
        "format": FORMAT,
        "system": dict(system.identity),
        "sampling": asdict(sampling),
        **_arithmetic(system, config, device, run),
    }
    for number, prompt in enumerate(suite.prompts):
        for index in range(seeds):
            seed = seed_of(prompt.text, index, config.sampling.seed)
            key = digest_of({**common, "prompt": prompt.text, "negative": prompt.negative, "seed": seed})
            yield Job(key, number, index, prompt.text, prompt.negative, seed)


def _arithmetic(system: System, config: EvalConfig, device: str, run: str) -> dict[str, Any]:
    if not system.is_drawn_here:
        return {"run": run}
    return {
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "dtype": config.base.dtype,
        "device": device,
        "rows": config.run.batch_size,
        "threads": config.run.threads if device == "cpu" else None,
    }
