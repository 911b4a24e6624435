"""What a service tells about work while it does it."""

import base64
import binascii
from dataclasses import dataclass, field, fields
from typing import Any, Final


@dataclass(frozen=True)
class Queued:
    """The work is accepted."""


@dataclass(frozen=True)
class Downloading:
    """An adapter that is not there yet is on its way from the registry."""

    adapter: str
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Started:
    """Image number `image` left the queue."""

    image: int


@dataclass(frozen=True)
class Step:
    """`done` of `total` steps of this image. `preview`: a small PNG of it, where one was asked for."""

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


@dataclass(frozen=True)
class Cancelled:
    """The last event of a job that was called off."""


Event = Queued | Downloading | Started | Step | Image | Retrying | Done | Cancelled
KINDS: Final[dict[str, type[Event]]] = {
    "queued": Queued,
    "downloading": Downloading,
    "started": Started,
    "step": Step,
    "image": Image,
    "retrying": Retrying,
    "done": Done,
    "cancelled": Cancelled,
}


def from_json(content: dict[str, Any]) -> Event | None:
    """None for an event that this client is too old for. Raises ValueError or TypeError for what is none."""
    kind = KINDS.get(str(content.get("type")))
    if kind is None:
        return None
    known = {part.name for part in fields(kind)}
    values = {key: value for key, value in content.items() if key in known}
    try:
        for key in ("png", "preview"):
            if key in values:
                values[key] = base64.b64decode(values[key], validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    return kind(**values)


@dataclass
class Message:
    """One server-sent event as it came."""

    name: str = "message"
    data: str = ""
    number: str | None = None


class Decoder:
    """Lines into messages: https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream"""

    def __init__(self) -> None:
        self._message = Message()
        self._data: list[str] = []

    def feed(self, line: str) -> Message | None:
        """The message that this line, without its end, completes."""
        if not line:
            message, self._message = self._message, Message()
            message.data, self._data = "\n".join(self._data), []
            return message if message.data else None
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            self._message.name = value
        elif name == "data":
            self._data.append(value)
        elif name == "id":
            self._message.number = value
        return None
