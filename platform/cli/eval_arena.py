"""`lorafleet eval arena`: people's votes on pairs of pictures; the store is used directly, no service has to run."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafleet.cli.options import ConfigFile, Json, Overrides, serve_settings
from lorafleet.core.errors import DataNotFound, StorageUnavailable

if TYPE_CHECKING:
    from lorafleet.core.arena.records import Rating, Ratings
    from lorafleet.core.arena.store import Store

arena = typer.Typer(help="People's votes on pairs of pictures: add pairs, see ratings.", no_args_is_help=True)

Pool = Annotated[str | None, typer.Option("--pool", metavar="NAME", help="Of these pairs only [default: all].")]
Url = Annotated[
    str | None,
    typer.Option("--store", metavar="URL", help="sqlite:///FILE or postgresql://... [default: arena.url]."),
]


@arena.command(name="import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as `eval run` prints it.")],
    pool: Annotated[
        str | None, typer.Option("--pool", metavar="NAME", help="What the pairs are called [default: the suite].")
    ] = None,
    store: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make pairs of a run's pictures: the same prompt and seed by different systems. Once more adds nothing."""
    from lorafleet.eval.arena import entrants_of
    from lorafleet.eval.results import read_results
    from lorafleet.eval.run import open_run

    run = open_run(folder)
    try:
        results = read_results(folder)
    except DataNotFound:
        typer.echo("the run has no scores yet: agreement with CLIP will not be known", err=True)
        results = None
    name = pool or run.suite.name
    with _opened(store, config, overrides) as opened:
        pictures, pairs = opened.add(name, entrants_of(run, results))
    if as_json:
        typer.echo(json.dumps({"pool": name, "pictures": pictures, "pairs": pairs}))
        return
    typer.echo(f"{pictures} new pictures, {pairs} new pairs in the pool {name}")


@arena.command()
def ratings(
    pool: Pool = None,
    store: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Rate the systems by all votes: Elo points around a mean of 1000, with 95 % intervals."""
    with _opened(store, config, overrides) as opened:
        from lorafleet.core.arena.ratings import rate

        found, known = rate(opened.votes(pool)), opened.pools()
    if as_json:
        typer.echo(json.dumps(asdict(found), ensure_ascii=False))
        return
    _say(found)
    if not found.votes:
        pools = ", ".join(f"{name} ({pairs} pairs, {votes} votes)" for name, (pairs, votes) in known.items())
        typer.echo(f"no votes yet; pools: {pools or 'none, lorafleet eval arena import RUN makes one'}", err=True)


@arena.command()
def export(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write [default: stdout].")] = None,
    pool: Pool = None,
    store: Url = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Write every vote as CSV: who, which pair, which system was where, what was chosen."""
    with _opened(store, config, overrides) as opened:
        from lorafleet.core.arena.export import votes_csv

        text = votes_csv(opened.votes(pool))
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text, encoding="utf-8")


@contextmanager
def _opened(url: str | None, config_file: Path | None, overrides: list[str] | None) -> Iterator["Store"]:
    given = [f"arena.url={url}"] if url is not None else []
    settings = serve_settings(config_file, [*(overrides or ()), *given])
    try:
        from lorafleet.core.arena.store import open_store
    except ModuleNotFoundError as error:
        raise StorageUnavailable(
            f"votes need {error.name}, which is not installed: pip install 'lorafleet[arena]'."
        ) from error
    store = open_store(settings.arena)
    try:
        yield store
    finally:
        store.close()


def _say(found: "Ratings") -> None:
    rows = [("SYSTEM", "RATING", "95 %", "VOTES", "WON", "LOST", "TIED", "CLIP"), *map(_row, found.systems)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if found.systems else ():
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if (agreement := found.clip_agreement) is not None:
        typer.echo(
            f"CLIP agrees with {agreement.rate:.0%} of {agreement.votes} votes "
            f"(95 %: {agreement.low:.0%} to {agreement.high:.0%})"
        )


def _row(each: "Rating") -> tuple[str, ...]:
    interval = "" if each.low is None or each.high is None else f"{each.low:.0f} to {each.high:.0f}"
    counts = (each.votes, each.wins, each.losses, each.ties)
    clip = "" if each.mean_clip is None else f"{each.mean_clip:.1f}"
    return (each.system, f"{each.rating:.0f}", interval, *map(str, counts), clip)
