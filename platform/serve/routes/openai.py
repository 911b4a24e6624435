"""OpenAI's models and images, with extras."""

import base64
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lorafleet.core.errors import InvalidRequest
from lorafleet.serve.body import read_body
from lorafleet.serve.openapi import MAY_FAIL, errors, json_body
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.schemas import ImageData, ImagesBody, ImagesReply, ModelCard, ModelList
from lorafleet.serve.service import ModelNotFound, Service


def add(app: FastAPI, service: Service) -> None:
    _add_models(app, service)
    _add_images(app, service)


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


def _add_images(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes

    @app.post(
        "/v1/images/generations",
        tags=["openai"],
        response_model=ImagesReply,
        responses=errors(404, *MAY_FAIL),
        openapi_extra=json_body(ImagesBody),
    )
    async def images_generations(http: Request) -> Response:
        """OpenAI's image generation, without streaming."""
        body = await read_body(http, ImagesBody, limit)
        request = body.request()
        try:
            _, work = await service.accept(request, model_id=body.model)
        except InvalidRequest as error:
            if error.param in ("width", "height"):  # what this route calls size
                raise InvalidRequest(f"size: {error.message}", param="size") from error
            raise
        result = await service.generate(work)
        reply = ImagesReply(
            created=int(time.time()),
            data=[ImageData(b64_json=base64.b64encode(png).decode()) for png in result.images],
            size=f"{work.request.width}x{work.request.height}",
        )
        return JSONResponse(reply.model_dump())
