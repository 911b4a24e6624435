"""schemathesis makes requests from the OpenAPI document, right and wrong ones, and checks every answer against it."""

from collections.abc import AsyncGenerator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from lorafleet.serve.api import create_app
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Event
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import GenerationResult, ModelInfo
from lorafleet.serve.work import Work


class SketchBackend:
    """The real pipeline, made quick: one step at the smallest size, whatever is asked."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    async def model(self) -> ModelInfo:
        return self._pipeline.model

    async def generate(self, work: Work, timeout_s: float) -> GenerationResult:
        return await self._pipeline.generate_async(self._sketch(work))

    def stream(self, work: Work, timeout_s: float) -> AsyncGenerator[Event]:
        return self._pipeline.stream(self._sketch(work))

    @staticmethod
    def _sketch(work: Work) -> Work:
        return Work(work.request.model_copy(update={"steps": 1, "width": 64, "height": 64}), previews=work.previews)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_as_documented(running_pipeline: Pipeline, mode: schemathesis.GenerationMode) -> None:
    app = create_app(ServeSettings(), SketchBackend(running_pipeline))
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    for found in document.get_all_operations():
        operation = found.ok()
        if mode.is_negative and not operation.body:
            continue  # any path is a model id, found or not
        cases = operation.as_strategy(generation_mode=mode)

        @given(case=cases)
        @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers_as_documented(case: schemathesis.Case) -> None:
            case.call_and_validate()

        answers_as_documented()
