"""Requests and answers without the network: what the two clients share."""

import base64
import ipaddress
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Final, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel, ValidationError

from lorafleet.client.events import Event, Message, from_json
from lorafleet.client.results import JobStatus
from lorafleet.core.errors import (
    ConfigError,
    DeadlineExceeded,
    GenerationFailed,
    LorafleetError,
    NotReady,
    Overloaded,
    by_code,
)
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.ranges import short
from lorafleet.core.recipe import Recipe

CONNECT_TIMEOUT_S: Final = 5.0
MAX_WAIT_S: Final = 60.0  # whoever is told to come back later than this is told so
FIRST_WAIT_S: Final = 0.5
EVENTS: Final = {"accept": "text/event-stream"}
RETRIED: Final = (429, 503)

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Call:
    """One request to the service."""

    method: str
    path: str
    json: Any = None
    data: Mapping[str, str] | None = None
    files: Mapping[str, tuple[str, bytes | IO[bytes]]] | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        given = {"json": self.json, "data": self.data, "files": self.files, "headers": self.headers}
        return {name: value for name, value in given.items() if value}


def check_url(url: str) -> str:
    """Without the slash at its end. Raises ConfigError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"the address must look like http://127.0.0.1:8000, not {short(url)}.", param="url")
    return url.rstrip("/")


def options(url: str, timeout_s: float, api_key: str | None) -> dict[str, Any]:
    """What both of httpx's clients are made with."""
    return {
        "base_url": url,
        "timeout": httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
        "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
        "trust_env": not _is_local(urlsplit(url).hostname or ""),  # a company's proxy cannot reach this loopback
    }


def generate_call(
    path: str,
    request: GenerationRequest | Recipe,
    *,
    init_image: bytes | None,
    mask: bytes | None,
    strength: float | None,
    idempotency_key: str | None,
    previews: int = 0,
    wants_events: bool = False,
) -> Call:
    body = request.model_dump(mode="json", exclude_none=True)
    pictures = {"init_image": init_image, "mask": mask}
    body |= {name: base64.b64encode(data).decode() for name, data in pictures.items() if data is not None}
    if strength is not None:
        body["strength"] = strength
    if previews:
        body["previews"] = previews
    headers = dict(EVENTS) if wants_events else {}
    return Call("POST", path, json=body, headers=headers | _key(idempotency_key))


def edit_call(
    request: GenerationRequest,
    image: bytes,
    *,
    mask: bytes | None,
    strength: float | None,
    idempotency_key: str | None,
) -> Call:
    size = f"{request.width}x{request.height}" if request.width and request.height else "auto"
    fields = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "n": request.num_images,
        "size": size,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "scheduler": request.scheduler,
        "step_reuse": request.step_reuse,
        "seed": request.seed,
        "strength": strength,
        "adapters": json.dumps([use.model_dump() for use in request.adapters]) if request.adapters else None,
    }
    files = {"image": ("image", image)} | ({} if mask is None else {"mask": ("mask", mask)})
    data = {name: str(value) for name, value in fields.items() if value is not None and value != ""}
    return Call("POST", "/v1/images/edits", data=data, files=files, headers=_key(idempotency_key))


def job_call(method: str, job_id: str, part: str = "", after: str | None = None) -> Call:
    headers = (EVENTS if part else {}) | ({"last-event-id": after} if after else {})
    return Call(method, f"/v1/jobs/{quote(job_id, safe='')}{part}", headers=headers)


class ConnectionLost(NotReady):
    """The connection broke after the request was sent."""


