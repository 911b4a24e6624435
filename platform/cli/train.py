"""`lorafleet train`: fine-tune an adapter, look at data, merge adapters. Nothing has to run."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from lorafleet.cli.options import ConfigFile, Json, Overrides
from lorafleet.cli.train_inspect import inspect
from lorafleet.core.errors import InvalidRequest

if TYPE_CHECKING:
    from lorafleet.train.config import TrainConfig
    from lorafleet.train.merge import Method
    from lorafleet.train.run import Result

VERSION_CHARS = 12


class _Commands(typer.core.TyperGroup):
    """`lorafleet train DATA` is `lorafleet train run DATA`: what is no command's name is data."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["run", *args]  # options before DATA
        return super().parse_args(ctx, args)


train = typer.Typer(cls=_Commands, no_args_is_help=True, help="Fine-tune an adapter: lorafleet train DATA --name NAME.")


train.command()(inspect)


@train.command(name="run")
def run(
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Captioned images: a folder, parquet or tar files, or s3://...")
    ] = "",
    name: Annotated[str, typer.Option("--name", help="The adapter's name in the registry.")] = "",
    config: ConfigFile = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="As --set run.workers=N.")] = None,
    export: Annotated[
        str | None, typer.Option("--export", metavar="FORMAT", help="Write a file for other tools too: kohya.")
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings as YAML and end.")] = False,
    as_json: Json = False,
) -> None:
    """Train on DATA, write a report, and push the adapter as the newest version of NAME."""
    settings = _settings(config, [*(overrides or ()), *([f"run.workers={workers}"] if workers else [])])
    if print_config:
        from lorafleet.core.config import dump

        typer.echo(dump(settings), nl=False)
        return
    if not data:
        raise typer.BadParameter("give DATA, a folder of captioned images.")
    if not name:
        raise typer.BadParameter("give --name, what the adapter will be called.")
    if export not in (None, "kohya"):
        raise typer.BadParameter(f"--export can be kohya, not {export}.")
    from lorafleet.core.manifest import check_name

    check_name(name)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    typer.echo(f"loading {settings.base.id} ...", err=True)
    from lorafleet.train import run as runs

    result = runs.train(settings, data, name, resumes=resume, exports_kohya=export == "kohya")
    if result.summary:  # torchrun starts several of us, one speaks
        _say_result(result, as_json)


@train.command()
def merge(
    sources: Annotated[
        list[str], typer.Argument(metavar="NAME[:WEIGHT]...", help="Adapters of the registry, NAME@ALIAS too.")
    ],
    name: Annotated[str, typer.Option("--name", help="The merged adapter's name in the registry.")],
    method: Annotated[str, typer.Option("--method", help="linear (equal ranks), svd, ties or dare.")] = "svd",
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, max=128, help="Of the result [default: the largest of the sources].")
    ] = None,
    density: Annotated[
        float, typer.Option("--density", min=0.01, max=0.99, help="Share of the weights that TIES and DARE keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Of DARE's choice.")] = 0,
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Merge adapters of one base into a new one and push it."""
    settings = _settings(config, list(overrides or ()))
    from lorafleet.core.manifest import check_name

    check_name(name)
    from lorafleet.train.merge import METHODS, merge_in_registry

    if method not in METHODS:
        raise InvalidRequest(f"--method is one of {', '.join(METHODS)}, not {method}.", param="method")
    weighted = [_weighted(source) for source in sources]
    manifest = merge_in_registry(
        settings, weighted, name, method=cast("Method", method), rank=rank, density=density, seed=seed
    )
    document = manifest.model_dump(mode="json")
    sentence = f"{name}@{manifest.version[:VERSION_CHARS]}  rank {manifest.rank}"
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else sentence)


def _settings(config_file: Path | None, overrides: list[str]) -> "TrainConfig":
    from lorafleet.core.config import load_settings
    from lorafleet.train.config import TrainConfig

    return load_settings(TrainConfig, config_file=config_file, overrides=overrides)


def _weighted(source: str) -> tuple[str, float]:
    reference, colon, weight = source.rpartition(":")
    try:
        return (reference, float(weight)) if colon else (source, 1.0)
    except ValueError:
        raise typer.BadParameter(f"{source} should be NAME:WEIGHT, the weight a number.") from None


def _say_result(result: "Result", as_json: bool) -> None:
    manifest = result.manifest
    version = None if manifest is None else manifest.version
    document = {
        **result.summary,
        "version": version,
        "adapter": str(result.adapter),
        "report": str(result.folder / "report.html"),
    }
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    if manifest is not None:
        typer.echo(f"{manifest.name}@{manifest.version[:VERSION_CHARS]}")
    typer.echo(f"adapter  {result.adapter}")
    typer.echo(f"report   {document['report']}")
