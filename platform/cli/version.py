"""`lorafleet version`."""

import json

import typer

from lorafleet.cli.options import Json


def version(as_json: Json = False) -> None:
    """Print the version."""
    from importlib import metadata

    found = metadata.version("lorafleet")
    typer.echo(json.dumps({"lorafleet": found}) if as_json else f"lorafleet {found}")
