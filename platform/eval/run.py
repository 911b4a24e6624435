"""One evaluation, from prompts and systems to a folder that says where every picture is.

    config = load_settings(EvalConfig)
    run = run_suite(load_suite("emoji"), [SystemSpec.parse("base"), SystemSpec.parse("a=adapter:plush")], config)

A run's folder, LORAFLEET_HOME/eval/runs/SUITE-DIGEST unless another is given:
    run.json      suite, systems, sampling, and each picture's prompt, seed and key or file
    results.json  what `lorafleet.eval.results` finds, and results.csv
    report.html   and plots/*.png
The pictures themselves lie in LORAFLEET_HOME/eval/images by key, and are shared by all runs. What is there is never
made again, so the same call goes on where an earlier one was stopped, however it was stopped.
"""

import contextlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from lorafleet.core.config import dump, home, ray_address
from lorafleet.core.errors import DataNotFound, DataUnreadable, EvaluationFailed
from lorafleet.eval.captioned import read_captioned
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.images import Drawn, ImageStore, write_atomically
from lorafleet.eval.plan import LIBRARIES, Batch, Job, Plan, make_plan
from lorafleet.eval.suites import Suite
from lorafleet.eval.systems import System, SystemSpec, digest_of, resolve_systems
from lorafleet.sdxl.counting import read_counter
from lorafleet.sdxl.folder import find_base

logger = logging.getLogger(__name__)

RUN_FILE: Final = "run.json"
SETTINGS_FILE: Final = "settings.yaml"
PICTURES_PER_WORKER: Final = 64
"""Fewer are drawn here: a process takes 8 s to load its libraries."""

OnProgress = Callable[[str, int, int], None]
"""(system, pictures done, pictures in all)"""


@dataclass(frozen=True)
class Picture:
    """One picture of a run. `prompt` counts the suite's prompts; `seconds`: None for ready ones."""

    prompt: int
    index: int
    seed: int | None
    file: Path
    seconds: float | None = None


@dataclass(frozen=True)
class Run:
    """A run whose pictures are all there. `pictures[system name]` by prompt, then seed; `systems` as in `run.json`."""

    folder: Path
    suite: Suite
    systems: tuple[Mapping[str, Any], ...]
    pictures: Mapping[str, tuple[Picture, ...]]
    about: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        return [str(system["name"]) for system in self.systems]


def run_suite(
    suite: Suite,
    specs: Sequence[SystemSpec],
    config: EvalConfig,
    *,
    folder: Path | None = None,
    on_progress: OnProgress = lambda system, done, total: None,
) -> Run:
    """Makes every picture that is not there yet and writes `run.json`.

    Raises LorafleetError in one sentence naming the prompt, picture or system at fault; finished pictures stay.
    """
    with contextlib.ExitStack() as stack:
        if uses_ray(config):
            from lorafleet.eval.ray_crew import connected

            stack.enter_context(connected(config))
        return _run_suite(suite, specs, config, folder, on_progress)


def _run_suite(
    suite: Suite, specs: Sequence[SystemSpec], config: EvalConfig, folder: Path | None, on_progress: OnProgress
) -> Run:
    """Where Ray is connected, if it is wanted."""
    plan = plan_run(suite, specs, config, folder=folder)
    store = ImageStore(home() / "eval" / "images")
    ready = {
        system.name: match_folder(system, plan.suite, plan.seeds) for system in plan.systems if system.kind == "folder"
    }
    window = check_prompts(plan, config)
    draw_missing(plan, store, config, on_progress)
    folder = folder or home() / "eval" / "runs" / f"{plan.suite.name}-{plan.digest[:12]}"
    document = {**_document(plan, ready), "prompts": window}
    settings = config.model_copy(update={"run": config.run.model_copy(update={"api_key": None})})
    write_atomically(folder / SETTINGS_FILE, dump(settings).encode())
    write_atomically(folder / RUN_FILE, json.dumps(document, ensure_ascii=False, indent=1).encode())
    return open_run(folder)


def uses_ray(config: EvalConfig) -> bool:
    """Whether Ray is wanted."""
    return bool(ray_address()) if config.run.ray is None else config.run.ray


