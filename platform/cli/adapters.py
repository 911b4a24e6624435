"""`lorafleet adapters`: the registry, used directly; no service has to run."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafleet.cli.options import ConfigFile, Json, Overrides
from lorafleet.core.errors import InvalidRequest

if TYPE_CHECKING:
    from lorafleet.core.manifest import Entry, Manifest, Shares
    from lorafleet.core.registry import Registry
    from lorafleet.core.storage import OnProgress
    from lorafleet.sdxl.config import BaseConfig

HOUR_S = 3600.0
VERSION_CHARS = 12

RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry", metavar="URL", help="A folder or s3://bucket/folder [default: LORAFLEET_HOME/registry]."
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME")]
Reference = Annotated[
    str, typer.Argument(metavar="NAME", help="NAME, NAME@ALIAS, or NAME@ and a version's first digits.")
]

adapters = typer.Typer(
    help="Push, list, pull and name adapters: LoRA files in a folder or a bucket.", no_args_is_help=True
)


@adapters.command()
def push(
    name: Name,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA as safetensors, of diffusers, PEFT or kohya.")],
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Check FILE against the base model (base.id) and store it as the newest version of NAME."""
    opened, base = _open(registry, config, overrides)
    from lorafleet.core.manifest import check_name

    check_name(name)
    if not file.is_file():
        raise InvalidRequest(f"cannot read {file}: there is no such file.", param="file")
    typer.echo(f"checking {file.name} against {base.id} ...", err=True)
    from lorafleet.sdxl.adapter_file import base_targets, check_against, standalone

    targets = base_targets(base)
    with tempfile.TemporaryDirectory(prefix="lorafleet-") as folder, _bytes_bar("uploading") as on_progress:
        whole = standalone(file, targets, Path(folder))
        manifest = opened.push(name, whole, check_against(targets), on_progress=on_progress)
    _say(_document(manifest), f"{name}@{manifest.version[:VERSION_CHARS]}", as_json)


@adapters.command(name="list")
def list_(
    registry: RegistryUrl = None, config: ConfigFile = None, overrides: Overrides = None, as_json: Json = False
) -> None:
    """List all adapters, each with the version that its bare name means."""
    entries = _open(registry, config, overrides)[0].entries()
    if as_json:
        typer.echo(json.dumps({"adapters": [_entry(entry) for entry in entries]}, ensure_ascii=False))
        return
    header = ("NAME", "VERSION", "VERSIONS", "RANK", "MB", "PUSHED", "ALIASES")
    rows = [
        (
            entry.name,
            entry.manifest.version[:VERSION_CHARS],
            str(len(entry.versions)),
            str(entry.manifest.rank),
            f"{entry.manifest.size_bytes / 1e6:.1f}",
            f"{entry.manifest.pushed_at:%Y-%m-%d %H:%M}",
            ", ".join(alias for alias in entry.aliases if alias != "latest"),
        )
        for entry in entries
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows) if rows else ():
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if not rows:
        typer.echo("no adapters yet: lorafleet adapters push NAME FILE", err=True)


