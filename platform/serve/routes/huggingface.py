"""Hugging Face's inference API: text-to-image and image-to-image."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import GenerationRequest
from lorafleet.serve.body import InvalidBody, read_either
from lorafleet.serve.openapi import MAY_FAIL, errors, json_body
from lorafleet.serve.pictures import Upload, from_base64
from lorafleet.serve.routes.generate import PNG, headers_of
from lorafleet.serve.schemas import STRENGTH, ImageToImageBody, TextToImageBody, TextToImageParameters
from lorafleet.serve.service import Service
from lorafleet.serve.terms import terms_of

SAME = {"negative_prompt", "guidance_scale", "scheduler", "seed", "width", "height"}


def add(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes

    @app.post(
        "/models/{name:path}",
        tags=["huggingface"],
        response_class=Response,
        responses={200: {"content": {PNG: {}}}, **errors(*MAY_FAIL)},
        openapi_extra=json_body(TextToImageBody, ImageToImageBody),
    )
    async def models(http: Request, name: str) -> Response:
        """Hugging Face's text-to-image and, with `parameters.prompt`, image-to-image; the image's bytes."""
        body = await read_either(http, TextToImageBody, ImageToImageBody, _is_image_to_image, limit)
        request, upload = _text_to_image(body) if isinstance(body, TextToImageBody) else _image_to_image(body)
        try:
            _, work = await service.accept(request, model_id=name, upload=upload)
        except InvalidRequest as error:
            if isinstance(error, InvalidBody) or error.param in (None, "inputs"):
                raise
            param = "num_inference_steps" if error.param == "steps" else error.param
            raise InvalidRequest(f"parameters: {error.message}", param=f"parameters.{param}") from error
        result = await service.generate(work, terms_of(http))
        return Response(result.images[0], media_type=PNG, headers=headers_of(result))


def _is_image_to_image(content: dict[str, Any]) -> bool:
    parameters = content.get("parameters")
    return isinstance(parameters, dict) and "prompt" in parameters


def _text_to_image(body: TextToImageBody) -> tuple[GenerationRequest, None]:
    return _request(body.inputs, body.parameters or TextToImageParameters()), None


def _image_to_image(body: ImageToImageBody) -> tuple[GenerationRequest, Upload]:
    asked = body.parameters
    request = _request(asked.prompt, asked)
    if asked.target_size is not None:
        request = request.model_copy(update=asked.target_size.model_dump())
    strength = STRENGTH if asked.strength is None else asked.strength
    return request, Upload(from_base64(body.inputs, "inputs"), strength=strength, image_name="inputs")


def _request(prompt: str, asked: TextToImageParameters) -> GenerationRequest:
    given = asked.model_dump(include=SAME, exclude_none=True)
    if asked.num_inference_steps is not None:
        given["steps"] = asked.num_inference_steps
    return GenerationRequest(prompt=prompt, **given)
