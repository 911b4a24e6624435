"""The OpenAPI document: FastAPI does not see the bodies, which our own strict reader reads, so they are added."""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lorafleet.sdxl.limits import MAX_LCM_STEPS, BaseLimits
from lorafleet.serve.schemas import ErrorReply, GenerateBody, ImagesBody

MAY_FAIL: Final = (400, 413, 415, 422, 429, 500, 503, 504)  # any route that makes images
_REF: Final = "#/components/schemas/{model}"
_WHEN: Final = {
    400: "the body is not JSON",
    404: "no such model",
    409: "the recipe asks for another base model than the one that is loaded",
    413: "the body is too large",
    415: "the body is not announced as application/json",
    422: "a field is unknown, of the wrong type or out of range",
    429: "too much work is waiting; Retry-After says when to come back",
    500: "the model produced no usable image",
    503: "no replica can answer yet",
    504: "the request's time was up; trying again would do the same work twice",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these statuses, all in the one error shape."""
    return {status: {"model": ErrorReply, "description": _WHEN[status]} for status in statuses}


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def describe(app: FastAPI, limits: BaseLimits | None) -> dict[str, Any]:
    """The document; with `limits`, sizes are given as the loaded base takes them."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(GenerateBody, "validation"), (ImagesBody, "validation")], ref_template=_REF)
    schemas = document["components"]["schemas"]
    schemas.update(bodies["$defs"])
    if limits is not None:
        _narrow_sizes(schemas, limits)
    for name, steps in (("GenerateBody", "steps"), ("ImagesBody", "num_inference_steps")):
        is_lcm = {"properties": {"scheduler": {"const": "lcm"}}, "required": ["scheduler"]}
        schemas[name] |= {"if": is_lcm, "then": {"properties": {steps: {"maximum": MAX_LCM_STEPS}}}}
    return document


def _narrow_sizes(schemas: dict[str, Any], limits: BaseLimits) -> None:
    for name, default in (("width", limits.default_width_px), ("height", limits.default_height_px)):
        field = schemas["GenerateBody"]["properties"][name]
        field["description"] = f"pixels; left out: {default}"
        field["anyOf"][0] |= {
            "minimum": limits.min_side_px,
            "maximum": limits.max_side_px,
            "multipleOf": limits.grid_px,
        }
    side = "|".join(str(px) for px in range(limits.min_side_px, limits.max_side_px + 1, limits.grid_px))
    size = schemas["ImagesBody"]["properties"]["size"]["anyOf"][0]
    size["pattern"] = f"^(auto|({side})x({side}))$"
