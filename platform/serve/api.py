"""The HTTP API as a FastAPI app over any backend. Every error of every route gets its status and shape here."""

import asyncio
import base64
import logging
import math
import time
from importlib import metadata
from typing import Final, Protocol

from fastapi import FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from lorafleet.core.errors import (
    AdapterBusy,
    AdapterIncompatible,
    AdapterUnreadable,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    LorafleetError,
    NotReady,
    Overloaded,
    RecipeMismatch,
)
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import BaseRef
from lorafleet.serve.admission import Admission
from lorafleet.serve.body import BodyTooLarge, InvalidBody, MalformedBody, UnsupportedMediaType, read_body
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.edge import REQUEST_ID_HEADER, Edge
from lorafleet.serve.openapi import describe, errors, json_body
from lorafleet.serve.result import GenerationResult, ModelInfo
from lorafleet.serve.schemas import (
    ErrorDetail,
    ErrorInfo,
    ErrorReply,
    GenerateBody,
    GenerateReply,
    ImageData,
    ImagesBody,
    ImagesReply,
    ModelCard,
    ModelList,
    Status,
)

logger = logging.getLogger(__name__)

SEED_HEADER: Final = "x-lorafleet-seed"
RETRY_HEADER: Final = "x-should-retry"  # openai's clients obey it; others retry a 504 on their own account
DEADLINE_GRACE_S: Final = 5.0  # a replica notices a passed deadline itself, within one step; then the gateway does


class ModelNotFound(LorafleetError):
    """No model under that id is served."""

    code = "model_not_found"


STATUSES: Final[dict[type[LorafleetError], int]] = {
    MalformedBody: 400,
    ModelNotFound: 404,
    RecipeMismatch: 409,
    AdapterIncompatible: 409,
    BodyTooLarge: 413,
    UnsupportedMediaType: 415,
    InvalidRequest: 422,
    AdapterUnreadable: 422,
    Overloaded: 429,
    GenerationFailed: 500,
    NotReady: 503,
    AdapterBusy: 503,
    DeadlineExceeded: 504,
}
TYPES: Final = {
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}
HTTP_CODES: Final = {404: "route_not_found", 405: "method_not_allowed"}


class Backend(Protocol):
    """What makes the images."""

    async def model(self) -> ModelInfo:
        """The base that is loaded. Raises NotReady."""

    async def generate(self, request: GenerationRequest, timeout_s: float) -> GenerationResult:
        """Raises LorafleetError; DeadlineExceeded soon after `timeout_s`."""


class Service:
    """Admission, limits and deadlines around a backend."""

    def __init__(self, settings: ServeSettings, backend: Backend) -> None:
        self.settings = settings
        self.known_model: ModelInfo | None = None
        self._backend = backend
        self._admission = Admission(servers=settings.replicas, max_queued=settings.max_queued)

    async def model(self) -> ModelInfo:
        """Asks the backend, so that the answer also says whether one is there. Raises NotReady."""
        self.known_model = await self._backend.model()
        return self.known_model

    async def generate(
        self, request: GenerationRequest, *, base: BaseRef | None = None, model_id: str | None = None
    ) -> tuple[ModelInfo, GenerationResult]:
        model = self.known_model or await self.model()
        if model_id is not None and model_id != model.ref.id:
            raise ModelNotFound(f"no model {model_id!r}: known are {model.ref.id}", param="model")
        if base is not None and base.fingerprint != model.ref.fingerprint:
            raise RecipeMismatch(
                f"base.fingerprint asks for {base.id} {base.fingerprint[:12]}, but {model.ref.id} "
                f"{model.ref.fingerprint[:12]} is loaded: start the service with that base, or leave base out",
                param="base.fingerprint",
            )
        model.limits.check(request)
        timeout_s = self.settings.request_timeout_s
        with self._admission.admit():
            try:
                async with asyncio.timeout(timeout_s + DEADLINE_GRACE_S):
                    result = await self._backend.generate(request, timeout_s)
            except TimeoutError:
                raise DeadlineExceeded(f"the images were not done in {timeout_s:g} seconds") from None
            self._admission.record(result.timings["total_s"] - result.timings.get("queue_s", 0.0))
        return model, result


def create_app(settings: ServeSettings, backend: Backend, *, adds_request_id: bool = True) -> FastAPI:
    """All routes. `adds_request_id` is off behind a proxy that puts `x-request-id` on every response itself."""
    service = Service(settings, backend)
    app = FastAPI(
        title="Lorafleet",
        version=metadata.version("lorafleet"),
        description="Text to image. Every error of every route has one shape.",
        redirect_slashes=False,
        openapi_url=None,
    )
    _add_health(app, service)
    _add_models(app, service)
    _add_generation(app, service)
    _add_documents(app, service)
    for kind in (LorafleetError, HTTPException):
        app.add_exception_handler(kind, lambda _, error: error_response(error))
    app.add_middleware(Edge, on_error=error_response, adds_header=adds_request_id)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=[REQUEST_ID_HEADER, SEED_HEADER, RETRY_HEADER, "retry-after"],
        )
    return app


