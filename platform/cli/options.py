"""Options that several commands take, and the settings behind them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lorafleet.serve.config import ServeSettings

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="YAML file of settings (see --print-config of serve)."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="One setting, such as base.id=PATH; may be given again."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def serve_settings(config_file: Path | None, overrides: Sequence[str] | None) -> "ServeSettings":
    """The service's settings from all sources. Raises ConfigError."""
    from lorafleet.core.config import load_settings
    from lorafleet.serve.config import ServeSettings

    return load_settings(ServeSettings, config_file=config_file, overrides=overrides or ())
