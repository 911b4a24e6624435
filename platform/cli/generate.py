"""`lorafleet generate`: images from a running service, or made in this process with --local."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from pydantic import ValidationError

from lorafleet.cli.options import ConfigFile, Json, Overrides, serve_settings
from lorafleet.core.errors import InvalidRequest, RecipeMismatch
from lorafleet.core.generation import MAX_STEP_REUSE, SCHEDULERS, GenerationRequest
from lorafleet.core.ranges import invalid_request

if TYPE_CHECKING:
    from lorafleet.core.recipe import Recipe
    from lorafleet.serve.config import ServeSettings

DEFAULT_URL = "http://127.0.0.1:8000"
PREVIEWS = 8


class Result(Protocol):
    """What the client and the pipeline both give."""

    @property
    def images(self) -> Sequence[bytes]: ...
    @property
    def seeds(self) -> Sequence[int]: ...
    @property
    def timings(self) -> Mapping[str, float]: ...
    @property
    def warnings(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Streamed:
    """A result put together from events."""

    images: Sequence[bytes]
    seeds: Sequence[int]
    timings: Mapping[str, float]
    warnings: Sequence[str]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="What to draw; not needed with --recipe.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file; several images are numbered.")] = Path(
        "out.png"
    ),
    seed: Annotated[int | None, typer.Option(help="Noise seed [default: a random one, printed].")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps [default: 20].")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strictly to follow the prompt [default: 5].")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels [default: the base model's].")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels [default: the base model's].")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    scheduler: Annotated[str | None, typer.Option(help=f"One of {', '.join(SCHEDULERS)} [default: euler].")] = None,
    step_reuse: Annotated[
        int | None,
        typer.Option(
            help=f"Changes the image: only every n-th step, up to {MAX_STEP_REUSE}, runs the whole model [default: 1]."
        ),
    ] = None,
    num_images: Annotated[int | None, typer.Option("--num-images", "-n", help="Images, seeds counting up.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="NAME[:WEIGHT]",
            help="An adapter of the registry, NAME@ALIAS or NAME@VERSION too; up to 4 times [default weight: 1].",
        ),
    ] = None,
    url: Annotated[str | None, typer.Option(help=f"The service [default: {DEFAULT_URL}].")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show how far the service is, step by step.")] = False,
    preview: Annotated[
        Path | None, typer.Option(metavar="PNG", help="With --stream: keep the newest small picture of it here.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="Load the model here instead of asking a service.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Make this image again; other options change what they name.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make images of PROMPT and save them as PNG files, each with its recipe inside."""
    if local and url:
        raise typer.BadParameter("--local makes the image here, --url elsewhere: give one of them.")
    if local and stream:
        raise typer.BadParameter("--local shows its steps anyway; leave out --stream.")
    if preview and not stream:
        raise typer.BadParameter("--preview shows what --stream tells; give both.")
    if not local and (config or overrides):
        raise typer.BadParameter("--config and --set configure --local; a service has its own settings.")
    if recipe and num_images:
        raise typer.BadParameter("--recipe makes one image; leave out --num-images.")
    if recipe is None and prompt is None:
        raise typer.BadParameter("give a PROMPT, or an image to make again with --recipe.")
    fields = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "step_reuse": step_reuse,
        "seed": seed,
        "num_images": num_images,
        "adapters": [_adapter(text) for text in adapter] if adapter else None,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    wanted = _request(given, recipe)
    files = _files(output, 1 if recipe else num_images or 1)
    if preview:
        _files(preview, 1)
    if local:
        result = _generate_here(wanted, serve_settings(config, overrides))
    else:
        result = _stream_from(url or DEFAULT_URL, wanted, preview) if stream else _ask(url or DEFAULT_URL, wanted)
    for warning in result.warnings:
        typer.echo(f"warning: {warning}", err=True)
    for file, image in zip(files, result.images, strict=True):
        file.write_bytes(image)
    _report(files, result, as_json)


def _request(given: dict[str, Any], recipe_file: Path | None) -> "GenerationRequest | Recipe":
    from lorafleet.core.recipe import Recipe, extract

    fields = {**extract(recipe_file).model_dump(), **given} if recipe_file else given
    kind = Recipe if recipe_file else GenerationRequest
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid_request(error, kind) from None