def error_response(error: Exception) -> Response:
    """The one place where an error becomes a status and a body. What is not ours is logged and hidden."""
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
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
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
    body = ErrorReply(error=info).model_dump(exclude={"error": {"errors"}} if info.errors is None else None)
    return JSONResponse(body, status_code=status, headers=headers)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", tags=["health"])
    @app.get("/v2/health/live", tags=["health"])
    async def live() -> Status:
        """This process answers."""
        return Status(status="ok")

    @app.get("/readyz", tags=["health"], responses=errors(503))
    @app.get("/v2/health/ready", tags=["health"], responses=errors(503))
    async def ready() -> Status:
        """A replica has its model loaded and takes requests."""
        await service.model()
        return Status(status="ready")


def _add_documents(app: FastAPI, service: Service) -> None:
    """FastAPI's own would not know the base, and its page takes Swagger's scripts from other hosts."""
    app.mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        try:
            limits = (await service.model()).limits
        except NotReady:
            limits = None
        return JSONResponse(describe(app, limits))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url="/docs/static/swagger-ui-bundle.js",
            swagger_css_url="/docs/static/swagger-ui.css",
            swagger_favicon_url="/docs/static/favicon.png",
        )


def _add_models(app: FastAPI, service: Service) -> None:
    def card(model: ModelInfo) -> ModelCard:
        return ModelCard(id=model.ref.id, created=model.created_unix_s)

    @app.get("/v1/models", tags=["openai"], responses=errors(503))
    async def list_models() -> ModelList:
        """The base model."""
        return ModelList(data=[card(await service.model())])

    @app.get("/v1/models/{model_id:path}", tags=["openai"], responses=errors(404, 422, 503))
    async def show_model(model_id: str) -> ModelCard:
        """One model; ids may hold a slash."""
        model = await service.model()
        if model_id != model.ref.id:
            raise ModelNotFound(f"no model {model_id!r}: known are {model.ref.id}", param="model")
        return card(model)


def _add_generation(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes
    may_fail = (400, 413, 415, 422, 429, 500, 503, 504)

    @app.post(
        "/generate",
        tags=["generate"],
        response_model=GenerateReply,
        responses={200: {"content": {"image/png": {}}}, **errors(409, *may_fail)},
        openapi_extra=json_body(GenerateBody),
    )
    async def generate(http: Request) -> Response:
        """Images of one prompt. With `Accept: image/png` the one image's bytes, its seed in a header."""
        body = await read_body(http, GenerateBody, limit)
        as_png = prefers_png(http.headers.get("accept", ""))
        if as_png and body.num_images != 1:
            raise InvalidRequest(
                f"num_images must be 1 with Accept: image/png, got {body.num_images}", param="num_images"
            )
        model, result = await service.generate(body.request(), base=body.base)
        if as_png:
            return Response(result.images[0], media_type="image/png", headers={SEED_HEADER: str(result.seeds[0])})
        reply = GenerateReply(
            id=http.state.request_id,
            model=model.ref.id,
            images=[base64.b64encode(png).decode() for png in result.images],
            seeds=result.seeds,
            timings=result.timings,
            warnings=result.warnings,
        )
        return JSONResponse(reply.model_dump())

    @app.post(
        "/v1/images/generations",
        tags=["openai"],
        response_model=ImagesReply,
        responses=errors(404, *may_fail),
        openapi_extra=json_body(ImagesBody),
    )
    async def images_generations(http: Request) -> Response:
        """OpenAI's image generation, without streaming."""
        body = await read_body(http, ImagesBody, limit)
        request = body.request()
        try:
            model, result = await service.generate(request, model_id=body.model)
        except InvalidRequest as error:
            if error.param in ("width", "height"):  # what this route calls size
                raise InvalidRequest(f"size: {error.message}", param="size") from error
            raise
        width, height = model.limits.size_of(request)
        reply = ImagesReply(
            created=int(time.time()),
            data=[ImageData(b64_json=base64.b64encode(png).decode()) for png in result.images],
            size=f"{width}x{height}",
        )
        return JSONResponse(reply.model_dump())


def prefers_png(accept: str) -> bool:
    """Whether an Accept header puts image/png before JSON; a wildcard is no wish for either."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        media_type, *options = (piece.strip().lower() for piece in part.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weights[media_type] = float(quality)
        except ValueError:
            weights[media_type] = 0.0
    return weights.get("image/png", 0.0) > weights.get("application/json", 0.0)
