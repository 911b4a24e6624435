"""`lorafleet eval`: compare systems on prompts, with statistics. Nothing has to run."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.cli.eval_arena import arena
from lorafleet.cli.eval_promote import promote
from lorafleet.cli.options import ConfigFile, Json, Overrides
from lorafleet.core.errors import InvalidRequest

if TYPE_CHECKING:
    from lorafleet.eval.config import EvalConfig
    from lorafleet.eval.results import Results
    from lorafleet.eval.run import OnProgress, Run
    from lorafleet.eval.systems import SystemSpec

MAX_SWEEP = 16

evaluation = typer.Typer(
    no_args_is_help=True, help="Compare adapters and models on prompts, with scores that are evidence."
)
evaluation.add_typer(arena, name="arena")
evaluation.command()(promote)

Folder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as `eval run` prints it.")]
Baseline = Annotated[
    str | None, typer.Option("--baseline", metavar="NAME", help="The system others are compared with [default: first].")
]


@evaluation.command(name="run")
def run(
    suite: Annotated[
        str,
        typer.Option(
            "--suite",
            metavar="SUITE",
            help="emoji, classic5, a .yaml file, coco:FILE, parti:FILE or captions:TRAIN[:HELD_OUT].",
        ),
    ] = "emoji",
    systems: Annotated[
        list[str] | None,
        typer.Option(
            "--system",
            metavar="[NAME=]KIND[:TARGET]",
            help="base, adapter:NAME[@ALIAS][:WEIGHT], pipeline:ID, folder:PATH, http://... or openai:http://...; "
            "may be given again; options follow, such as ,steps=4,guidance=0.",
        ),
    ] = None,
    sweep: Annotated[
        str | None,
        typer.Option("--sweep", metavar="W,W,...", help="Draw each adapter at these weights too, such as 0.25,0.5,1."),
    ] = None,
    baseline: Baseline = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Run's folder [default: under LORAFLEET_HOME].")
    ] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="As --set run.workers=N.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as YAML and end.")] = False,
    as_json: Json = False,
) -> None:
    """Draw every prompt with every system, score, compare and write a report. Goes on where it was stopped."""
    settings = _settings(config, [*(overrides or ()), *([f"run.workers={workers}"] if workers else [])])
    if print_config:
        from lorafleet.core.config import dump

        typer.echo(dump(settings), nl=False)
        return
    from lorafleet.eval.suites import load_suite
    from lorafleet.eval.systems import SystemSpec

    specs = _swept([SystemSpec.parse(text) for text in systems or ()], sweep)
    if baseline is not None and baseline not in [spec.name for spec in specs]:
        raise InvalidRequest(f"--baseline {baseline} is none of the systems: {', '.join(s.name for s in specs)}.")
    loaded = load_suite(suite)
    _log()
    from lorafleet.eval.run import run_suite

    with progress_bars() as on_progress:
        done = run_suite(loaded, specs, settings, folder=out, on_progress=on_progress)
    _finish(done, settings, baseline, as_json)


@evaluation.command()
def score(
    folder: Folder,
    baseline: Baseline = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Score a run's pictures again, such as with --set scorer.model=openai/clip-vit-base-patch32."""
    from lorafleet.eval.run import SETTINGS_FILE, open_run

    opened = open_run(folder)
    own = folder / SETTINGS_FILE
    settings = _settings(config or (own if own.is_file() else None), list(overrides or ()))
    _log()
    _finish(opened, settings, baseline, as_json)


