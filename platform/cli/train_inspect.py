"""`lorafleet train inspect`: looks at the pictures and captions that one means to train on."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.cli.options import Json
from lorafleet.core.errors import ConfigError, LorafleetError

if TYPE_CHECKING:
    from PIL import Image

    from lorafleet.train.data.config import InspectSettings
    from lorafleet.train.data.plan import OnProgress

SHOWN = 10  # of a list that --json prints whole


def inspect(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="A folder, a .parquet or .tar file, or a URL such as s3://bucket/folder."),
    ],
    sheet: Annotated[Path, typer.Option("--sheet", metavar="FILE", help="Contact sheet to write, a PNG.")] = Path(
        "contact-sheet.png"
    ),
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="YAML file of training settings.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="One setting, such as data.max_aspect=1.5; may be given again."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what DATA holds and what training would stop at or cut off; write a contact sheet. Needs no GPU.

    Ends with 1 if a picture is bad.
    """
    from lorafleet.sdxl.counting import read_counter
    from lorafleet.sdxl.folder import find_base
    from lorafleet.train.data.contact_sheet import MAX_TILES, TILE_PX, contact_sheet
    from lorafleet.train.data.inspection import inspect as look
    from lorafleet.train.data.source import open_source

    settings = _settings(config, overrides or [])
    source = open_source(data, endpoint_url=settings.data.endpoint_url)
    counter = read_counter(find_base(settings.base))
    with _bar("looking") as on_progress:
        found = look(
            source,
            settings.data,
            counter.limits,
            counter.count,
            workers=os.cpu_count() or 1,
            tiles=MAX_TILES,
            tile_px=TILE_PX,
            on_progress=on_progress,
        )
    _save(contact_sheet(found), sheet)
    report = {"data": data, **found.report(), "contact_sheet": str(sheet)}
    typer.echo(json.dumps(report, ensure_ascii=False) if as_json else "\n".join(_lines(report)))
    if found.bad:
        raise typer.Exit(1)


def _settings(config_file: Path | None, overrides: list[str]) -> "InspectSettings":
    """Raises ConfigError."""
    from lorafleet.core.config import load_settings
    from lorafleet.train.data.config import InspectSettings

    for override in overrides:
        if not override.startswith(("base.", "data.")):
            raise ConfigError(f"inspect takes settings of base and data, such as --set data.crops=2, not {override}.")
    return load_settings(InspectSettings, config_file=config_file, overrides=overrides)


def _save(sheet: "Image.Image", place: Path) -> None:
    try:
        sheet.save(place, "PNG")
    except OSError as error:
        raise LorafleetError(f"cannot write {place}: {error.strerror or error}.", param="sheet") from error


def _lines(report: dict[str, Any]) -> Iterator[str]:
    captions = report["captions"]
    yield f"{report['pictures']} pictures, {report['usable']} usable"
    if report["held_out"] is None:
        yield "too few to hold any out: set data.validation_share=0"
    else:
        yield f"{report['held_out']} of them held out for validation"
    yield "buckets: " + (", ".join(f"{size} {count}" for size, count in report["buckets"].items()) or "none")
    yield (
        f"captions: {captions['wordings']}, tokens {captions['tokens_median']:g} in the middle, "
        f"{captions['tokens_max']} at most, of {captions['window']} that are read"
    )
    yield from _list("bad", [each["reason"] for each in report["bad"]])
    yield from _list("the same file", [", ".join(keys) for keys in report["equal"]])
    yield from _list("look alike", [", ".join(keys) for keys in report["alike"]])
    yield from _list("smaller than their bucket", report["enlarged"])
    yield from _list("lose a fifth or more to their bucket", report["cut_by_a_fifth"])
    yield from _list(
        "captions cut off",
        [f"{each['picture']} ({' and '.join(map(str, each['tokens']))} tokens)" for each in captions["truncated"]],
    )
    yield f"contact sheet: {report['contact_sheet']}"


def _list(what: str, those: list[str]) -> Iterator[str]:
    if those:
        yield f"{what}: {len(those)}"
        yield from (f"  {each}" for each in those[:SHOWN])
        if len(those) > SHOWN:
            yield f"  and {len(those) - SHOWN} more (--json lists all)"


@contextmanager
def _bar(what: str) -> Iterator["OnProgress"]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
