"""Log lines of the serving processes, each with the request that it belongs to.

What is known of whoever is worked for (`request_id`, `job_id`, `adapters`, `trace_id`, `span_id`) lies in structlog's
context variables, which every line gets; it is handed from gateway to replica with the work.
"""

import contextvars
import logging
import sys
from collections.abc import Mapping
from typing import Any

import structlog
from structlog.contextvars import bind_contextvars, clear_contextvars, get_contextvars

from lorafleet.serve.config import LogFormat, LogLevel
from lorafleet.serve.work import Work

VERSION_DIGITS = 12
Caller = Mapping[str, Any]
"""What is known of it; may be sent to another process."""


def log_to_stderr(level: LogLevel, log_format: LogFormat) -> None:
    """From now on lines of lorafleet.* go to this process's stderr, as text or a JSON object each, and nowhere else."""
    renderer: list[Any] = [structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0)]
    if log_format == "json":
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    handler = logging.StreamHandler(sys.__stderr__)  # Ray Serve may have put its own log in sys.stderr's place
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.ExtraAdder(),
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logger = logging.getLogger("lorafleet")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def begin(caller: Caller | None) -> None:
    """The task that runs now works for this one, and for nobody else any more."""
    clear_contextvars()
    bind_contextvars(**caller or {})


def note(**known: Any) -> None:
    """More about whoever the task that runs now works for."""
    bind_contextvars(**known)


def note_adapters(work: Work) -> None:
    if work.adapters:
        names = [(adapter.manifest.name, adapter.manifest.version[:VERSION_DIGITS]) for adapter in work.adapters]
        note(adapters=[f"{name}@{version}" for name, version in names])


def caller() -> dict[str, Any]:
    return get_contextvars()


def detached() -> contextvars.Context:
    """A context that knows the caller and nothing else: within a request's, Ray would call the work off when that
    request ends."""
    context = contextvars.Context()
    context.run(begin, caller())
    return context
