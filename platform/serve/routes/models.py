"""OpenAI's list of models: the base, and the adapters that can be used with it."""

from contextlib import suppress

from fastapi import FastAPI

from lorafleet.core.errors import StorageUnavailable
from lorafleet.core.manifest import Manifest
from lorafleet.serve.openapi import errors
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.schemas import ModelCard, ModelList
from lorafleet.serve.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", tags=["openai"], responses=errors(503))
    async def list_models() -> ModelList:
        """The base model and the adapters that fit it; the base alone while the registry is silent, which readiness
        tells."""
        model = await service.model()
        cards = [_base_card(model)]
        if service.settings.engine.bank is not None:
            with suppress(StorageUnavailable):
                manifests = [entry.manifest for entry in await service.fleet.entries()]
                fitting = [each for each in manifests if service.unfit(each, model) is None]
                cards += [_adapter_card(each.name, each, model) for each in fitting]
        return ModelList(data=cards)

    @app.get("/v1/models/{model_id:path}", tags=["openai"], responses=errors(404, 409, 422, 503))
    async def show_model(model_id: str) -> ModelCard:
        """One model: the base, whose id may hold a slash, or NAME, NAME@ALIAS or NAME@VERSION of an adapter."""
        model = await service.model()
        if model_id == model.ref.id:
            return _base_card(model)
        return _adapter_card(model_id, await service.adapter_model(model_id), model)


def _base_card(model: ModelInfo) -> ModelCard:
    return ModelCard(id=model.ref.id, created=model.created_unix_s)


def _adapter_card(model_id: str, manifest: Manifest, model: ModelInfo) -> ModelCard:
    return ModelCard(id=model_id, created=int(manifest.pushed_at.timestamp()), parent=model.ref.id)