@adapters.command()
def show(
    name: Reference,
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Say what a version is, what evaluations found of it, and which others and which aliases there are."""
    opened = _open(registry, config, overrides)[0]
    manifest = opened.resolve(name, draw=0.0).manifest
    record = opened.record(manifest.name)
    versions = [{"version": each.version, "pushed_at": each.pushed_at.isoformat()} for each in record.manifests]
    evaluations = opened.evaluations(manifest)
    document = {
        **_document(manifest),
        "aliases": record.entry.aliases,
        "versions": versions,
        "evaluations": {number: each.model_dump(mode="json") for number, each in evaluations.items()},
    }
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    for key, value in _document(manifest).items():
        typer.echo(f"{key:<17} {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    for alias, shares in record.entry.aliases.items():
        typer.echo(f"{'alias ' + alias:<17} {_split(shares)}")
    for each in record.manifests:
        typer.echo(f"{'version':<17} {each.version[:VERSION_CHARS]}  {each.pushed_at:%Y-%m-%d %H:%M}")
    for found in evaluations.values():
        about = f"{found.suite}, {found.prompts} prompts {found.suite_digest[:VERSION_CHARS]}"
        typer.echo(f"{'evaluation':<17} {found.decided_at:%Y-%m-%d %H:%M}  {found.decision}  {about}")
        for reason in found.reasons:
            typer.echo(f"{'':<17} - {reason}")


@adapters.command()
def pull(
    name: Reference,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write [default: NAME.safetensors].")
    ] = None,
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Save an adapter's file, its hash checked."""
    opened = _open(registry, config, overrides)[0]
    from lorafleet.core.manifest import Reference as Parsed

    place = output or Path(f"{Parsed.parse(name).name}.safetensors")
    if place.is_dir() or not place.parent.is_dir():
        raise InvalidRequest(f"{place} is a folder, or in none that is there: name a file.", param="output")
    manifest = opened.resolve(name).manifest
    with _bytes_bar("downloading") as on_progress:
        cached = opened.pull(manifest, on_progress=on_progress)
    _copy(cached, place)
    _say({"file": str(place), **_document(manifest)}, str(place), as_json)


@adapters.command()
def alias(
    name: Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as production, which the bare name means.")],
    versions: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="VERSION[=WEIGHT]...", help="First digits or an alias; several share requests by their weights."
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the alias.")] = False,
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Point ALIAS at a version of NAME, or at several."""
    if remove == bool(versions):
        raise typer.BadParameter("give a VERSION, or --remove.")
    opened = _open(registry, config, overrides)[0]
    if remove:
        opened.unalias(name, alias)
        _say({"name": name, "alias": alias, "versions": {}}, f"{name}@{alias} is removed", as_json)
        return
    shares = opened.alias(name, alias, dict(_weighted(text) for text in versions or ()))
    _say_alias(name, alias, shares, as_json)


@adapters.command()
def promote(
    name: Reference,
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Make a version what the bare name means: the alias production; of a bare NAME the latest."""
    shares = _open(registry, config, overrides)[0].promote(name)
    _say_alias(name.partition("@")[0], "production", shares, as_json)


@adapters.command()
def rm(
    name: Reference,
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Delete a version, or of a bare NAME all of them, unless an alias points there."""
    gone = _open(registry, config, overrides)[0].delete(name)
    references = [f"{each.name}@{each.version}" for each in gone]
    _say({"deleted": references}, "\n".join(references), as_json)


@adapters.command()
def gc(
    older_than_h: Annotated[
        float,
        typer.Option("--older-than", metavar="HOURS", help="Leave what is younger: a push may be at work.", min=0),
    ] = 24.0,
    registry: RegistryUrl = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Remove what interrupted pushes left, and make the index again."""
    garbage = _open(registry, config, overrides)[0].gc(older_than_s=older_than_h * HOUR_S)
    document = {"removed": list(garbage.removed), "size_bytes": garbage.size_bytes}
    _say(document, f"{len(garbage.removed)} objects, {garbage.size_bytes} bytes removed", as_json)


def _open(
    url: str | None, config_file: Path | None, overrides: Sequence[str] | None
) -> tuple["Registry", "BaseConfig"]:
    """The registry, and the base that adapters are checked against, from the settings that the service has too."""
    from lorafleet.core.config import load_settings
    from lorafleet.core.registry import open_registry
    from lorafleet.serve.config import ServeSettings

    given = [f"registry.url={url}"] if url is not None else []
    settings = load_settings(ServeSettings, config_file=config_file, overrides=[*(overrides or ()), *given])
    return open_registry(settings.registry), settings.base


def _document(manifest: "Manifest") -> dict[str, Any]:
    """A manifest for machines, name and version first."""
    fields = manifest.model_dump(mode="json")
    first = ("name", "version")
    return {key: fields[key] for key in (*first, *(key for key in fields if key not in first))}


def _entry(entry: "Entry") -> dict[str, Any]:
    return {**_document(entry.manifest), "aliases": entry.aliases, "versions": list(entry.versions)}


def _weighted(text: str) -> tuple[str, float]:
    version, equals, weight = text.partition("=")
    try:
        return version, float(weight) if equals else 1.0
    except ValueError:
        raise typer.BadParameter(f"{text} should be VERSION=WEIGHT, the weight a number.") from None


def _split(shares: "Shares") -> str:
    if len(shares) == 1:
        return next(iter(shares))[:VERSION_CHARS]
    return ", ".join(f"{version[:VERSION_CHARS]} {share:.1%}" for version, share in shares.items())


def _say_alias(name: str, alias: str, shares: "Shares", as_json: bool) -> None:
    _say({"name": name, "alias": alias, "versions": shares}, f"{name}@{alias} is {_split(shares)}", as_json)


def _say(document: Mapping[str, Any], sentence: str, as_json: bool) -> None:
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else sentence)


def _copy(source: Path, place: Path) -> None:
    """Whole or not at all; the cache's own file is not handed out to be changed."""
    import shutil

    from lorafleet.core.errors import LorafleetError

    try:
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=f".{place.name}.", delete=False) as target:
            part = Path(target.name)
        try:
            shutil.copyfile(source, part)
            part.chmod(0o644)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise LorafleetError(f"cannot write {place}: {error.strerror}.", param="output") from error


@contextmanager
def _bytes_bar(what: str) -> Iterator["OnProgress"]:
    """A progress bar on stderr, if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
