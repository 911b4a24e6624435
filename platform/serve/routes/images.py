"""OpenAI's images: generations and edits, at once or as events."""

import asyncio
import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from lorafleet.core.errors import InvalidRequest
from lorafleet.serve import sse
from lorafleet.serve.body import Files, read_body, read_form
from lorafleet.serve.events import Event, Image, Step
from lorafleet.serve.openapi import MAY_FAIL, errors, form_body, json_body
from lorafleet.serve.pictures import Upload, enlarge
from lorafleet.serve.routes.generate import headers_of
from lorafleet.serve.routes.streaming import Translate, respond
from lorafleet.serve.schemas import EDIT_STRENGTH, EditsBody, ImageData, ImagesBody, ImagesFields, ImagesReply
from lorafleet.serve.service import Service
from lorafleet.serve.terms import Terms, terms_of
from lorafleet.serve.work import Work

EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {sse.MEDIA_TYPE: {}}}}
FILES = ("image", "image[]", "mask")
# What requests call it here, for errors that know it by our own name.
NAMES = {"width": "size", "height": "size", "steps": "num_inference_steps"}


def add(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes

    @app.post(
        "/v1/images/generations",
        tags=["openai"],
        response_model=ImagesReply,
        responses={**EVENTS, **errors(*MAY_FAIL)},
        openapi_extra=json_body(ImagesBody),
    )
    async def images_generations(http: Request) -> Response:
        """OpenAI's image generation. With `stream` the events `image_generation.partial_image` and `.completed`."""
        body = await read_body(http, ImagesBody, limit)
        return await _answer(service, terms_of(http), body, None, "image_generation")

    @app.post(
        "/v1/images/edits",
        tags=["openai"],
        response_model=ImagesReply,
        responses={**EVENTS, **errors(*MAY_FAIL)},
        openapi_extra=form_body(EditsBody),
    )
    async def images_edits(http: Request) -> Response:
        """OpenAI's image edit. What is transparent in `mask`, or without one in `image`, is drawn anew; where there is
        neither, all of it is, as far as `strength` goes."""
        body, files = await read_form(http, EditsBody, FILES, limit)
        return await _answer(service, terms_of(http), body, _upload(body, files), "image_edit")


async def _answer(service: Service, terms: Terms, body: ImagesFields, upload: Upload | None, kind: str) -> Response:
    previews = body.partial_images or 0 if body.stream else 0
    with _renamed():
        _, work = await service.accept(body.request(), model_id=body.model, upload=upload, previews=previews)
    if body.stream:
        run = await service.start(work, terms, is_detailed=True)
        return await respond(run, _translation(body, work, kind), service.error_body)
    result = await service.generate(work, terms)
    reply = ImagesReply(
        created=int(time.time()),
        data=[ImageData(b64_json=base64.b64encode(png).decode()) for png in result.images],
        size=_size(work),
    )
    return Response(reply.model_dump_json(), media_type="application/json", headers=headers_of(result))


def _upload(body: EditsBody, files: Files) -> Upload:
    images, masks = files["image"] + files["image[]"], files["mask"]
    if len(images) != 1 or len(masks) > 1:
        name, count = ("image", len(images)) if len(images) != 1 else ("mask", len(masks))
        raise InvalidRequest(f"{name} must be one picture, got {count}", param=name)
    by_default = 1.0 if masks else EDIT_STRENGTH
    return Upload(
        images[0],
        masks[0] if masks else None,
        by_default if body.strength is None else body.strength,
        is_mask_alpha=True,
        image_name="image",
    )


def _translation(body: ImagesFields, work: Work, kind: str) -> Translate:
    """OpenAI's events, every field of its types ImageGen- and ImageEdit-PartialImageEvent and -CompletedEvent."""
    sent = 0
    width, height = work.request.width, work.request.height
    assert width is not None
    assert height is not None
    same = {
        "background": "opaque",
        "output_format": "png",
        "quality": body.quality if body.quality not in (None, "standard", "hd") else "auto",
        "size": _size(work),
    }
    no_tokens: dict[str, Any] = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    usage = {**no_tokens, "input_tokens_details": {"image_tokens": 0, "text_tokens": 0}}

    async def translate(event: Event) -> list[bytes]:
        nonlocal sent
        more: dict[str, Any]
        match event:
            case Step(preview=bytes(preview)):
                png = await asyncio.to_thread(enlarge, preview, (width, height))
                name, more = f"{kind}.partial_image", {"partial_image_index": sent}
                sent += 1
            case Image(png=png):
                name, more = f"{kind}.completed", {"usage": usage}
            case _:
                return []
        picture = {"b64_json": base64.b64encode(png).decode(), "created_at": int(time.time())}
        return [sse.encode(name, {"type": name, **picture, **same, **more})]

    return translate


@contextmanager
def _renamed() -> Iterator[None]:
    """Errors that name our fields name OpenAI's."""
    try:
        yield
    except InvalidRequest as error:
        name = NAMES.get(error.param or "")
        if name is None:
            raise
        message = f"size: {error.message}" if name == "size" else error.message.replace(str(error.param), name, 1)
        raise InvalidRequest(message, param=name) from error


def _size(work: Work) -> str:
    return f"{work.request.width}x{work.request.height}"
