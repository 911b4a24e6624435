"""Asks a running service for pictures, in the shape of OpenAI's Images API, which Lorafleet serves too.

One shape for both, spoken here over httpx: our typed client speaks `/generate`, which no other service has.
"""

import base64
import time
from typing import Any, Final

import httpx

from lorafleet.core.errors import DataUnreadable, GenerationFailed, InvalidRequest, LorafleetError, NotReady
from lorafleet.core.pictures import BadPicture, decode, on_white
from lorafleet.eval.config import RunConfig
from lorafleet.eval.images import MAX_PIXELS, Drawn
from lorafleet.eval.plan import Job, Sampling
from lorafleet.eval.systems import System

PATH: Final = "/v1/images/generations"
FIRST_WAIT_S: Final = 0.5
MAX_WAIT_S: Final = 60.0
ASK_AGAIN: Final = (429, 502, 503)


class Endpoint:
    """One system that answers over HTTP. Safe for several threads; use it as a context manager.

    `api_key` goes into the Authorization header and nowhere else. A busy or silent service is asked again
    `run.endpoint_retries` times, when it says so or after waits that double.
    """

    def __init__(
        self,
        system: System,
        config: RunConfig,
        *,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._system = system
        self._retries = config.endpoint_retries
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=system.target, timeout=config.endpoint_timeout_s, headers=headers, transport=transport
        )

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def draw(self, job: Job, sampling: Sampling) -> Drawn:
        """Raises NotReady when nobody answers, InvalidRequest or GenerationFailed for what the service refuses."""
        body = self._body(job, sampling)
        start = time.perf_counter()
        response = self._ask(body, job)
        seconds = time.perf_counter() - start
        try:
            data = base64.b64decode(response.json()["data"][0]["b64_json"])
            image = on_white(decode(data, MAX_PIXELS))
        except (ValueError, LookupError, TypeError, BadPicture) as error:
            raise DataUnreadable(
                f"{self._where(job)}: the answer holds no picture (data[0].b64_json of a PNG, JPEG or WebP)."
            ) from error
        return Drawn(image, seconds)

    def _body(self, job: Job, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": job.text, "n": 1}
        if self._system.model:
            body["model"] = self._system.model
        if sampling.width and sampling.height:
            body["size"] = f"{sampling.width}x{sampling.height}"
        if self._system.kind == "lorafleet":
            body |= {
                "response_format": "b64_json",
                "seed": job.seed,
                "negative_prompt": job.negative,
                "num_inference_steps": sampling.steps,
                "guidance_scale": sampling.guidance_scale,
                "scheduler": sampling.scheduler,
                "adapters": [each.model_dump() for each in self._system.uses],
            }
        elif not (self._system.model or "").startswith("gpt-image"):  # these always answer so, and refuse the field
            body["response_format"] = "b64_json"
        return body

    def _ask(self, body: dict[str, Any], job: Job) -> httpx.Response:
        wait_s = FIRST_WAIT_S
        for tries_left in range(self._retries, -1, -1):
            try:
                response = self._http.post(PATH, json=body)
            except httpx.HTTPError as error:
                if not tries_left:
                    reason = str(error) or type(error).__name__
                    raise NotReady(f"{self._where(job)}: {self._system.target} cannot be reached: {reason}") from error
            else:
                if response.is_success:
                    return response
                if response.status_code not in ASK_AGAIN or not tries_left:
                    raise self._refusal(response, job)
                asked = response.headers.get("retry-after", "")
                wait_s = float(asked) if asked.replace(".", "", 1).isdigit() else wait_s
            time.sleep(min(wait_s, MAX_WAIT_S))
            wait_s *= 2
        raise AssertionError("the last try returns or raises")

    def _refusal(self, response: httpx.Response, job: Job) -> LorafleetError:
        try:
            reason = str(response.json()["error"]["message"])
        except (ValueError, LookupError, TypeError):
            reason = response.text[:200] or response.reason_phrase
        kind = InvalidRequest if response.status_code < 500 else GenerationFailed
        return kind(f"{self._where(job)}: {self._system.target} says {response.status_code}: {reason}")

    def _where(self, job: Job) -> str:
        return f"system {self._system.name}, prompt {job.text[:80]!r}"
