"""The HTTP API as a FastAPI app over any backend. Every error of every route gets its status and shape here."""

import logging
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any, Final

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from lorafleet.core.errors import (
    AdapterBusy,
    AdapterIncompatible,
    AdapterInUse,
    AdapterNotFound,
    AdapterTooLarge,
    AdapterUnreadable,
    AdminKeyUnset,
    AlreadyVoted,
    DeadlineExceeded,
    GenerationFailed,
    IdempotencyConflict,
    InvalidAdminKey,
    InvalidRequest,
    JobNotFound,
    LorafleetError,
    ModelNotFound,
    NotReady,
    Overloaded,
    PairNotFound,
    RecipeMismatch,
    SessionNotFound,
    StorageUnavailable,
)
from lorafleet.core.metrics import Recorder, Unrecorded
from lorafleet.serve.body import BodyTooLarge, InvalidBody, MalformedBody, UnsupportedMediaType
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.edge import REQUEST_ID_HEADER, Edge, note_failure
from lorafleet.serve.jobs import Jobs
from lorafleet.serve.routes import adapters, arena, documents, generate, health, huggingface, images, models
from lorafleet.serve.routes import jobs as job_routes
from lorafleet.serve.routes.generate import SEED_HEADER
from lorafleet.serve.schemas import ErrorDetail, ErrorInfo, ErrorReply
from lorafleet.serve.service import Backend, Service

logger = logging.getLogger(__name__)

RETRY_HEADER: Final = "x-should-retry"  # openai's clients obey it; others retry a 504 on their own account


STATUSES: Final[dict[type[LorafleetError], int]] = {
    MalformedBody: 400,
    InvalidAdminKey: 401,
    AdminKeyUnset: 403,
    ModelNotFound: 404,
    JobNotFound: 404,
    PairNotFound: 404,
    SessionNotFound: 404,
    IdempotencyConflict: 409,
    AlreadyVoted: 409,
    AdapterNotFound: 404,
    RecipeMismatch: 409,
    AdapterIncompatible: 409,
    AdapterInUse: 409,
    BodyTooLarge: 413,
    AdapterTooLarge: 413,
    UnsupportedMediaType: 415,
    InvalidRequest: 422,
    AdapterUnreadable: 422,
    Overloaded: 429,
    GenerationFailed: 500,
    NotReady: 503,
    AdapterBusy: 503,
    StorageUnavailable: 503,
    DeadlineExceeded: 504,
}
TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
HTTP_CODES: Final = {404: "route_not_found", 405: "method_not_allowed"}


def create_app(
    settings: ServeSettings, backend: Backend, *, adds_request_id: bool = True, recorder: Recorder | None = None
) -> FastAPI:
    """All routes. `adds_request_id` is off behind a proxy that puts `x-request-id` on every response itself."""
    recorder = recorder or Unrecorded()
    service = Service(settings, backend, error_body, recorder)
    jobs = Jobs(service, settings.jobs, settings.most_replicas)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        jobs.look_for_abandoned()
        yield
        await jobs.close()
        await service.close()
        app.state.votes.close()

    app = FastAPI(
        lifespan=lifespan,
        title="Lorafleet",
        version=metadata.version("lorafleet"),
        description="Text to image. Every error of every route has one shape.",
        redirect_slashes=False,
        openapi_url=None,
    )
    app.state.service, app.state.jobs = service, jobs
    for routes in (health, models, generate, images, huggingface, adapters, arena, documents):
        routes.add(app, service)
    job_routes.add(app, service, jobs)
    for kind in (LorafleetError, HTTPException):
        app.add_exception_handler(kind, lambda _, error: error_response(error))
    app.add_middleware(Edge, on_error=error_response, adds_header=adds_request_id, recorder=recorder)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, SEED_HEADER, RETRY_HEADER, "retry-after"],
        )
    return app


def error_response(error: Exception) -> Response:
    """The one place where an error becomes a status and a body. What is not ours is logged and hidden."""
    status, reply, headers = _describe(error)
    body = reply.model_dump(exclude={"error": {"errors"}} if reply.error.errors is None else None)
    return JSONResponse(body, status_code=status, headers=headers)


def error_body(error: Exception) -> dict[str, Any]:
    """The body alone, for where a status cannot be told any more."""
    return _describe(error)[1].model_dump(exclude={"error": {"errors"}})


def _describe(error: Exception) -> tuple[int, ErrorReply, dict[str, str]]:
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        status, code = error.status_code, HTTP_CODES.get(error.status_code, f"http_{error.status_code}")
        message, param = f"{HTTP_CODES.get(status, error.detail).replace('_', ' ')}: see /docs", None
        headers.update(error.headers or {})
    elif isinstance(error, LorafleetError):
        status = next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 500)
        message, param, code = error.message, error.param, error.code
    else:
        logger.error("a request failed for a reason of the service's own", exc_info=error)
        status, message, param, code = 500, "the service failed: its log says why", None, "internal_error"
    note_failure(error, status, code)
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if isinstance(error, InvalidAdminKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, NotReady):
        headers["retry-after"] = "1"
    if isinstance(error, DeadlineExceeded | GenerationFailed):
        headers[RETRY_HEADER] = "false"
    info = ErrorInfo(
        message=message,
        type=TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        param=param,
        code=code,
    )
    if isinstance(error, InvalidBody) and len(error.faults) > 1:
        info.errors = [ErrorDetail(message=message, param=param) for message, param in error.faults]
    return status, ErrorReply(error=info), headers
