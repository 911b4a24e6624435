"""Writes what is generated beside the chart's values.yaml: values.schema.json and README.md. `--check` only compares.

values.yaml is the source. A key's comment is its description (`# -- text`); `# @schema X` narrows its type, where X is
JSON Schema, or one of KINDS. What a service or a training run may be set to is taken from their own settings models, so
that a misspelt setting is refused by `helm install`.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel

from lorafleet.eval.config import EvalConfig
from lorafleet.serve.config import Preload, ServeSettings
from lorafleet.serve.deploy import ELSEWHERE
from lorafleet.train.config import TrainConfig

CHART: Final = Path(__file__).parent.parent / "deploy" / "helm" / "lorafleet"
SET_BY_VALUES: Final = {
    *ELSEWHERE,
    "replica_cpus",
    "replica_gpus",
    "replica_threads",
    "drain_s",
    "log_level",
    "log_format",
}
SECRET: Final = {"admin_key"}
TEXT: Final = {"type": "string"}
QUANTITY: Final = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?(m|[KMGTP]i?|k)?$"}
LIST: Final = {"type": "array", "items": {"type": "object"}}
NAME: Final = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
AMOUNTS: Final = {"type": "object", "additionalProperties": QUANTITY}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "labels": {"type": "object", "additionalProperties": TEXT},
    "object": {"type": "object"},
    "list": LIST,
    "names": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": TEXT},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "env": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {"name": TEXT, "value": TEXT, "valueFrom": {"type": "object"}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "resources": {
        "type": "object",
        "properties": {"requests": AMOUNTS, "limits": AMOUNTS},
        "additionalProperties": False,
    },
    "quantity": QUANTITY,
    "ports": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 65535}},
    "accessModes": {
        "type": "array",
        "minItems": 1,
        "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]},
    },
    "trainJobs": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": {**NAME, "description": "the run's name, and the adapter's unless `adapter` says another"},
                "adapter": TEXT,
                "data": {**TEXT, "minLength": 1},
                "workers": {"type": "integer", "minimum": 1},
                "export": {"enum": ["kohya"]},
                "settings": {"$ref": "#/$defs/TrainConfig"},
            },
            "required": ["name", "data"],
            "additionalProperties": False,
        },
    },
    "evalJobs": {
        "type": "array",
        "items": {
            "type": "object",
            "properties": {
                "name": NAME,
                "args": {"type": "array", "minItems": 1, "items": TEXT},
                "settings": {"$ref": "#/$defs/EvalConfig"},
            },
            "required": ["name", "args"],
            "additionalProperties": False,
        },
    },
    "settings:serve": {"$ref": "#/$defs/ServeSettings"},
    "adapters": {"type": "array", "items": {"$ref": "#/$defs/Preload"}},
}


@dataclass
class Entry:
    """A key of values.yaml with its comment and what is below it."""

    path: tuple[str, ...]
    default: Any
    description: str
    narrowed: dict[str, Any]
    below: list["Entry"] = field(default_factory=list)


def read(text: str) -> list[Entry]:
    """The top keys. Raises ValueError for a key without a description."""
    lines = text.splitlines()

    def comment_above(line: int) -> list[str]:
        found: list[str] = []
        while line > 0 and lines[line - 1].lstrip().startswith("#"):
            line -= 1
            found.insert(0, lines[line].lstrip().removeprefix("#").strip())
        return found

    def entries(node: yaml.MappingNode, values: dict[str, Any], above: tuple[str, ...]) -> list[Entry]:
        found = []
        for key, value in node.value:
            path = (*above, key.value)
            comment = comment_above(key.start_mark.line)
            begins = [n for n, line in enumerate(comment) if line.startswith("-- ")]
            notes = [line.removeprefix("@schema ") for line in comment if line.startswith("@schema ")]
            said = [line for line in comment[begins[-1] :] if not line.startswith("@schema ")] if begins else []
            entry = Entry(path, values[key.value], " ".join(said).removeprefix("-- "), _narrowed(notes))
            if isinstance(value, yaml.MappingNode) and not notes and value.value:
                entry.below = entries(value, values[key.value], path)
            elif not entry.description:
                raise ValueError(f"{'.'.join(path)} has no description: write `# -- ...` above it")
            found.append(entry)
        return found

    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    return entries(root, yaml.safe_load(text), ())


def _narrowed(notes: list[str]) -> dict[str, Any]:
    if not notes:
        return {}
    return KINDS[notes[0]] if notes[0] in KINDS else dict(json.loads(notes[0]))


def schema(entries: list[Entry]) -> dict[str, Any]:
    """JSON Schema 2020-12 of values.yaml: every key known, nothing else allowed."""
    definitions = {**_definitions(ServeSettings, SET_BY_VALUES | SECRET), **_definitions(TrainConfig, {"registry"})}
    definitions |= {**_definitions(EvalConfig, {"registry"}), **_definitions(Preload, set())}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart lorafleet",
        **_object(entries),
        "$defs": dict(sorted(definitions.items())),
    }


def _object(entries: list[Entry]) -> dict[str, Any]:
    # Helm adds `global` to the values of a chart that another one depends on.
    properties: dict[str, Any] = {} if entries[0].path[1:] else {"global": {"type": "object"}}
    for entry in entries:
        described = {"description": entry.description} if entry.description else {}
        properties[entry.path[-1]] = {**described, **_value(entry)}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value(entry: Entry) -> dict[str, Any]:
    if entry.below:
        return _object(entry.below)
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    own = {} if {"type", "enum", "$ref"} & entry.narrowed.keys() else {"type": kinds[type(entry.default)]}
    return {**own, **entry.narrowed}


def _definitions(model: type[BaseModel], without: set[str]) -> dict[str, Any]:
    """A settings model as $defs; `without` names settings that have no place in values."""
    document = model.model_json_schema()
    inner = document.pop("$defs", {})
    document["properties"] = {name: value for name, value in document["properties"].items() if name not in without}
    document.pop("required", None) if without else None
    return {**inner, model.__name__: document}


def readme(entries: list[Entry]) -> str:
    """README.md, out of README.md.in and a table of the values."""
    rows: list[str] = []

    def add(below: list[Entry]) -> None:
        for entry in below:
            if entry.below:
                add(entry.below)
                continue
            default = json.dumps(entry.default, ensure_ascii=False).replace("|", "\\|")
            said = re.sub(r"\s+", " ", entry.description).replace("|", "\\|")
            rows.append(f"| `{'.'.join(entry.path)}` | `{default}` | {said} |")

    add(entries)
    table = "\n".join(["| value | default | what it is |", "| --- | --- | --- |", *rows])
    head = "<!-- Written by scripts/chart_docs.py from README.md.in and values.yaml. -->\n"
    return head + (CHART / "README.md.in").read_text().replace("@VALUES@", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file is stale")
    is_check = parser.parse_args().check
    entries = read((CHART / "values.yaml").read_text())
    wanted = {
        "values.schema.json": json.dumps(schema(entries), indent=1, ensure_ascii=False) + "\n",
        "README.md": readme(entries),
    }
    stale = [name for name, text in wanted.items() if _text(CHART / name) != text]
    if is_check and stale:
        sys.exit(f"{' and '.join(stale)} of the chart are stale: run `make chart-docs`")
    for name in stale:
        (CHART / name).write_text(wanted[name])


def _text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


if __name__ == "__main__":
    main()
