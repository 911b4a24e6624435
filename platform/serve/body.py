"""Reads a request's JSON body: bounded while it streams in, strictly parsed, every fault named."""

import difflib
from typing import Any, Final, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel, ValidationError

from lorafleet.core.errors import InvalidRequest, LorafleetError
from lorafleet.core.ranges import allowed, short

M = TypeVar("M", bound=BaseModel)
JSON_TYPE: Final = "application/json"


class MalformedBody(LorafleetError):
    """The body is not JSON."""

    code = "malformed_json"


class BodyTooLarge(LorafleetError):
    """The body is longer than the service reads."""

    code = "body_too_large"


class UnsupportedMediaType(LorafleetError):
    """The body is announced as something else than JSON."""

    code = "unsupported_media_type"


class InvalidBody(InvalidRequest):
    """Fields at fault, all of them in `faults` as (message, field)."""

    def __init__(self, message: str, *, param: str | None = None, faults: list[tuple[str, str | None]]) -> None:
        super().__init__(message, param=param)
        self.faults = faults


async def read_body(request: Request, model: type[M], max_bytes: int) -> M:
    """The body as `model`. Raises UnsupportedMediaType, BodyTooLarge, MalformedBody or InvalidBody."""
    media_type = request.headers.get("content-type", "")
    if media_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise UnsupportedMediaType(f"content-type must be {JSON_TYPE}, got {short(media_type)}")
    return parse_body(await _read_bytes(request, max_bytes), model)


def parse_body(raw: bytes, model: type[M]) -> M:
    """JSON text as `model`. NaN and Infinity, which JSON does not have, are malformed; so is nesting 200 deep."""
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedBody(f"the body must be a JSON object, got {short(content)}")
    # JSON has one kind of number, and JSON Schema calls 20.0 an integer: so do we, as the API's document says.
    content = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in content.items()
    }
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # include_input: unparsed input may be huge; `short` cuts what is shown of it.
        faults = [_fault(problem, model) for problem in error.errors(include_url=False)]
        raise InvalidBody(faults[0][0], param=faults[0][1], faults=faults) from None


async def _read_bytes(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    too_large = BodyTooLarge(f"the body must be at most {max_bytes} bytes")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _fault(problem: Any, model: type[BaseModel]) -> tuple[str, str | None]:
    """One sentence for one of pydantic's errors, and the field it is about."""
    path = tuple(problem["loc"])
    field = ".".join(str(part) for part in path)
    match problem["type"]:
        case "missing":
            return f"{field} is missing: it must be {allowed(model, path)}", field
        case "extra_forbidden":
            return _unknown_field(path, model), field
        case "value_error":
            return problem["msg"].removeprefix("Value error, "), field
    accepted = allowed(model, path)
    if accepted is None:  # a key or a member of a mapping has no schema of its own
        return f"{field}: {problem['msg']}", field
    return f"{field} must be {accepted}, got {short(problem['input'])}", field


def _unknown_field(path: tuple[Any, ...], model: type[BaseModel]) -> str:
    known = list(model.model_fields) if len(path) == 1 else []
    name = str(path[-1])
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"unknown field {short(name)}: did you mean {near[0]!r}?"
    return f"unknown field {short(name)}" + (f": known are {', '.join(known)}" if known else "")