def _adapter(text: str) -> dict[str, Any]:
    name, colon, weight = text.partition(":")
    try:
        return {"name": name, "weight": float(weight)} if colon else {"name": name}
    except ValueError:
        raise typer.BadParameter(f"--adapter {text} should be NAME or NAME:WEIGHT, the weight a number.") from None


def _files(output: Path, count: int) -> list[Path]:
    """Where the images go; checked before the work is done."""
    if output.suffix.lower() != ".png":
        raise InvalidRequest(f"images are saved as PNG: {output} should end in .png.", param="output")
    if not output.parent.is_dir():
        raise InvalidRequest(f"there is no folder {output.parent} to save {output.name} in.", param="output")
    files = [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(1, count + 1)]
    for file in files:
        if file.is_dir():
            raise InvalidRequest(f"{file} is a folder: name a file in it.", param="output")
    return files


def _ask(url: str, wanted: "GenerationRequest | Recipe") -> Result:
    from rich.console import Console

    from lorafleet.client import Client

    with Client(url) as client, Console(stderr=True).status("generating"):
        return client.generate(wanted)


def _stream_from(url: str, wanted: "GenerationRequest | Recipe", preview: Path | None) -> Result:
    """As `_ask`, with a bar. Ctrl-C closes the stream, and so calls the work off."""
    from contextlib import closing

    from lorafleet.client import Client, Done, Downloading, Image, Step

    images: dict[int, Image] = {}
    steps: dict[int, int] = {}
    with (
        Client(url) as client,
        closing(client.stream(wanted, previews=PREVIEWS if preview else 0)) as events,
        _step_bar() as on_step,
    ):
        for event in events:
            if isinstance(event, Downloading):
                on_step(event.done_bytes, event.total_bytes, f"downloading {event.adapter}")
            elif isinstance(event, Step):
                steps[event.image] = event.done
                on_step(sum(steps.values()), event.total * getattr(wanted, "num_images", 1))
                if preview and event.preview:
                    preview.write_bytes(event.preview)
            elif isinstance(event, Image):
                images[event.image] = event
            elif isinstance(event, Done):
                in_order = [images[number] for number in sorted(images)]
                return Streamed(
                    [image.png for image in in_order],
                    [image.seed for image in in_order],
                    event.timings,
                    event.warnings,
                )
    raise AssertionError("a stream ends with Done or an error")


def _generate_here(wanted: "GenerationRequest | Recipe", settings: "ServeSettings") -> Result:
    from lorafleet.core.recipe import Recipe
    from lorafleet.core.registry import open_registry
    from lorafleet.sdxl.base import load_base
    from lorafleet.serve.pipeline import Pipeline

    registry = open_registry(settings.registry)
    for use in wanted.adapters:
        registry.resolve(use.name)  # a name that is unknown is told before the model is loaded
    base = load_base(settings.base)
    if isinstance(wanted, Recipe):
        if wanted.base.fingerprint != base.fingerprint:
            raise RecipeMismatch(
                f"the recipe was made by {wanted.base.id} ({wanted.base.fingerprint[:12]}), but {base.id} "
                f"({base.fingerprint[:12]}) is loaded: set base.id.",
                param="base",
            )
        if wanted.start is not None:
            raise InvalidRequest(
                "this image was made from a picture, which its recipe does not hold: send both to a service.",
                param="recipe",
            )
        wanted = wanted.request()
    with _step_bar() as on_step:
        return Pipeline(base, settings.engine, registry).generate(wanted, on_step=on_step)


@contextmanager
def _step_bar() -> Iterator[Any]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("steps", total=None)

        def on_step(done: int, total: int, what: str = "steps") -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield on_step


def _report(files: list[Path], result: Result, as_json: bool) -> None:
    if as_json:
        images = [{"file": str(file), "seed": seed} for file, seed in zip(files, result.seeds, strict=True)]
        document = {"images": images, "timings": dict(result.timings), "warnings": list(result.warnings)}
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    for file, seed in zip(files, result.seeds, strict=True):
        typer.echo(f"{file}  seed {seed}")
    typer.echo(f"{len(files)} image{'s' if len(files) > 1 else ''} in {result.timings['total_s']:.2f} s", err=True)
