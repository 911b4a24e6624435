"""schemathesis makes requests from the OpenAPI document, right and wrong ones, and checks every answer against it."""

import asyncio
import base64
import io
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image
from schemathesis.specs.openapi.checks import ignored_auth
from schemathesis.transport.serialization import Binary

from lorafleet.core.manifest import Manifest
from lorafleet.core.registry import open_registry
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.api import create_app
from lorafleet.serve.config import ServeSettings
from lorafleet.serve.events import Event
from lorafleet.serve.pipeline import Pipeline
from lorafleet.serve.result import ModelInfo
from lorafleet.serve.work import Work

KEY = "open-sesame-open-sesame"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(buffer, "PNG")
    return buffer.getvalue()


def with_files(case: schemathesis.Case, adapter: bytes) -> schemathesis.Case:
    """JSON Schema cannot say what a picture or an adapter is: wherever one is asked for, there is one."""
    body = case.body
    if isinstance(body, dict):
        if "file" in body:
            body["file"] = Binary(adapter)
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

    def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        return self._pipeline.stream(self._sketch(work), is_detailed=is_detailed)

    async def push(self, name: str, handed_in: str) -> Manifest:
        return await asyncio.to_thread(self._pipeline.push, name, handed_in)

    is_asleep = False

    @staticmethod
    def _sketch(work: Work) -> Work:
        request = work.request.model_copy(update={"steps": 1, "width": 64, "height": 64})
        return replace(work, request=request, start=None)


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_as_documented(emojixl: Base, tmp_path: Path, mode: schemathesis.GenerationMode) -> None:
    settings_ = ServeSettings.model_validate({"admin_key": KEY, "registry": {"url": str(tmp_path / "registry")}})
    pipeline = Pipeline(emojixl, registry=open_registry(settings_.registry)).start()
    write_adapter(random_adapter(targets_of(emojixl), 0, modules=r"unet\.mid.+attn1.+"), tmp_path / "a.safetensors")
    adapter = (tmp_path / "a.safetensors").read_bytes()
    app = create_app(settings_, SketchBackend(pipeline))
    document = schemathesis.openapi.from_asgi("/openapi.json", app)
    for found in document.get_all_operations():
        operation = found.ok()
        is_form = any(body.media_type == "multipart/form-data" for body in operation.body)
        if mode.is_negative and (not operation.body or is_form):
            continue  # any path is a model id, found or not; what is wrong in JSON may be right as text of a form
        cases = operation.as_strategy(generation_mode=mode)
        if mode.is_positive:
            cases = cases.map(lambda case: with_files(case, adapter))

        @given(case=cases)
        @settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def answers_as_documented(case: schemathesis.Case) -> None:
            # ignored_auth sends the key along even where it means not to; test_adapters looks at that.
            case.call_and_validate(headers={"authorization": f"Bearer {KEY}"}, excluded_checks=[ignored_auth])

        answers_as_documented()
    pipeline.close()
