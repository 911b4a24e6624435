"""Spans of requests for OpenTelemetry, if there is an OTLP endpoint to send them to. Without one, which is the default,
no library is imported and each of these functions returns at once.

A request's span begins at the gateway, as a child of what its `traceparent` names (W3C Trace Context). The replica's is
a child of it, as the caller's `trace_id` and `span_id` come with the work (logs.py); so log lines name the trace too.
Measurements do not: Ray 2.60 has no exemplars.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final, Protocol

from lorafleet.core.config import otlp_endpoint
from lorafleet.core.errors import ConfigError
from lorafleet.serve import logs
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.work import Work

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

TRACES_PATH: Final = "/v1/traces"
STAGES: Final = ("queue", "encode", "denoise", "decode")
ABOUT: Final = ("request_id", "job_id", "adapters")
"""What spans say of the caller."""
_tracer: "Tracer | None" = None


Tell = Callable[[str, int, str], None]


class Handle(Protocol):
    """An image that is being made: the engine's `Handle`."""

    @property
    def future(self) -> Any: ...


def endpoint(settings: ServeSettings) -> str | None:
    """Where spans go: the setting, else OpenTelemetry's variable. Raises ConfigError without the libraries for it."""
    address = settings.tracing.otlp_endpoint or otlp_endpoint()
    if address is not None:
        try:
            import opentelemetry.exporter.otlp.proto.http.trace_exporter  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"traces are to go to {address}, which needs more libraries: pip install 'lorafleet[otel]', or leave "
                "tracing.otlp_endpoint and OTEL_EXPORTER_OTLP_ENDPOINT out",
                param="tracing.otlp_endpoint",
            ) from None
    return address


def start(settings: ServeSettings, service: str) -> None:
    """For this process, which is `service`. OpenTelemetry's other variables (sampler, headers, resource) count too."""
    global _tracer
    address = endpoint(settings)
    if address is None or _tracer is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    version = metadata.version("lorafleet")
    resource = Resource.create({"service.name": f"lorafleet-{service}", "service.version": version})
    provider = TracerProvider(resource=resource)
    exporter = OTLPSpanExporter(endpoint=address.rstrip("/") + TRACES_PATH)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer("lorafleet", version)


@contextmanager
def server_span(method: str, headers: Sequence[tuple[bytes, bytes]]) -> Iterator[Tell]:
    """Around an HTTP request. To be called with its route, status and outcome before it ends."""
    if _tracer is None:
        yield lambda route, status, outcome: None
        return
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers if name.startswith(b"trace")}
    parent = TraceContextTextMapPropagator().extract(carrier)
    span = _tracer.start_span(method, parent, SpanKind.SERVER, {"http.request.method": method})
    _note(span)

    def tell(route: str, status: int, outcome: str) -> None:
        span.update_name(f"{method} {route}")
        known = logs.caller()
        attributes: dict[str, Any] = {
            "http.route": route,
            "http.response.status_code": status,
            "lorafleet.outcome": outcome,
        }
        span.set_attributes(attributes | {f"lorafleet.{name}": known[name] for name in ABOUT if name in known})
        if status >= 500:
            span.set_status(Status(StatusCode.ERROR, outcome))

    try:
        yield tell
    finally:
        span.end()


@contextmanager
def span(name: str, **attributes: Any) -> Iterator[None]:
    """A part of what the task that runs now does for its caller, whose span is the parent."""
    if _tracer is None or (parent := _parent()) is None:
        yield
        return
    known = logs.caller()
    attributes |= {f"lorafleet.{about}": known[about] for about in ABOUT if about in known}
    part = _tracer.start_span(name, parent, attributes=attributes)
    _note(part)
    try:
        yield
    except BaseException as error:
        _fail(part, error)
        raise
    finally:
        part.end()


def follow(handles: Sequence[Handle], work: Work) -> None:
    """A span for each image with its stages, once it is done: it costs the engine nothing but that."""
    if _tracer is None or (parent := _parent()) is None:
        return
    request = work.request
    attributes = {
        "lorafleet.steps": request.steps,
        "lorafleet.scheduler": request.scheduler,
        "lorafleet.size": f"{request.width}x{request.height}",
        **{f"lorafleet.{name}": value for name, value in logs.caller().items() if name in ABOUT},
    }
    begun_ns = time.time_ns()
    for number, handle in enumerate(handles):

        def tell(future: Any, number: int = number) -> None:
            _tell_image(parent, begun_ns, future, {**attributes, "lorafleet.image": number})

        handle.future.add_done_callback(tell)


def _tell_image(parent: Any, begun_ns: int, future: Any, attributes: Mapping[str, Any]) -> None:
    from opentelemetry.trace import set_span_in_context

    assert _tracer is not None
    image = _tracer.start_span("image", parent, attributes=dict(attributes), start_time=begun_ns)
    now_ns = time.time_ns()
    if (error := future.exception()) is not None:
        _fail(image, error)
    else:
        timings = future.result().timings
        at_ns = now_ns - _ns(timings["total_s"])
        for stage in STAGES:
            end_ns = at_ns + _ns(timings[f"{stage}_s"])
            _tracer.start_span(stage, set_span_in_context(image), start_time=at_ns).end(end_ns)
            at_ns = end_ns
    image.end(now_ns)


def _parent() -> Any:
    """The caller's span, from its numbers; None if it has none that is kept."""
    known = logs.caller()
    if "span_id" not in known:
        return None
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    numbers = int(known["trace_id"], 16), int(known["span_id"], 16)
    parent = SpanContext(*numbers, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(parent))


def _note(span: "Span") -> None:
    """Puts it into the caller's context; one that is not kept stays unnamed."""
    from opentelemetry.trace import format_span_id, format_trace_id

    if span.is_recording():
        context = span.get_span_context()
        logs.note(trace_id=format_trace_id(context.trace_id), span_id=format_span_id(context.span_id))


def _fail(span: "Span", error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", getattr(error, "code", type(error).__name__))
    span.set_status(Status(StatusCode.ERROR, str(error)))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
