"""What is told about work while it is done: from a replica to the gateway, and from there to clients as JSON."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final


@dataclass(frozen=True)
class Queued:
    """The work is accepted."""


@dataclass(frozen=True)
class Downloading:
    """An adapter that the replica does not have yet is on its way from the registry."""

    adapter: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Started:
    """Image number `image` left the queue."""

    image: int


@dataclass(frozen=True)
class Step:
    """The UNet was evaluated for the `done`-th of `total` times for this image. `preview`: a small PNG of it."""

    image: int
    done: int
    total: int
    preview: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Image:
    """This image is done: a PNG with its recipe inside."""

    image: int
    seed: int
    png: bytes = field(repr=False)


@dataclass(frozen=True)
class Retrying:
    """The replica was lost and another one begins anew; images that are done stay so."""

    reason: str


@dataclass(frozen=True)
class Done:
    """The last event of work that went well. `timings`: seconds by stage of the image that was done last."""

    timings: dict[str, float]
    warnings: list[str]


Event = Queued | Downloading | Started | Step | Image | Retrying | Done
KINDS: Final[dict[str, type[Event]]] = {
    "queued": Queued,
    "downloading": Downloading,
    "started": Started,
    "step": Step,
    "image": Image,
    "retrying": Retrying,
    "done": Done,
}
PICTURES: Final = frozenset({"png", "preview"})
_NAMES: Final = {kind: name for name, kind in KINDS.items()}


def name_of(event: Event) -> str:
    return _NAMES[type(event)]


def to_fields(event: Event) -> dict[str, Any]:
    """Its name as `type` and its fields, pictures as bytes; a preview only where there is one."""
    values = {part.name: getattr(event, part.name) for part in fields(event)}
    return {"type": name_of(event), **{key: value for key, value in values.items() if value is not None}}


def from_fields(content: Mapping[str, Any]) -> Event:
    """What `to_fields` told."""
    return KINDS[content["type"]](**{key: value for key, value in content.items() if key != "type"})


def to_json(event: Event) -> dict[str, Any]:
    """As `to_fields`, pictures in base64."""
    return {
        key: base64.b64encode(value).decode() if isinstance(value, bytes) else value
        for key, value in to_fields(event).items()
    }


def from_json(content: Mapping[str, Any]) -> Event:
    """What `to_json` wrote."""
    return from_fields({key: base64.b64decode(value) if key in PICTURES else value for key, value in content.items()})
