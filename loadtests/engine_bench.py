"""One table for this machine: diffusers' pipeline and our engine, alone and under load, with and without adapters.

make bench                                         on a GPU with SDXL's architecture and random weights, else emojixl
make bench ARGS="--parts engine,bank --concurrency 1,8 --adapters none,each"
make bench ARGS="--set max_batch=8 --set base.attention=xformers --variant 'one:' --variant 'two: exact=false'"
make bench ARGS="--parts engine --set step_reuse=true --step-reuse 1,2,3"
make bench ARGS=--keep                             also writes loadtests/results/<date>-<machine>.json and .md

Every image has `--steps` Euler steps with guidance 5, the base's own size and a prompt of its own, and ends as PNG
bytes with its recipe. The parts:

baseline, compiled  diffusers' pipeline, eager and with compile_repeated_blocks: one image at a time, and a batch
engine              time to start; images a second and latency of clients that ask again when they have their image
swap                a job with an adapter joins a running batch: the time until it has, and what the others lose
bank                what a step costs without a bank, with one that nobody uses, and with an adapter in every row
low_memory          one image with base.low_memory (GPU only)

engine, swap and bank run for every variant, a set of engine settings, on one engine; without a bank on another one. In
the part engine, adapters have been used once before.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from baseline import measure_baseline
from joins import measure_joins
from measure import Clock, closed_loop, median_ms, peak_gb, percentile_95, reset_peak, run_all, step_gaps_s
from PIL import Image
from report import Report, Row, about, default_path
from workload import BANK, KINDS, MANY, NO_BANK, Variant, Workload

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.base import resolve_device
from lorafleet.serve.engine import Engine, Job

PARTS: Final = ("baseline", "compiled", "engine", "swap", "bank", "low_memory")
ON_CPU: Final = ("baseline", "engine", "swap", "bank")
GAP_STEPS: Final = 48  # jobs join one after the other: with fewer, eight were never all there on a GPU
WARM_STEPS: Final = 4


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _options(arguments)
    try:
        report = run(options, about(resolve_device(options.device), arguments))
    except ConfigError as error:
        print(f"engine_bench: {error}", file=sys.stderr)
        return 2
    print(f"\n{report.markdown()}")
    return 1 if report.failures else 0


def run(options: argparse.Namespace, said: dict[str, Any]) -> Report:
    """All parts that were asked for. `said`: machine, versions, command. Raises ConfigError before the first part."""
    device = resolve_device(options.device)
    on_gpu = device.type == "cuda"
    shared = tuple(options.set)
    by_default = ["engine:"] if on_gpu else ["exact:", "batched: exact=false"]
    variants = [Variant.parse(text) for text in options.variant or by_default]
    variants = [Variant(variant.name, (*shared, *variant.overrides)) for variant in variants]
    for variant in variants:
        variant.engine_settings()
    said = said | {
        "base": options.base or ("sdxl-random" if on_gpu else "emojixl"),
        "steps": options.steps,
        "variants": {variant.name: " ".join((*BANK, *variant.overrides)) for variant in variants},
    }
    path = options.json or (default_path(said) if options.keep else None)
    load = Workload(
        report=Report(said, path, options.budget_s),
        base_id=said["base"],
        device=device,
        steps=options.steps,
        images=options.images or (16 if on_gpu else 4),
        concurrency=options.concurrency,
        kinds=options.adapters,
        step_reuse=options.step_reuse,
    )
    parts = options.parts or (PARTS if on_gpu else ON_CPU)
    if "baseline" in parts:
        measure_baseline(load, compiled=False)
    if "compiled" in parts:
        measure_baseline(load, compiled=True)
    for variant in variants:
        _measure_variant(load, variant, parts)
    if "low_memory" in parts:
        _measure_low_memory(load, Variant("low_memory", shared))
    return load.report


def _measure_variant(load: Workload, variant: Variant, parts: Collection[str]) -> None:
    report, takes_batches = load.report, _takes_batches(load, variant)
    parts = {part for part in parts if part == "engine" or (part in ("swap", "bank") and takes_batches)}
    engine = _start(load, variant) if parts else None
    if engine is None:
        return
    steps: list[Row] = []
    try:
        if "engine" in parts:
            _measure_engine(load, engine, variant)
        if "swap" in parts:
            measure = partial(measure_joins, load, engine, variant)
            report.attempt("swap", f"{variant.name}: a job joins", 12 * load.image_s, measure)
        if "bank" in parts:
            cases = {"a bank that nobody uses": "none", "every job another adapter": "each"}
            _measure_steps(load, engine, variant, cases, steps)
    finally:
        engine.close()
    if steps:
        _compare_steps(load, variant, steps)


def _start(load: Workload, variant: Variant) -> Engine | None:
    engine: Engine | None = None

    def start() -> Row:
        nonlocal engine
        reset_peak(load.device)
        began = time.perf_counter()
        base = load.make_base(variant)
        made = time.perf_counter()
        engine = Engine(base, variant.engine_settings()).start()
        ready = time.perf_counter()
        _finish(load, engine, load.jobs(base, "none")(0))
        load.image_s = time.perf_counter() - ready
        return Row(
            "engine",
            f"{variant.name}: start",
            samples=1,
            median_ms=1e3 * (ready - made),
            peak_gb=peak_gb(load.device),
            note=f"after {made - began:.1f} s for the base; the first image {load.image_s:.2f} s",
        )

    load.report.attempt("engine", f"{variant.name}: start", load.image_s, start)
    return engine


def _measure_engine(load: Workload, engine: Engine, variant: Variant) -> None:
    report = load.report
    report.attempt("engine", f"{variant.name}: PNG", 0, partial(_png_row, load, engine, variant))
    for kind in load.kinds:
        jobs = load.jobs(engine.base, kind, WARM_STEPS)
        run_all(engine, [jobs(i) for i in range(MANY if kind == "each" else 1)])
        for step_reuse, at_once in itertools.product(load.step_reuse, load.concurrency):
            case = f"{variant.name}: {KINDS[kind]}" + (f", step_reuse {step_reuse}" if step_reuse > 1 else "")
            images = at_once + _images(load, at_once)
            measure = partial(_load_row, load, engine, case, kind, step_reuse, at_once)
            report.attempt("engine", case, load.image_s * images, measure)


def _images(load: Workload, at_once: int) -> int:
    """Whole rounds, two at least of more than one."""
    return max(-(-load.images // at_once) * at_once, 2 * at_once)


def _load_row(load: Workload, engine: Engine, case: str, kind: str, step_reuse: int, at_once: int) -> Row:
    reset_peak(load.device)
    jobs = load.jobs(engine.base, kind, step_reuse=step_reuse)
    found = closed_loop(engine, jobs, partial(_png, load, engine), at_once, _images(load, at_once))
    load.image_s = 1 / found.img_s
    return Row(
        "engine",
        case,
        at_once=at_once,
        samples=len(found.latencies_s),
        img_s=found.img_s,
        median_ms=median_ms(found.latencies_s),
        p95_ms=1e3 * percentile_95(found.latencies_s),
        peak_gb=peak_gb(load.device),
        seconds=found.seconds,
        note=f"{found.graphs} graphs compiled meanwhile" if found.graphs else "",
    )


def _png_row(load: Workload, engine: Engine, variant: Variant) -> Row:
    job = load.jobs(engine.base, "none", steps=2)(0)
    image = engine.submit(job).result().image
    seconds, size_bytes = [], 0
    for _ in range(5):
        start = time.perf_counter()
        size_bytes = len(load.png(engine.base, job.request, job.seed, image))
        seconds.append(time.perf_counter() - start)
    note = f"encoding one image of {size_bytes / 1e3:.0f} kB"
    return Row("engine", f"{variant.name}: PNG", samples=5, median_ms=median_ms(seconds), note=note)


def _measure_steps(load: Workload, engine: Engine, variant: Variant, cases: Mapping[str, str], rows: list[Row]) -> None:
    """Adds what a step takes to `rows`, for each of `cases`, adapters by what they are called in the report."""

    def measure() -> None:
        for what, kind in cases.items():
            for at_once in sorted({1, load.most}):
                rows.append(_step_row(load, engine, f"{variant.name}: a step, {what}", kind, at_once))

    estimate_s = len(cases) * load.image_s * (GAP_STEPS + 4) / load.steps * sum({1, load.most})
    load.report.attempt("bank", f"{variant.name}: a step", estimate_s, measure)


def _compare_steps(load: Workload, variant: Variant, steps: list[Row]) -> None:
    """Adds rows of steps without a bank, and then `steps` beside these."""
    without: list[Row] = []

    def measure() -> None:
        with load.engine(variant, NO_BANK) as engine:
            _measure_steps(load, engine, variant, {"no bank": "none"}, without)

    load.report.attempt("bank", f"{variant.name}: a step, no bank", load.image_s, measure)
    without_ms = {row.at_once: row.median_ms for row in without}
    for row in (*without, *steps):
        load.report.add(_compared(row, without_ms.get(row.at_once)))


def _step_row(load: Workload, engine: Engine, what: str, kind: str, at_once: int) -> Row:
    jobs = load.jobs(engine.base, kind, GAP_STEPS)
    run_all(engine, [replace(jobs(i), request=load.request(i, WARM_STEPS)) for i in range(at_once)])
    gaps_s = step_gaps_s(engine, jobs, at_once, Clock(load.device))
    return Row(
        "bank",
        what,
        at_once=at_once,
        samples=len(gaps_s),
        median_ms=median_ms(gaps_s),
        p95_ms=1e3 * percentile_95(gaps_s),
        note=f"{2 * at_once} rows",
    )


def _compared(row: Row, without_ms: float | None) -> Row:
    assert row.median_ms is not None
    if without_ms is None or without_ms == row.median_ms:
        return row
    return replace(row, note=f"{row.note}, {row.median_ms / without_ms - 1:+.1%}")


def _measure_low_memory(load: Workload, variant: Variant) -> None:
    def measure() -> Row:
        base = load.make_base(variant, "base.low_memory=true")
        reset_peak(load.device)
        with Engine(base, variant.engine_settings(NO_BANK)) as engine:
            start = time.perf_counter()
            _finish(load, engine, load.jobs(base, "none")(0))
            seconds = time.perf_counter() - start
            return Row(
                "low_memory", "one image", at_once=1, samples=1, median_ms=1e3 * seconds, peak_gb=peak_gb(load.device)
            )

    load.report.attempt("low_memory", "one image", 10 * load.image_s, measure)


def _takes_batches(load: Workload, variant: Variant) -> bool:
    settings = variant.engine_settings()
    is_exact = load.device.type != "cuda" if settings.exact is None else settings.exact
    return not is_exact


def _finish(load: Workload, engine: Engine, job: Job) -> bytes:
    return _png(load, engine, job, engine.submit(job).result().image)


def _png(load: Workload, engine: Engine, job: Job, image: Image.Image) -> bytes:
    return load.png(engine.base, job.request, job.seed, image)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", help="emojixl, sdxl-random, tiny-random, a folder or a hub id")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--parts", type=_names(PARTS), help=f"of {','.join(PARTS)}")
    add("--concurrency", type=_numbers, default=(1, 2, 4, 8), help="jobs at a time, such as 1,8")
    add("--adapters", type=_names(KINDS), default=tuple(KINDS), help=f"of {','.join(KINDS)}")
    add("--steps", type=int, default=20)
    add("--step-reuse", type=_numbers, default=(1,), help="in the part engine, such as 1,2,3")
    add("--images", type=int, help="at least as many for a row; 16 on a GPU, else 4")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an engine setting, or base.KEY, for all variants",
    )
    add("--variant", action="append", metavar="'NAME: KEY=VALUE ...'", help="engine settings to measure; repeatable")
    add("--json", type=Path, metavar="PATH", help="write the rows there as they come, and the table beside it as .md")
    add("--keep", action="store_true", help="the same in loadtests/results/")
    add("--budget-s", type=float, default=float("inf"), help="leave out what does not fit into so many seconds")
    return parser.parse_args(arguments)


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not one of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in text.split(","))
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("at least one job at a time")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
