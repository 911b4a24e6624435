"""`lorafleet eval promote`: from a candidate to what the bare name means, if it is better. One plain command, so that
a RayJob can run it after training."""

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.cli.options import ConfigFile, Json, Overrides

if TYPE_CHECKING:
    from lorafleet.core.evaluation import Evaluation
    from lorafleet.eval.canary import Source, Tally
    from lorafleet.eval.promotion import Contest, Rollout

REFUSED = 1
SYSTEMS = ("base", "production", "candidate")


def promote(
    name: Annotated[
        str, typer.Argument(metavar="NAME@CANDIDATE", help="NAME@ALIAS, NAME@latest, or NAME@ and first digits.")
    ],
    suite: Annotated[str, typer.Option("--suite", metavar="SUITE", help="As eval run takes it.")] = "emoji",
    reference: Annotated[
        Path | None,
        typer.Option("--reference", metavar="DIR", help="Pictures to come near to, kept out of training."),
    ] = None,
    weight: Annotated[float, typer.Option("--weight", help="That the adapters are used with.")] = 1.0,
    epsilon: Annotated[float, typer.Option("--epsilon", min=0, help="Points of CLIP score that may be lost.")] = 0.5,
    canary: Annotated[
        float | None,
        typer.Option("--canary", metavar="SHARE", help="Give it this share of the requests first, such as 0.1."),
    ] = None,
    watch_s: Annotated[float, typer.Option("--watch-s", min=1, help="Seconds to watch the canary.")] = 600.0,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metrics", metavar="URL", help="A /metrics page of the service; may be given again."),
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option("--prometheus", metavar="URL", help="A Prometheus that scrapes the service.")
    ] = None,
    min_requests: Annotated[
        int, typer.Option("--min-requests", min=5, help="That both versions must answer meanwhile.")
    ] = 50,
    max_errors: Annotated[
        float,
        typer.Option("--max-errors", min=0, max=1, help="By how much its error rate may be above the other's."),
    ] = 0.02,
    max_latency: Annotated[
        float, typer.Option("--max-latency", min=1, help="How many times as long requests may take.")
    ] = 1.5,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Compare a candidate with the base and with what is in production, and move the alias production to it if its
    pictures are better. Ends with 0 if it was promoted, with 1 if not."""
    if canary is not None and not 0 < canary < 1:
        raise typer.BadParameter(f"--canary must be between 0 and 1, not {canary:g}.")
    if (canary is not None) != (bool(metrics) != (prometheus is not None)):
        raise typer.BadParameter("--canary needs --metrics or --prometheus, one of them, to see how it does.")
    from lorafleet.core.config import load_settings
    from lorafleet.core.registry import open_registry
    from lorafleet.eval.config import EvalConfig

    given = [f"reference={reference.absolute()}"] if reference is not None else []
    settings = load_settings(EvalConfig, config_file=config, overrides=[*(overrides or ()), *given])
    from lorafleet.eval.suites import load_suite

    loaded = load_suite(suite)
    from lorafleet.eval.promotion import compare, contest_of, decide

    registry = open_registry(settings.registry)
    contest = contest_of(registry, name, weight)
    rollout = None
    if canary is not None:
        if contest.before is None:
            typer.echo("nothing is in production to compare a canary with: the gate alone decides", err=True)
        rollout = _rollout(canary, watch_s, min_requests, max_errors, max_latency, metrics or [], prometheus)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a canary's split is taken back
    from lorafleet.cli.eval import progress_bars

    with progress_bars() as on_progress:
        results = compare(contest, loaded, settings, on_progress=on_progress)
    found = decide(registry, contest, results, epsilon=epsilon, rollout=rollout, on_look=_say_look)
    _say(contest, found, as_json)
    if found.decision != "promoted":
        raise typer.Exit(REFUSED)


def _rollout(
    share: float,
    watch_s: float,
    requests: int,
    error_rate: float,
    latency_ratio: float,
    pages: list[str],
    prometheus: str | None,
) -> "Rollout":
    from lorafleet.eval.canary import Limits
    from lorafleet.eval.canary_metrics import Pages, Prometheus
    from lorafleet.eval.promotion import Rollout

    def open_source(adapter: str) -> "Source":
        return Pages(pages, adapter) if prometheus is None else Prometheus(prometheus, adapter)

    limits = Limits(watch_s, requests=requests, error_rate=error_rate, latency_ratio=latency_ratio)
    return Rollout(share, limits, open_source, every_s=min(5.0, watch_s / 10))


def _say_look(stable: "Tally", canary: "Tally") -> None:
    typer.echo(
        f"canary {canary.requests} requests, {canary.errors} failed; before {stable.requests}, {stable.errors} failed",
        err=True,
    )


def _say(contest: "Contest", found: "Evaluation", as_json: bool) -> None:
    candidate = contest.candidate
    if as_json:
        document = {"name": candidate.name, "version": candidate.version, **found.model_dump(mode="json")}
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    scores = list(found.differences)
    rows = [("SYSTEM", *(score.upper() for score in scores))]
    for system in SYSTEMS:
        if system in found.scores:
            cells = (found.scores[system][score] for score in scores)
            rows.append((system, *(f"{each.mean:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in cells)))
    differences = (f"{each.mean:+.2f} [{each.low:+.2f}, {each.high:+.2f}]" for each in found.differences.values())
    rows.append(("difference", *differences))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for reason in found.reasons:
        typer.echo(f"- {reason}")
    typer.echo(f"{candidate.name}@{candidate.version[:12]} is {found.decision.replace('_', ' ')}")
