"""Admission, limits and deadlines around whatever makes the images."""

import asyncio
from typing import Final, Protocol

from lorafleet.core.errors import DeadlineExceeded, LorafleetError, RecipeMismatch
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import BaseRef
from lorafleet.serve.admission import Admission
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.result import GenerationResult, ModelInfo

DEADLINE_GRACE_S: Final = 5.0  # a replica notices a passed deadline itself, within one step; then the gateway does


class ModelNotFound(LorafleetError):
    """No model under that id is served."""

    code = "model_not_found"


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
