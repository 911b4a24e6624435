"""The simple route: JSON in; JSON, or the one image's bytes, out."""

import base64
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import Response

from lorafleet.core.errors import InvalidRequest
from lorafleet.serve import sse
from lorafleet.serve.body import read_body
from lorafleet.serve.openapi import MAY_FAIL, errors, json_body
from lorafleet.serve.result import GenerationResult
from lorafleet.serve.routes.streaming import plainly, respond
from lorafleet.serve.schemas import GenerateBody, GenerateReply
from lorafleet.serve.service import Service
from lorafleet.serve.terms import terms_of

JSON: Final = "application/json"
PNG: Final = "image/png"
CACHE_HEADER: Final = "x-lorafleet-cache"
SEED_HEADER: Final = "x-lorafleet-seed"


def add(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes

    @app.post(
        "/generate",
        tags=["generate"],
        response_model=GenerateReply,
        responses={200: {"content": {PNG: {}, sse.MEDIA_TYPE: {}}}, **errors(*MAY_FAIL)},
        openapi_extra=json_body(GenerateBody),
    )
    async def generate(http: Request) -> Response:
        """Images of one prompt. With `Accept: image/png` the one image's bytes, its seed in a header; with
        `Accept: text/event-stream` the events `queued`, `downloading` (an adapter), `started`, `step`, `image`, and
        `done` or `error`."""
        body = await read_body(http, GenerateBody, limit)
        answer = preferred_type(http.headers.get("accept", ""))
        if answer == PNG and body.num_images != 1:
            raise InvalidRequest(
                f"num_images must be 1 with Accept: image/png, got {body.num_images}", param="num_images"
            )
        model, work = await service.accept(
            body.request(), base=body.base, upload=body.upload(), start=body.start, previews=body.previews
        )
        terms = terms_of(http)
        if answer == sse.MEDIA_TYPE:
            return await respond(await service.start(work, terms, is_detailed=True), plainly, service.error_body)
        result = await service.generate(work, terms)
        if answer == PNG:
            return Response(result.images[0], media_type=PNG, headers=headers_of(result))
        reply = GenerateReply(
            id=http.state.request_id,
            model=model.ref.id,
            images=[base64.b64encode(png).decode() for png in result.images],
            seeds=result.seeds,
            timings=result.timings,
            warnings=result.warnings,
        )
        return Response(reply.model_dump_json(), media_type=JSON, headers=headers_of(result))


def headers_of(result: GenerationResult) -> dict[str, str]:
    """The first seed, and whether the images were made before; timings are then those of that time."""
    return {SEED_HEADER: str(result.seeds[0]), CACHE_HEADER: "hit" if result.is_cached else "miss"}


def preferred_type(accept: str) -> str:
    """What an Accept header puts first: JSON, a PNG or events; a wildcard is no wish for any of them."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        media_type, *options = (piece.strip().lower() for piece in part.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weights[media_type] = float(quality)
        except ValueError:
            weights[media_type] = 0.0
    best = max((JSON, PNG, sse.MEDIA_TYPE), key=lambda kind: weights.get(kind, 0.0))
    return best if weights.get(best, 0.0) > 0 else JSON
