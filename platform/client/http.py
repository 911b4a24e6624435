"""Talks to a Lorafleet over HTTP; every failure is one LorafleetError with a sentence for people.

with Client("http://127.0.0.1:8000") as client:
    result = client.generate(GenerationRequest(prompt="a red apple on a blue background"))
"""

import base64
import ipaddress
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorafleet.core.errors import ConfigError, DeadlineExceeded, LorafleetError, NotReady, Overloaded, by_code
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.ranges import short
from lorafleet.core.recipe import Recipe

CONNECT_TIMEOUT_S = 5.0


class GenerateResult(BaseModel):
    """What `POST /generate` answered: PNG bytes and, image by image, the seed that makes it again."""

    model_config = ConfigDict(frozen=True)

    id: str
    model: str
    images: list[bytes] = Field(description="PNG files, each with its recipe inside")
    seeds: list[int]
    timings: dict[str, float] = Field(description="seconds: queue_s, encode_s, denoise_s, decode_s, total_s")
    warnings: list[str] = []


class Client:
    """A connection pool to one server; use it as a context manager. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`transport` replaces the network in tests."""
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"the address must look like http://127.0.0.1:8000, not {short(url)}.", param="url")
        self._http = httpx.Client(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S),
            headers={"authorization": f"Bearer {api_key}"} if api_key else {},
            transport=transport,
            trust_env=not _is_local(parts.hostname),  # a company's proxy cannot reach this machine's loopback
        )

    def generate(self, request: GenerationRequest | Recipe) -> GenerateResult:
        """Make the images; a Recipe is refused (RecipeMismatch) by a server with another base model."""
        body = self._call("POST", "/generate", json=request.model_dump(mode="json", exclude_none=True))
        try:
            images = [base64.b64decode(image, validate=True) for image in body["images"]]
            return GenerateResult.model_validate({**body, "images": images})
        except (KeyError, TypeError, ValueError, ValidationError):
            self._not_lorafleet(f"POST /generate gave {short(body)}")

    def models(self) -> list[str]:
        """The ids that the server serves."""
        body = self._call("GET", "/v1/models")
        try:
            return [str(entry["id"]) for entry in body["data"]]
        except (KeyError, TypeError):
            self._not_lorafleet(f"GET /v1/models gave {short(body)}")

    def ready(self) -> bool:
        """Whether a server is there and can generate now."""
        try:
            self._call("GET", "/readyz")
        except (NotReady, DeadlineExceeded):
            return False
        return True

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, path: str, json: object = None) -> Any:
        try:
            response = self._http.request(method, path, json=json)
        except httpx.ConnectError as error:
            raise NotReady(f"no Lorafleet at {self.url}: is `lorafleet serve` running?") from error
        except httpx.TimeoutException as error:
            raise DeadlineExceeded(f"no answer from {self.url} within {self.timeout_s:g} s.") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NotReady(f"the connection to {self.url} broke: {error}.") from error
        try:
            body = response.json()
        except ValueError:
            body = response.text
        if response.is_success:
            return body
        raise _error(response, body, self.url)

    def _not_lorafleet(self, what: str) -> NoReturn:
        raise LorafleetError(f"{self.url} does not answer like a Lorafleet: {what}")


def _error(response: httpx.Response, body: Any, url: str) -> LorafleetError:
    """The server's one error shape as the class whose `code` it names."""
    fault = body.get("error") if isinstance(body, dict) else None
    if not isinstance(fault, dict) or not isinstance(fault.get("message"), str):
        reason = f"{response.status_code} {response.reason_phrase}"
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            return NotReady(f"{url} is not ready ({reason}).")
        return LorafleetError(f"{url} answered {reason} and no reason: is it a Lorafleet?")
    error = by_code().get(str(fault.get("code")), LorafleetError)(fault["message"], param=fault.get("param"))
    if isinstance(error, Overloaded):
        error.retry_after_s = _seconds(response.headers.get("retry-after"), error.retry_after_s)
    return error


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
