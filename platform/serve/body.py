"""Reads a request's body, JSON or a form: bounded while it streams in, strictly parsed, every fault named."""

import asyncio
import difflib
import re
from collections.abc import AsyncGenerator, Callable, Collection
from typing import Any, BinaryIO, Final, TypeVar

import pydantic_core
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from lorafleet.core.errors import InvalidRequest, LorafleetError
from lorafleet.core.ranges import accepts, allowed, short

M = TypeVar("M", bound=BaseModel)
N = TypeVar("N", bound=BaseModel)
Files = dict[str, list[bytes]]
JSON_TYPE: Final = "application/json"
FORM_TYPE: Final = "multipart/form-data"
LARGE_BYTES: Final = 1 << 18  # 1 ms to parse; more is parsed off the event loop
MAX_FILES, MAX_FIELDS = 20, 100
ITEM: Final = re.compile(r"(\w+)\[\]\[(\w+)\]")


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
    return parse_fields(await _read_json(request, max_bytes), model)


async def read_either(
    request: Request, first: type[M], second: type[N], is_second: Callable[[dict[str, Any]], bool], max_bytes: int
) -> M | N:
    """As `read_body`, by one of two models."""
    content = await _read_json(request, max_bytes)
    return parse_fields(content, second) if is_second(content) else parse_fields(content, first)


def parse_body(raw: bytes, model: type[M]) -> M:
    """JSON text as `model`. Raises MalformedBody or InvalidBody."""
    return parse_fields(_parse_json(raw), model)


async def _read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    media_type = request.headers.get("content-type", "")
    if media_type.partition(";")[0].strip().lower() != JSON_TYPE:
        raise UnsupportedMediaType(f"content-type must be {JSON_TYPE}, got {short(media_type)}")
    raw = b"".join([chunk async for chunk in _chunks(request, max_bytes)])
    return _parse_json(raw) if len(raw) <= LARGE_BYTES else await asyncio.to_thread(_parse_json, raw)


def _parse_json(raw: bytes) -> dict[str, Any]:
    """NaN and Infinity, which JSON does not have, are malformed; so is nesting 200 deep."""
    try:
        content = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise MalformedBody(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise MalformedBody(f"the body must be a JSON object, got {short(content)}")
    return content


def parse_fields(content: dict[str, Any], model: type[M]) -> M:
    """Raises InvalidBody."""
    try:
        return model.model_validate(_whole_numbers(content))
    except ValidationError as error:
        # include_input: unparsed input may be huge; `short` cuts what is shown of it.
        faults = [_fault(problem, model) for problem in error.errors(include_url=False)]
        raise InvalidBody(faults[0][0], param=faults[0][1], faults=faults) from None


async def read_form(request: Request, model: type[M], files: Collection[str], max_bytes: int) -> tuple[M, Files]:
    """A multipart form as `model`, and the files in it under each of the names in `files`.

    Raises UnsupportedMediaType, BodyTooLarge, MalformedBody or InvalidBody.
    """
    form = await _parse_form(request, max_bytes)
    try:
        body, uploads = _parse_items(form, model, files)
        return body, {name: [await upload.read() for upload in found] for name, found in uploads.items()}
    finally:
        await form.close()


async def read_upload(request: Request, model: type[M], file: str, max_bytes: int) -> tuple[M, BinaryIO]:
    """As `read_form`, of a form with one file, which may be large and is not read into memory; the caller closes it."""
    form = await _parse_form(request, max_bytes)
    try:
        body, uploads = _parse_items(form, model, [file])
        if len(uploads[file]) != 1:
            raise InvalidRequest(f"{file} must be one file, got {len(uploads[file])}", param=file)
    except BaseException:
        await form.close()
        raise
    return body, uploads[file][0].file


async def _parse_form(request: Request, max_bytes: int) -> FormData:
    media_type = request.headers.get("content-type", "")
    if media_type.partition(";")[0].strip().lower() != FORM_TYPE:
        raise UnsupportedMediaType(f"content-type must be {FORM_TYPE}, got {short(media_type)}")
    parser = MultiPartParser(
        request.headers,
        _chunks(request, max_bytes),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=max_bytes,
    )
    try:
        return await parser.parse()
    except (MultiPartException, ValueError, LookupError) as error:
        raise MalformedBody(f"the body is not a valid multipart form: {error}") from None


def _parse_items(form: FormData, model: type[M], files: Collection[str]) -> tuple[M, dict[str, list[UploadFile]]]:
    """A form's text as `model`, and its files by their names."""
    fields: dict[str, Any] = {}
    lists: dict[str, list[object]] = {}
    columns: dict[str, dict[str, list[object]]] = {}
    found: dict[str, list[UploadFile]] = {name: [] for name in files}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name not in found:
                raise InvalidRequest(f"unknown file {short(name)}: known are {', '.join(files)}", param=name)
            found[name].append(value)
        elif name in found:
            raise InvalidRequest(f"{name} must be a file, got text", param=name)
        elif name in fields:
            raise InvalidRequest(f"{name} is there more than once", param=name)
        elif (item := ITEM.fullmatch(name)) and "array" in accepts(model, (item[1],)):
            typed = _typed(value, model, item[1], 0, item[2])
            columns.setdefault(item[1], {}).setdefault(item[2], []).append(typed)
        elif "array" in accepts(model, (name,)):
            lists.setdefault(name, []).append(_parsed(value))
        else:
            fields[name] = _typed(value, model, name)
    for name, parts in lists.items():
        is_whole = len(parts) == 1 and not isinstance(parts[0], dict)
        fields[name] = parts[0] if is_whole else parts
    for name, by_key in columns.items():
        if name in fields:
            raise InvalidRequest(f"{name} is there more than once", param=name)
        fields[name] = _items(name, by_key)
    return parse_fields(fields, model), found


def _typed(text: str, model: type[BaseModel], *path: str | int) -> object:
    """A form's fields are text; a number, true or false where the model wants one."""
    if accepts(model, path) & {"integer", "number", "boolean"}:
        value = _parsed(text.strip().lower())
        return value if isinstance(value, bool | int | float) else text
    return text


def _parsed(text: str) -> object:
    """JSON where it is JSON, else the text."""
    try:
        value: object = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError:
        return text
    return value


def _items(name: str, columns: dict[str, list[object]]) -> list[dict[str, object]]:
    """The list that the fields `name[][key]` tell. openai's client sends all values of one key together, so which of
    them belong together is known only where every item has every key."""
    if len({len(values) for values in columns.values()}) > 1:
        raise InvalidRequest(f"{name} must give each of its items {' and '.join(columns)}, or none of them", param=name)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _whole_numbers(content: dict[str, Any]) -> dict[str, Any]:
    """JSON has one kind of number, and JSON Schema calls 20.0 an integer: so do we, as the API's document says."""
    whole: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, float) and value.is_integer():
            whole[name] = int(value)
        else:
            whole[name] = _whole_numbers(value) if isinstance(value, dict) else value
    return whole


async def _chunks(request: Request, max_bytes: int) -> AsyncGenerator[bytes]:
    announced = request.headers.get("content-length", "")
    too_large = BodyTooLarge(f"the body must be at most {max_bytes} bytes")
    if announced.isdecimal() and int(announced[:20]) > max_bytes:
        raise too_large
    read = 0
    async for chunk in request.stream():
        read += len(chunk)
        if read > max_bytes:
            raise too_large
        yield chunk


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
