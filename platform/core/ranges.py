"""Says in words what a field accepts, read from the model itself, so that no range is written twice."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lorafleet.core.errors import InvalidRequest

_PATTERNS = {r"\S": "not blank"}


Schema = dict[str, Any]


def allowed(model: type[BaseModel], path: Sequence[str | int]) -> str | None:
    """What the field at `path` accepts ("an integer from 1 to 150"); None if there is no such field."""
    options = [option for option in _options(model, path) if option.get("type") != "null"]
    words = [_words(option) for option in options]
    return " or ".join(word for word in words if word) or None


def accepts(model: type[BaseModel], path: Sequence[str | int]) -> set[str]:
    """The JSON types that the field at `path` accepts ("string", "null", ...)."""
    return {option["type"] for option in _options(model, path) if "type" in option}


def names(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """The names of the settings in the group at `path`."""
    return [name for option in _options(model, path) for name in option.get("properties", {})]


def invalid_request(error: ValidationError, model: type[BaseModel]) -> InvalidRequest:
    """The first problem of a failed validation as one sentence that names the field and its range."""
    problem = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return InvalidRequest(f"{field} is missing.", param=field)
    if problem["type"] == "extra_forbidden":
        return InvalidRequest(f"{field} is not a known field.", param=field)
    range_ = None if problem["type"] == "value_error" else allowed(model, problem["loc"])
    if range_ is None or not field:
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        return InvalidRequest(f"{field}: {message}." if field else f"{message}.", param=field or None)
    return InvalidRequest(f"{field} must be {range_}, not {short(problem['input'])}.", param=field)


def short(value: object, limit: int = 60) -> str:
    """`value` for an error message: quoted as Python does, long ones cut."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def _options(model: type[BaseModel], path: Sequence[str | int]) -> list[Schema]:
    """The schemas that a value at `path` may follow: one, or several for a union."""
    root = model.model_json_schema()
    definitions = root.get("$defs", {})
    options = _flat(root, definitions)
    for part in path:
        inner = [_inside(option, part) for option in options]
        options = [option for schema in inner if schema for option in _flat(schema, definitions)]
    return options


def _inside(schema: Schema, part: str | int) -> Schema | None:
    found = schema.get("items") if isinstance(part, int) else schema.get("properties", {}).get(part)
    if found is None:
        found = schema.get("additionalProperties")
    return found if isinstance(found, dict) else None


def _flat(schema: Schema, definitions: Schema) -> list[Schema]:
    if "$ref" in schema:
        return _flat(definitions[schema["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in schema:
        return [option for inner in schema["anyOf"] for option in _flat(inner, definitions)]
    return [schema]


def _words(schema: Schema) -> str | None:
    if "enum" in schema:
        return "one of " + ", ".join(str(choice) for choice in schema["enum"])
    if "const" in schema:
        return str(schema["const"])
    match schema.get("type"):
        case "integer":
            return _range("an integer", schema)
        case "number":
            return _range("a number", schema)
        case "boolean":
            return "true or false"
        case "string":
            return _text(schema)
        case "array":
            items = schema.get("items", {})
            return f"a list, each item {_words(items)}" if _words(items) else "a list"
        case "object":
            names = ", ".join(schema.get("properties", {}))
            return f"a group of settings ({names})" if names else "a group of settings"
    return None


def _range(noun: str, schema: Schema) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f"{noun} from {low:.10g} to {high:.10g}"
    bounds = [
        f"{word} {bound:.10g}"
        for word, bound in [("of at least", low), ("above", above), ("of at most", high), ("below", below)]
        if bound is not None
    ]
    return " ".join([noun, " and ".join(bounds)]).rstrip()


def _text(schema: Schema) -> str:
    shortest, longest = schema.get("minLength"), schema.get("maxLength")
    words = "text"
    if shortest and longest:
        words = f"text of {shortest} to {longest} characters"
    elif longest:
        words = f"text of at most {longest} characters"
    elif shortest:
        words = f"text of at least {shortest} characters" if shortest > 1 else "text, not empty"
    if "pattern" in schema:
        words += f", {_PATTERNS.get(schema['pattern'], 'matching ' + schema['pattern'])}"
    return words
