"""Log lines of the serving processes, and traces that are switched off."""

import contextvars
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import GenerationRequest
from lorafleet.serve import logs, tracing
from lorafleet.serve.config import LogFormat, ServeSettings
from lorafleet.serve.work import Work


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What is logged, in a context of its own; the logger is left as it was."""
    logger, stream = logging.getLogger("lorafleet"), io.StringIO()
    before = logger.handlers, logger.level, logger.propagate
    monkeypatch.setattr(sys, "__stderr__", stream)
    yield stream
    logger.handlers, logger.level, logger.propagate = before
    logs.begin(None)


def say(log_format: LogFormat) -> None:
    logs.log_to_stderr("info", log_format)
    logs.begin({"request_id": "r-1"})
    logs.note(job_id="j-1")
    logger = logging.getLogger("lorafleet.serve.test")
    logger.debug("not told")
    logger.info("%d images", 2, extra={"seconds": 0.5})
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("it failed")


def test_json_lines_hold_the_caller_what_is_extra_and_the_traceback(stderr: io.StringIO) -> None:
    say("json")
    first, second = map(json.loads, stderr.getvalue().splitlines())
    known = {"request_id": "r-1", "job_id": "j-1", "logger": "lorafleet.serve.test"}
    assert first.items() >= {**known, "event": "2 images", "level": "info", "seconds": 0.5}.items()
    assert second.items() >= {**known, "event": "it failed", "level": "error"}.items()
    assert second["exception"].endswith("ValueError: broken")


def test_text_says_the_same(stderr: io.StringIO) -> None:
    say("text")
    first = stderr.getvalue().splitlines()[0]
    for word in ("info", "2 images", "request_id=r-1", "job_id=j-1", "seconds=0.5"):
        assert word in first
    assert "ValueError: broken" in stderr.getvalue()


def test_a_detached_context_knows_the_caller_alone() -> None:
    other = contextvars.ContextVar("other", default="")
    other.set("of the request")
    logs.begin({"request_id": "r-2"})
    detached = logs.detached()
    logs.begin({"request_id": "r-3"})
    assert detached.run(lambda: (logs.caller(), other.get())) == ({"request_id": "r-2"}, "")
    assert logs.caller() == {"request_id": "r-3"}


def test_without_an_endpoint_nothing_is_imported_or_watched() -> None:
    handle = type("Handle", (), {"future": Future()})()
    tracing.start(ServeSettings(), "test")
    tracing.follow([handle], Work(GenerationRequest(prompt="x")))
    assert handle.future._done_callbacks == []
    code = (
        "import sys, lorafleet.serve.tracing; sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_endpoint_needs_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ServeSettings.model_validate({"tracing": {"otlp_endpoint": "http://collector:4318"}})
    assert tracing.endpoint(settings) == "http://collector:4318"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://other:4318")
    assert tracing.endpoint(settings) == "http://collector:4318"
    assert tracing.endpoint(ServeSettings()) == "http://other:4318"
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(
        ConfigError, match=r"http://other:4318, which needs more libraries: pip install 'lorafleet\[otel\]'"
    ):
        tracing.endpoint(ServeSettings())