def plan_run(suite: Suite, specs: Sequence[SystemSpec], config: EvalConfig, *, folder: Path | None = None) -> Plan:
    """What `run_suite` would make. Raises as it does. Asks the Ray that is connected, where one is used, for GPUs."""
    systems = resolve_systems(specs, config)
    asked = [each.fingerprint for each in systems if each.kind in ("lorafleet", "openai")]
    run = digest_of([suite.digest, asked, config.sampling.model_dump(mode="json"), str(folder)]) if asked else ""
    return make_plan(suite, systems, config, device=_device(config), run=run)


def open_run(folder: Path) -> Run:
    """A run that is there. Raises DataNotFound, DataUnreadable or EvaluationFailed naming what is missing."""
    path = folder / RUN_FILE
    if not path.is_file():
        raise DataNotFound(f"{folder} holds no evaluation ({RUN_FILE} is missing): lorafleet eval run makes one.")
    store = ImageStore(home() / "eval" / "images")
    try:
        document = json.loads(path.read_bytes())
        suite = Suite.model_validate({**document["suite"], "prompts": tuple(document["suite"]["prompts"])})
        pictures = {
            name: tuple(
                Picture(
                    row["prompt"],
                    row["index"],
                    row["seed"],
                    Path(row["file"]) if "file" in row else store.path(row["key"]),
                    store.seconds(row["key"]) if row.get("key") in store else None,
                )
                for row in rows
            )
            for name, rows in document["pictures"].items()
        }
        systems = tuple(document["systems"])
    except (ValueError, LookupError, TypeError, ValidationError) as error:
        raise DataUnreadable(f"{path} is no evaluation's: {error}.") from error
    for name, found in pictures.items():
        missing = [each for each in found if not each.file.is_file()]
        if missing:
            raise EvaluationFailed(
                f"{len(missing)} of {len(found)} pictures of {name} are gone, such as {missing[0].file} of prompt "
                f"{suite.prompts[missing[0].prompt].id}: run the evaluation again, it makes what is missing"
            )
    return Run(folder, suite, systems, pictures, document)


def match_folder(system: System, suite: Suite, seeds: int) -> list[dict[str, Any]]:
    """A folder's pictures by prompt: those whose caption is the prompt's text, or whose name is its id (`id.png`,
    `id-2.png`). At most `seeds` a prompt, by name. Raises DataUnreadable naming prompts without one."""
    by_caption: dict[str, list[Path]] = defaultdict(list)
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for each in read_captioned(Path(system.target)):
        for caption in each.captions:
            by_caption[_plain(caption)].append(each.file)
        by_stem[each.file.stem].append(each.file)
        stem, dash, number = each.file.stem.rpartition("-")
        if dash and number.isdigit():
            by_stem[stem].append(each.file)
    rows, missing = [], []
    for at, prompt in enumerate(suite.prompts):
        files = by_caption.get(_plain(prompt.text)) or by_stem.get(prompt.id) or []
        if not files:
            missing.append(f"{prompt.text!r} ({prompt.id})")
        rows += [
            {"prompt": at, "index": i, "seed": None, "file": str(file.absolute())}
            for i, file in enumerate(files[:seeds])
        ]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataUnreadable(
            f"system {system.name}: {system.target} has no picture for {', '.join(missing[:3])}{more}: caption one so, "
            "or name it by the prompt's id",
            param="system",
        )
    return rows


def check_prompts(plan: Plan, config: EvalConfig) -> dict[str, Any]:
    """How many prompts the base's window cuts off; said as a warning. Nothing where no system is the base."""
    if not any(system.kind in ("base", "adapter") for system in plan.systems):
        return {}
    counter = read_counter(find_base(config.base))
    window = counter.limits.max_prompt_tokens
    cut = [prompt for prompt in plan.suite.prompts if max(counter.count(prompt.text)) > window]
    if cut:
        logger.warning(
            "%d of %d prompts are longer than the base's %d tokens and are cut off, such as %s",
            len(cut),
            len(plan.suite.prompts),
            window,
            cut[0].id,
        )
    return {"window": window, "cut": [prompt.id for prompt in cut], "rate": len(cut) / len(plan.suite.prompts)}


