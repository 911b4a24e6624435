"""schemathesis makes requests from the OpenAPI document, right and wrong ones, and checks every answer against it."""

import base64
import io
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.transport.serialization import Binary

from lorafleet.serve.api import create_app
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Event
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import GenerationResult, ModelInfo
from lorafleet.serve.work import Work


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    return buffer.getvalue()


def with_pictures(case: schemathesis.Case) -> schemathesis.Case:
    """JSON Schema cannot say what a picture is: wherever one is asked for, there is one."""
    body = case.body
    if isinstance(body, dict):
        is_image_to_image = isinstance(body.get("parameters"), dict) and "prompt" in body["parameters"]
        is_form = case.media_type == "multipart/form-data"
        for name in ("init_image", "mask", "image") + ("inputs",) * is_image_to_image:
            if isinstance(body.get(name), str | bytes):
                body[name] = Binary(picture()) if is_form else base64.b64encode(picture()).decode()
        if is_form:
            body.pop("mask", None)  # it would need transparent areas, and the same picture serves for all
    return case


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
        request = work.request.model_copy(update={"steps": 1, "width": 64, "height": 64})
        return replace(work, request=request, start=None)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_as_documented(running_pipeline: Pipeline, mode: schemathesis.GenerationMode) -> None:
    app = create_app(ServeSettings(), SketchBackend(running_pipeline))
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    for found in document.get_all_operations():
        operation = found.ok()
        is_form = any(body.media_type == "multipart/form-data" for body in operation.body)
        if mode.is_negative and (not operation.body or is_form):
            continue  # any path is a model id, found or not; what is wrong in JSON may be right as text of a form
        cases = operation.as_strategy(generation_mode=mode)
        if mode.is_positive:
            cases = cases.map(with_pictures)

        @given(case=cases)
        @settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers_as_documented(case: schemathesis.Case) -> None:
            case.call_and_validate()

        answers_as_documented()
