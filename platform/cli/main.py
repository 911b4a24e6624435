"""`lorafleet`: the commands put together, and the one place where an error becomes a sentence and an exit code."""

import os
import sys

import typer

from lorafleet.cli.adapters import adapters
from lorafleet.cli.doctor import doctor
from lorafleet.cli.eval import evaluation
from lorafleet.cli.generate import generate
from lorafleet.cli.serve import serve
from lorafleet.cli.train import train
from lorafleet.cli.version import version
from lorafleet.core.errors import ConfigError, InvalidRequest, LorafleetError, TrainingStopped

FAILED = 1
BAD_USAGE = 2
INTERRUPTED = 130

app = typer.Typer(
    name="lorafleet",
    help="Train, serve and use a fleet of LoRA adapters over one SDXL base model.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (serve, generate, doctor, version):
    app.command()(command)
app.add_typer(adapters, name="adapters")
app.add_typer(train, name="train")
app.add_typer(evaluation, name="eval")


def main() -> None:
    """Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 130 stopped by Ctrl-C (but `serve` ends with 0)."""
    try:
        app()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer has seen the KeyboardInterrupt and says nothing
            _stop("stopped.", INTERRUPTED)
        raise
    except (ConfigError, InvalidRequest) as error:
        _stop(error.message, BAD_USAGE)
    except TrainingStopped as error:
        _stop(error.message, INTERRUPTED)
    except LorafleetError as error:
        _stop(error.message, FAILED)
    except OSError as error:  # a full disk, a file that may not be written
        if error.filename is None:  # what is left in stdout's buffer would fail once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _stop(f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED)


def _stop(message: str, code: int) -> None:
    print(f"lorafleet: {message}", file=sys.stderr)
    sys.exit(code)
