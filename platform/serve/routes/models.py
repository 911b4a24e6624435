"""OpenAI's list of models."""

from fastapi import FastAPI

from lorafleet.core.errors import ModelNotFound
from lorafleet.serve.openapi import errors
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.schemas import ModelCard, ModelList
from lorafleet.serve.service import Service


def add(app: FastAPI, service: Service) -> None:
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
