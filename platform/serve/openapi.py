"""The OpenAPI document: FastAPI does not see the bodies, which our own strict reader reads, so they are added."""

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from lorafleet.sdxl.limits import MAX_LCM_STEPS, BaseLimits
from lorafleet.serve.arena_schemas import PairBody, VoteBody
from lorafleet.serve.schemas import (
    AdapterBody,
    AliasBody,
    EditsBody,
    ErrorReply,
    GenerateBody,
    ImagesBody,
    ImageToImageBody,
    TextToImageBody,
)

MAY_FAIL: Final = (400, 404, 409, 413, 415, 422, 429, 500, 503, 504)  # any route that makes images
BODIES: Final = (
    GenerateBody,
    ImagesBody,
    EditsBody,
    TextToImageBody,
    ImageToImageBody,
    AdapterBody,
    AliasBody,
    PairBody,
    VoteBody,
)
_REF: Final = "#/components/schemas/{model}"
# What each body calls the steps, of which lcm takes fewer.
_STEPS: Final = {
    "GenerateBody": "steps",
    "ImagesBody": "num_inference_steps",
    "EditsBody": "num_inference_steps",
    "TextToImageParameters": "num_inference_steps",
    "ImageToImageParameters": "num_inference_steps",
}
# Files of each form: what they are, and the one that must be there.
_FILES: Final = {
    "EditsBody": {
        "image": "the picture to edit: PNG, JPEG or WebP, at most 16 megapixels; image[] is taken too",
        "mask": "a picture as large as image; what is transparent in it is drawn anew, the rest kept",
    },
    "AdapterBody": {"file": "a LoRA as safetensors, of diffusers, PEFT or kohya"},
}
_NEEDED_FILES: Final = {"EditsBody": "image", "AdapterBody": "file"}
_ABOUT_INIT_IMAGE: Final = {"mask": "string", "strength": "number", "start": "object"}
_WHEN: Final = {
    400: "the body is not JSON, or no form",
    401: "the admin key is missing or wrong",
    403: "changes are not taken here: no admin key is set",
    404: "no such model, adapter, job, session or pair, or no pair left",
    409: "the recipe asks for another base model or picture, the idempotency key was used for something else, the "
    "adapter is for another base, an alias points at it, or the session has voted on the pair",
    413: "the body is too large",
    415: "the body is not announced as what the route reads",
    422: "a field is unknown, of the wrong type or out of range",
    429: "too much work is waiting; Retry-After says when to come back",
    500: "the model produced no usable image",
    503: "no replica can answer yet",
    504: "the request's time was up; trying again would do the same work twice",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for these statuses, all in the one error shape."""
    return {status: {"model": ErrorReply, "description": _WHEN[status]} for status in statuses}


def json_body(*models: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads one of `models`."""
    schemas = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(model: type[BaseModel]) -> dict[str, Any]:
    """The `openapi_extra` of a route that reads a form of `model`'s fields."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def describe(app: FastAPI, limits: BaseLimits | None) -> dict[str, Any]:
    """The document; with `limits`, sizes are given as the loaded base takes them."""
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    _, bodies = models_json_schema([(model, "validation") for model in BODIES], ref_template=_REF)
    schemas = document["components"]["schemas"]
    schemas.update(bodies["$defs"])
    if limits is not None:
        _narrow_sizes(schemas, limits)
    for name, steps in _STEPS.items():
        is_lcm = {"properties": {"scheduler": {"const": "lcm"}}, "required": ["scheduler"]}
        schemas[name] |= {"if": is_lcm, "then": {"properties": {steps: {"type": "integer", "maximum": MAX_LCM_STEPS}}}}
    for form, files in _FILES.items():
        for name, about in files.items():
            schemas[form]["properties"][name] = {"type": "string", "format": "binary", "description": about}
        schemas[form]["required"].append(_NEEDED_FILES[form])
    for field in schemas["EditsBody"]["properties"].values():
        if "anyOf" in field:  # a form has no null
            field["anyOf"] = [option for option in field["anyOf"] if option.get("type") != "null"]
    schemas["AliasBody"]["oneOf"] = [
        {"properties": {name: {"not": {"type": "null"}}}, "required": [name]} for name in ("version", "versions")
    ]
    schemas["GenerateBody"]["allOf"] = [_needs_init_image(name, kind) for name, kind in _ABOUT_INIT_IMAGE.items()]
    return document


def _needs_init_image(name: str, kind: str) -> dict[str, Any]:
    return {
        "if": {"properties": {name: {"type": kind}}, "required": [name]},
        "then": {"properties": {"init_image": {"type": "string"}}, "required": ["init_image"]},
    }


def _narrow_sizes(schemas: dict[str, Any], limits: BaseLimits) -> None:
    of_a_side = {"minimum": limits.min_side_px, "maximum": limits.max_side_px, "multipleOf": limits.grid_px}
    for model in ("GenerateBody", "TextToImageParameters", "ImageToImageParameters", "TargetSize"):
        for name, default in (("width", limits.default_width_px), ("height", limits.default_height_px)):
            field = schemas[model]["properties"][name]
            options = field.get("anyOf", [field])
            options[0] |= of_a_side
            if len(options) > 1:
                field["description"] = f"pixels; left out: {default}"
    side = "|".join(str(px) for px in range(limits.min_side_px, limits.max_side_px + 1, limits.grid_px))
    for model in ("ImagesBody", "EditsBody"):
        schemas[model]["properties"]["size"]["anyOf"][0]["pattern"] = f"^(auto|({side})x({side}))$"