class Interpreter:
    """Makes results of answers, and of every failure one LorafleetError with a sentence for people."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url
        self.timeout_s = timeout_s

    def content(self, response: httpx.Response) -> Any:
        """Of a response that is read. Raises its error."""
        try:
            content = response.json()
        except ValueError:
            content = response.text
        if response.is_success:
            return content
        raise self.error(response, content)

    def parse(self, model: type[M], content: Any, what: str) -> M:
        try:
            return model.model_validate(content)
        except ValidationError:
            self.not_lorafleet(f"{what} gave {short(content)}")

    def edited(self, content: Any) -> list[bytes]:
        try:
            return [base64.b64decode(image["b64_json"], validate=True) for image in content["data"]]
        except (KeyError, TypeError, ValueError):
            self.not_lorafleet(f"POST /v1/images/edits gave {short(content)}")

    def model_ids(self, content: Any) -> list[str]:
        try:
            return [str(entry["id"]) for entry in content["data"]]
        except (KeyError, TypeError):
            self.not_lorafleet(f"GET /v1/models gave {short(content)}")

    def event(self, message: Message) -> Event | None:
        """None for what this client does not know. Raises the error that the message tells."""
        try:
            content = json.loads(message.data)
            if message.name == "error":
                raise self.told(content, "the service failed")
            return from_json(content)
        except (ValueError, TypeError, AttributeError):
            self.not_lorafleet(f"its events hold {short(message.data)}")

    def finished(self, job: JobStatus) -> JobStatus:
        """Raises what a job ended with, if not well."""
        if job.error is not None:
            raise self.told({"error": job.error.model_dump()}, "the job failed")
        if job.status == "cancelled":
            raise GenerationFailed(f"the job {job.id} was called off.")
        return job

    def cut_off(self) -> "ConnectionLost":
        return ConnectionLost(f"the connection to {self.url} broke: it ended before the work did.")

    def failure(self, error: httpx.HTTPError | httpx.InvalidURL) -> LorafleetError:
        if isinstance(error, httpx.ConnectError):
            return NotReady(f"no Lorafleet at {self.url}: is `lorafleet serve` running?")
        if isinstance(error, httpx.TimeoutException):
            return DeadlineExceeded(f"no answer from {self.url} within {self.timeout_s:g} s.")
        return ConnectionLost(f"the connection to {self.url} broke: {error}.")

    def error(self, response: httpx.Response, content: Any) -> LorafleetError:
        """The server's one error shape as the class whose `code` it names."""
        reason = f"{response.status_code} {response.reason_phrase}"
        if not isinstance(content, dict) or not isinstance(content.get("error"), dict):
            if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                return NotReady(f"{self.url} is not ready ({reason}).")
            return LorafleetError(f"{self.url} answered {reason} and no reason: is it a Lorafleet?")
        error = self.told(content, f"{self.url} answered {reason} and no reason: is it a Lorafleet?")
        if isinstance(error, Overloaded):
            error.retry_after_s = _seconds(response.headers.get("retry-after"), error.retry_after_s)
        return error

    def told(self, content: dict[str, Any], otherwise: str) -> LorafleetError:
        fault = content.get("error")
        if not isinstance(fault, dict) or not isinstance(fault.get("message"), str):
            return LorafleetError(otherwise)
        return by_code().get(str(fault.get("code")), LorafleetError)(fault["message"], param=fault.get("param"))

    def not_lorafleet(self, what: str) -> NoReturn:
        raise LorafleetError(f"{self.url} does not answer like a Lorafleet: {what}")


def wait_before_retry(response: httpx.Response, tries: int, retries: int) -> float | None:
    """Seconds until the request is sent again after so many tries; None: it is not."""
    should = response.headers.get("x-should-retry", "true" if response.status_code in RETRIED else "false")
    if response.is_success or should != "true" or tries > retries:
        return None
    wait_s = _seconds(response.headers.get("retry-after"), FIRST_WAIT_S * 2 ** (tries - 1))
    return wait_s if 0 <= wait_s <= MAX_WAIT_S else None


def _key(idempotency_key: str | None) -> dict[str, str]:
    return {"idempotency-key": idempotency_key} if idempotency_key else {}


def _seconds(text: str | None, default: float) -> float:
    try:
        return float(text) if text else default
    except ValueError:
        return default  # the header may also be a date


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
