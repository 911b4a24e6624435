"""Settings of every workload, merged: defaults < YAML file < environment < command line.

A workload describes its settings as one frozen pydantic model (`extra="forbid"`); this module fills it. The
environment variable of setting `base.id` is `LORAFLEET_BASE__ID`, its flag `--set base.id=...`; both are read as
YAML, unless the setting is text. This is the only module that reads the environment.

Reserved names, which are no settings:
    LORAFLEET_HOME      where state lives (default ~/.lorafleet)
    LORAFLEET_REQUIRE   tests only: what must not be skipped for being absent
"""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lorafleet.core.errors import ConfigError
from lorafleet.core.ranges import accepts, allowed, names, short

PREFIX = "LORAFLEET_"
RESERVED = frozenset({"LORAFLEET_HOME", "LORAFLEET_REQUIRE"})
MAX_FILE_BYTES = 1 << 20

M = TypeVar("M", bound=BaseModel)
Keys = tuple[str, ...]


def load_settings(
    model: type[M],
    *,
    config_file: Path | None = None,
    given: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> M:
    """Build `model` from all sources; `overrides` are the command line's `a.b=c`, `given` is what a file would hold.

    Raises ConfigError: one sentence naming the setting, where the value came from and what is allowed.
    """
    tree: dict[str, Any] = {}
    sources: dict[Keys, str] = {}
    if config_file is not None:
        tree = _read_file(config_file)
        sources.update(dict.fromkeys(_paths(tree), str(config_file)))
    if given is not None:
        tree = {**tree, **copy.deepcopy(dict(given))}
        sources.update(dict.fromkeys(_paths(dict(given)), "the arguments"))
    for path, raw, source in [*_from_environ(environ), *_from_flags(overrides)]:
        _put(tree, path, _parse(model, path, raw, source))
        sources[path] = source
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise _config_error(error, model, sources) from None


def dump(settings: BaseModel) -> str:
    """The settings as YAML that `--config` reads back to an equal object."""
    tree = settings.model_dump(mode="json")
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def home(environ: Mapping[str, str] | None = None) -> Path:
    """The folder for all state; may not exist yet."""
    value = (os.environ if environ is None else environ).get("LORAFLEET_HOME")
    return Path(value).expanduser().absolute() if value else Path.home() / ".lorafleet"


def otlp_endpoint(environ: Mapping[str, str] | None = None) -> str | None:
    """Where OpenTelemetry's own variable wants traces to go."""
    return (os.environ if environ is None else environ).get("OTEL_EXPORTER_OTLP_ENDPOINT") or None


def ray_address(environ: Mapping[str, str] | None = None) -> str | None:
    """The cluster that Ray's own variable names, as in a RayJob."""
    return (os.environ if environ is None else environ).get("RAY_ADDRESS") or None


def ray_tls(environ: Mapping[str, str] | None = None) -> tuple[str, str, str] | None:
    """The files of Ray's own certificate authority, certificate and key, where its connections are encrypted.

    Raises KeyError for one that Ray could not do without either.
    """
    known = os.environ if environ is None else environ
    if known.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return None
    return known["RAY_TLS_CA_CERT"], known["RAY_TLS_SERVER_CERT"], known["RAY_TLS_SERVER_KEY"]


def required(environ: Mapping[str, str] | None = None) -> frozenset[str]:
    """Names in LORAFLEET_REQUIRE: optional things whose absence must fail a test instead of skipping it."""
    value = (os.environ if environ is None else environ).get("LORAFLEET_REQUIRE", "")
    return frozenset(name.strip() for name in value.split(",") if name.strip())


def _read_file(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
        if len(raw) > MAX_FILE_BYTES:
            raise ConfigError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB: that is no settings file.")
        tree = yaml.safe_load(raw.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {file}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{file}{where} is not YAML: {getattr(error, 'problem', None) or error}.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold settings as `name: value` lines.")
    return tree


def _from_environ(environ: Mapping[str, str] | None) -> list[tuple[Keys, str, str]]:
    found = []
    for name, raw in sorted((os.environ if environ is None else environ).items()):
        if name.startswith(PREFIX) and name not in RESERVED:
            path = tuple(name[len(PREFIX) :].lower().split("__"))
            found.append((path, raw, f"the environment variable {name}"))
    return found


def _from_flags(overrides: Sequence[str]) -> list[tuple[Keys, str, str]]:
    found = []
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes NAME=VALUE, such as --set base.id=PATH, not {short(override)}.")
        found.append((tuple(key.strip().split(".")), raw, "the command line"))
    return found


def _parse(model: type[BaseModel], path: Keys, raw: str, source: str) -> Any:
    """Text stays as it is typed (a revision may look like a number); everything else is YAML."""
    kinds = accepts(model, path)
    if "string" in kinds:
        return None if "null" in kinds and raw in ("", "null", "~") else raw
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ConfigError(
            f"{'.'.join(path)}: {source} says {short(raw)}, which is not a value in YAML.",
            param=".".join(path),
        ) from None


def _put(tree: dict[str, Any], path: Keys, value: Any) -> None:
    for part in path[:-1]:
        inner = tree.get(part)
        tree[part] = inner if isinstance(inner, dict) else {}
        tree = tree[part]
    tree[path[-1]] = value


def _paths(tree: dict[Any, Any], above: Keys = ()) -> list[Keys]:
    found = []
    for name, value in tree.items():
        found.append((*above, str(name)))
        if isinstance(value, dict):
            found += _paths(value, (*above, str(name)))
    return found


def _config_error(error: ValidationError, model: type[BaseModel], sources: Mapping[Keys, str]) -> ConfigError:
    problem = error.errors(include_url=False)[0]
    path = tuple(str(part) for part in problem["loc"])
    key = ".".join(path)
    above = [sources[path[:n]] for n in range(len(path), 0, -1) if path[:n] in sources]
    below = [said for where, said in sources.items() if where[: len(path)] == path]
    source = next(iter([*above, *below]), None)
    origin = f"from {source}" if source else "a default"
    if problem["type"] == "extra_forbidden":
        known = names(model, path[:-1])
        near = [".".join([*path[:-1], name]) for name in difflib.get_close_matches(path[-1], known, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}."
        return ConfigError(f"unknown setting {key} ({origin}); {hint}", param=key)
    if problem["type"] == "missing":
        return ConfigError(f"the setting {key} is needed and has no default; give --set {key}=...", param=key)
    range_ = None if problem["type"] == "value_error" else allowed(model, problem["loc"])
    if range_ is None:
        message = problem["msg"].removeprefix("Value error, ").rstrip(".")
        return ConfigError(f"{message} ({key}, {origin})." if key else f"{message}.", param=key or None)
    return ConfigError(
        f"{key} must be {range_}, but {source or 'the default'} says {short(problem['input'])}.", param=key
    )