def draw_missing(plan: Plan, store: ImageStore, config: EvalConfig, on_progress: OnProgress) -> None:
    """All pictures of the plan that the store does not have."""
    done = {
        system.name: sum(job.key in store for job in plan.jobs[system.name])
        for system in plan.systems
        if system.name in plan.jobs
    }
    for system in plan.systems:
        if system.name in done:
            on_progress(system.name, done[system.name], len(plan.jobs[system.name]))

    def keep(batch: Batch, drawn: Sequence[Drawn]) -> None:
        for job, each in zip(batch.jobs, drawn, strict=True):
            about = {"system": batch.system.identity, "sampling": asdict(batch.sampling), **asdict(job)}
            store.put(job.key, each, about)
            done[batch.system.name] += 1
        on_progress(batch.system.name, done[batch.system.name], len(plan.jobs[batch.system.name]))

    here = [batch for batch in plan.batches(store) if batch.system.is_drawn_here]
    if here:
        _draw_here(here, config, keep)
    for system in plan.systems:
        if system.kind in ("lorafleet", "openai"):
            _ask(system, [job for job in plan.jobs[system.name] if job.key not in store], plan, config, keep)


def _draw_here(batches: Sequence[Batch], config: EvalConfig, keep: Callable[[Batch, Sequence[Drawn]], None]) -> None:
    from lorafleet.eval.crew import Alone, Crew, Processes, draw_all

    if uses_ray(config):
        from lorafleet.eval.ray_crew import Actors

        crew: Crew = Actors(config, most=len(batches))
    else:
        size = min(config.run.workers or _usual_workers(sum(len(batch.jobs) for batch in batches)), len(batches))
        crew = Alone(config) if size == 1 else Processes(config, size)
    try:
        draw_all(batches, crew, keep, max_losses=config.run.max_losses)
    finally:
        crew.close()


def _ask(
    system: System,
    jobs: Sequence[Job],
    plan: Plan,
    config: EvalConfig,
    keep: Callable[[Batch, Sequence[Drawn]], None],
) -> None:
    """Several requests at a time; what was answered before the first failure is kept."""
    from lorafleet.eval.endpoint import Endpoint

    if not jobs:
        return
    sampling = plan.sampling[system.name]
    key = config.run.api_key
    with (
        Endpoint(system, config.run, api_key=key.get_secret_value() if key else None) as endpoint,
        ThreadPoolExecutor(config.run.endpoint_threads) as pool,
    ):
        asked = {pool.submit(endpoint.draw, job, sampling): job for job in jobs}
        left = set(asked)
        while left:
            finished, left = wait(left, timeout=1.0, return_when=FIRST_EXCEPTION)
            failed = [future for future in finished if future.exception() is not None]
            for future in finished:
                if future not in failed:
                    keep(Batch(system, sampling, (asked[future],), 1), [future.result()])
            if failed:
                pool.shutdown(cancel_futures=True)
                for future in left:
                    if future.done() and not future.cancelled() and future.exception() is None:
                        keep(Batch(system, sampling, (asked[future],), 1), [future.result()])
                failed[0].result()


def _usual_workers(pictures: int) -> int:
    import torch

    units = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    return max(1, min(units, pictures // PICTURES_PER_WORKER))


def _device(config: EvalConfig) -> str:
    """Kind of device that pictures are drawn on: on Ray it is what the workers' nodes have."""
    if config.base.device != "auto":
        return config.base.device.partition(":")[0]
    if uses_ray(config):
        from lorafleet.eval.ray_crew import has_gpus

        return "cuda" if has_gpus(config) else "cpu"
    from lorafleet.sdxl.base import resolve_device

    return resolve_device("auto").type


def _document(plan: Plan, ready: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    pictures = {
        system.name: ready.get(system.name)
        or [
            {"prompt": job.prompt, "index": job.index, "seed": job.seed, "key": job.key}
            for job in plan.jobs[system.name]
        ]
        for system in plan.systems
    }
    systems = [
        {
            "name": system.name,
            "kind": system.kind,
            "target": system.target,
            "identity": dict(system.identity),
            "fingerprint": system.fingerprint,
            "sampling": asdict(plan.sampling[system.name]),
            "training": dict(system.training),
            "weights": [source.weight for source in system.adapters],
        }
        for system in plan.systems
    ]
    return {
        "suite": plan.suite.model_dump(mode="json"),
        "suite_digest": plan.suite.digest,
        "seeds": plan.seeds,
        "systems": systems,
        "pictures": pictures,
        "versions": {name: metadata.version(name) for name in LIBRARIES},
        "device": plan.device,
    }


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
