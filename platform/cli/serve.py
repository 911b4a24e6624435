"""`lorafleet serve`: the service in the foreground."""

import json
import shlex
from collections.abc import Sequence
from typing import Annotated

import typer

from lorafleet.cli.options import ConfigFile, Overrides, serve_settings

EXAMPLE = {"prompt": "a red apple on a blue background", "seed": 1}


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on [default: 8000].")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the merged settings and stop.")] = False,
) -> None:
    """Start the service and stay until Ctrl-C.

    Settings come from defaults, the --config file, LORAFLEET_* variables (LORAFLEET_BASE__ID for base.id) and
    --set, the later winning.
    """
    flags = {"host": host, "port": port}
    given = [f"{name}={value}" for name, value in flags.items() if value is not None]
    settings = serve_settings(config, [*(overrides or []), *given])
    if print_config:
        from lorafleet.core.config import dump

        typer.echo(dump(settings), nl=False)
        return

    from lorafleet.serve.launch import serve_forever

    typer.echo(f"starting {settings.base.id} ...", err=True)
    serve_forever(settings, on_ready=_announce)


def _announce(address: str, metrics_urls: Sequence[str]) -> None:
    typer.echo(f"Lorafleet is ready at {address} (API docs at {address}/docs, Ctrl-C stops it). Try:")
    typer.echo(
        f"  curl -s {address}/generate -H 'content-type: application/json' -H 'accept: image/png' "
        f"-d {shlex.quote(json.dumps(EXAMPLE))} -o apple.png"
    )
    typer.echo(f"Metrics for Prometheus: {' '.join(metrics_urls)}")