@evaluation.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="One run, or several of the same prompts.")],
    baseline: Baseline = None,
    score: Annotated[
        str | None, typer.Option("--score", help="Which score decides [default: the run's first].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which systems differ, with intervals, p values and the prompts that a difference would need."""
    from lorafleet.eval.results import baseline_of, merged, read_results

    results = merged({folder.name or str(folder): read_results(folder) for folder in folders})
    _say(results, baseline_of(results, baseline), score, as_json)


@evaluation.command()
def report(folder: Folder, baseline: Baseline = None) -> None:
    """Write a run's report.html and plots again, such as against another baseline."""
    from lorafleet.eval.report import write_report
    from lorafleet.eval.results import baseline_of, read_results
    from lorafleet.eval.run import open_run

    results = read_results(folder)
    typer.echo(str(write_report(open_run(folder), results, baseline_of(results, baseline))))


def _finish(done: "Run", settings: "EvalConfig", baseline: str | None, as_json: bool) -> None:
    from lorafleet.eval.metrics import tell_scores
    from lorafleet.eval.report import write_report
    from lorafleet.eval.results import baseline_of, score_run, write_results

    results = score_run(done, settings)
    chosen = baseline_of(results, baseline)
    write_results(results, done.folder, chosen)
    tell_scores(results, settings)
    place = write_report(done, results, chosen)
    _say(results, chosen, None, as_json, folder=done.folder)
    typer.echo(f"report   {place}", err=True)


def _say(results: "Results", baseline: str, score: str | None, as_json: bool, *, folder: Path | None = None) -> None:
    from lorafleet.eval.results import spelled

    name = score or results.primary
    against = results.against(baseline, name)
    if as_json:
        document = {
            "run": None if folder is None else str(folder),
            "suite": results.suite.name,
            "suite_digest": results.suite_digest,
            "score": name,
            "baseline": baseline,
            "systems": {
                each.name: {key: found.mean for key, found in each.scores.items()} for each in results.systems.values()
            },
            "comparisons": {other: comparison.as_dict() for other, comparison in against.items()},
        }
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    rows = [("MODEL", name.upper(), "STD", "INTERVAL", f"CHANGE TO {baseline}")]
    for system in results.systems.values():
        found = system.scores[name]
        interval = "" if found.low is None or found.high is None else f"[{found.low:.2f}, {found.high:.2f}]"
        change = spelled(against[system.name]) if system.name in against else ""
        rows.append((system.name, f"{found.mean:.2f}", f"{found.std or 0:.2f}", interval, change))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if folder is not None:
        typer.echo(f"run      {folder}")


def _swept(specs: "Sequence[SystemSpec]", sweep: str | None) -> "list[SystemSpec]":
    """The systems, each adapter at the wanted weights in place of its own."""
    if sweep is None:
        return list(specs)
    try:
        weights = sorted({float(text) for text in sweep.split(",")})
    except ValueError:
        raise InvalidRequest(f"--sweep takes weights such as 0.25,0.5,1, not {sweep}.", param="sweep") from None
    if len(weights) > MAX_SWEEP:
        raise InvalidRequest(f"--sweep takes at most {MAX_SWEEP} weights, not {len(weights)}.", param="sweep")
    if not any(spec.kind == "adapter" for spec in specs):
        raise InvalidRequest(
            "--sweep needs a system that is an adapter, such as --system adapter:plush.", param="sweep"
        )
    swept: list[SystemSpec] = []
    for spec in specs:
        swept += [spec.weighted(weight) for weight in weights] if spec.kind == "adapter" else [spec]
    return swept


def _settings(config_file: Path | None, overrides: list[str]) -> "EvalConfig":
    from lorafleet.core.config import load_settings
    from lorafleet.eval.config import EvalConfig

    return load_settings(EvalConfig, config_file=config_file, overrides=overrides)


def _log() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")


@contextmanager
def progress_bars() -> "Iterator[OnProgress]":
    """A bar for each system on stderr, if that is a terminal; else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    said: dict[str, int] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def on_progress(system: str, done: int, total: int) -> None:
            if system not in tasks:
                tasks[system] = progress.add_task(system, total=total)
            progress.update(tasks[system], completed=done)
            tenth = 10 * done // max(1, total)
            if not console.is_terminal and said.get(system) != tenth:
                said[system] = tenth
                typer.echo(f"{system}: {done} of {total} pictures", err=True)

        yield on_progress
