"""The simple route: JSON in; JSON, or the one image's bytes, out."""

import base64
from typing import Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lorafleet.core.errors import InvalidRequest
from lorafleet.serve.body import read_body
from lorafleet.serve.openapi import MAY_FAIL, errors, json_body
from lorafleet.serve.schemas import GenerateBody, GenerateReply
from lorafleet.serve.service import Service

SEED_HEADER: Final = "x-lorafleet-seed"


def add(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes

    @app.post(
        "/generate",
        tags=["generate"],
        response_model=GenerateReply,
        responses={200: {"content": {"image/png": {}}}, **errors(409, *MAY_FAIL)},
        openapi_extra=json_body(GenerateBody),
    )
    async def generate(http: Request) -> Response:
        """Images of one prompt. With `Accept: image/png` the one image's bytes, its seed in a header."""
        body = await read_body(http, GenerateBody, limit)
        as_png = prefers_png(http.headers.get("accept", ""))
        if as_png and body.num_images != 1:
            raise InvalidRequest(
                f"num_images must be 1 with Accept: image/png, got {body.num_images}", param="num_images"
            )
        model, result = await service.generate(body.request(), base=body.base)
        if as_png:
            return Response(result.images[0], media_type="image/png", headers={SEED_HEADER: str(result.seeds[0])})
        reply = GenerateReply(
            id=http.state.request_id,
            model=model.ref.id,
            images=[base64.b64encode(png).decode() for png in result.images],
            seeds=result.seeds,
            timings=result.timings,
            warnings=result.warnings,
        )
        return JSONResponse(reply.model_dump())


def prefers_png(accept: str) -> bool:
    """Whether an Accept header puts image/png before JSON; a wildcard is no wish for either."""
    weights: dict[str, float] = {}
    for part in accept.split(","):
        media_type, *options = (piece.strip().lower() for piece in part.split(";"))
        quality = next((option[2:] for option in options if option.startswith("q=")), "1")
        try:
            weights[media_type] = float(quality)
        except ValueError:
            weights[media_type] = 0.0
    return weights.get("image/png", 0.0) > weights.get("application/json", 0.0)
