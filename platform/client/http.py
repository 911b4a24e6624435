"""Talks to a Lorafleet over HTTP; every failure is one LorafleetError with a sentence for people.

with Client("http://127.0.0.1:8000") as client:
    result = client.generate(GenerationRequest(prompt="a red apple on a blue background"))
"""

import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from typing import Any, Self

import httpx

from lorafleet.client.adapters import Adapters
from lorafleet.client.events import Cancelled, Decoder, Done, Event, Message
from lorafleet.client.exchange import (
    FIRST_WAIT_S,
    Call,
    ConnectionLost,
    Interpreter,
    check_url,
    edit_call,
    generate_call,
    job_call,
    options,
    wait_before_retry,
)
from lorafleet.client.results import GenerateResult, JobStatus
from lorafleet.core.errors import DeadlineExceeded, NotReady
from lorafleet.core.generation import GenerationRequest
from lorafleet.core.recipe import Recipe


class Client:
    """A connection pool to one server; use it as a context manager. Safe to share between threads.

    Answers 429 and 503 are asked again, as many times as `retries` and when the server says so.
    `adapters` are those of its registry.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 600.0,
        api_key: str | None = None,
        retries: int = 2,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`transport` replaces the network in tests. Raises ConfigError for an address that is none."""
        self.url = check_url(url)
        self.timeout_s = timeout_s
        self.retries = retries
        self._interpreter = Interpreter(self.url, timeout_s)
        self._http = httpx.Client(**options(self.url, timeout_s, api_key), transport=transport)
        self.adapters = Adapters(self._ask, self._interpreter)

    def generate(
        self,
        request: GenerationRequest | Recipe,
        *,
        init_image: bytes | None = None,
        mask: bytes | None = None,
        strength: float | None = None,
        idempotency_key: str | None = None,
    ) -> GenerateResult:
        """Make the images; a Recipe is refused (RecipeMismatch) by a server with another base model.

        With `init_image` they begin with that picture, and only what is white in `mask` is drawn anew.
        """
        call = generate_call(
            "/generate",
            request,
            init_image=init_image,
            mask=mask,
            strength=strength,
            idempotency_key=idempotency_key,
        )
        return self._interpreter.parse(GenerateResult, self._ask(call), "POST /generate")

    def stream(
        self,
        request: GenerationRequest | Recipe,
        *,
        previews: int = 0,
        init_image: bytes | None = None,
        mask: bytes | None = None,
        strength: float | None = None,
        idempotency_key: str | None = None,
    ) -> Generator[Event]:
        """As `generate`, event by event; the last one is Done. Closing it before that calls the work off."""
        call = generate_call(
            "/generate",
            request,
            init_image=init_image,
            mask=mask,
            strength=strength,
            idempotency_key=idempotency_key,
            previews=previews,
            wants_events=True,
        )
        with closing(self._messages(call)) as messages:
            for message in messages:
                if event := self._interpreter.event(message):
                    yield event
                    if isinstance(event, Done):
                        return
        raise self._interpreter.cut_off()

    def edit(
        self,
        request: GenerationRequest,
        image: bytes,
        *,
        mask: bytes | None = None,
        strength: float | None = None,
        idempotency_key: str | None = None,
    ) -> list[bytes]:
        """The picture drawn anew where `mask`, or without one the picture itself, is transparent; PNG files.

        Where nothing is transparent, all of it is, as far as `strength` (0 to 1) goes.
        """
        call = edit_call(request, image, mask=mask, strength=strength, idempotency_key=idempotency_key)
        return self._interpreter.edited(self._ask(call))

    def submit(
        self,
        request: GenerationRequest | Recipe,
        *,
        previews: int = 0,
        init_image: bytes | None = None,
        mask: bytes | None = None,
        strength: float | None = None,
        idempotency_key: str | None = None,
    ) -> JobStatus:
        """A job that makes the images when its turn comes, whoever waits for it."""
        call = generate_call(
            "/v1/jobs",
            request,
            init_image=init_image,
            mask=mask,
            strength=strength,
            idempotency_key=idempotency_key,
            previews=previews,
        )
        return self._interpreter.parse(JobStatus, self._ask(call), "POST /v1/jobs")

    def job(self, job_id: str) -> JobStatus:
        """How far it is. Raises JobNotFound."""
        return self._interpreter.parse(JobStatus, self._ask(job_call("GET", job_id)), "GET /v1/jobs")

    def cancel(self, job_id: str) -> JobStatus:
        """Calls a job off within a step; one that has ended stays as it is. Raises JobNotFound."""
        return self._interpreter.parse(JobStatus, self._ask(job_call("DELETE", job_id)), "DELETE /v1/jobs")

    def job_events(self, job_id: str) -> Generator[Event]:
        """All that has happened to a job and happens until it ends, over broken connections too.

        Raises what it ended with, if not well or called off.
        """
        after: str | None = None
        broken = 0
        while True:
            try:
                call = job_call("GET", job_id, "/events", after)
                with closing(self._messages(call)) as messages:
                    for message in messages:
                        after, broken = message.number, 0
                        if event := self._interpreter.event(message):
                            yield event
                            if isinstance(event, Done | Cancelled):
                                return
                raise self._interpreter.cut_off()
            except ConnectionLost:
                broken += 1
                if broken > self.retries:
                    raise
                time.sleep(FIRST_WAIT_S * broken)

    def wait(self, job_id: str) -> JobStatus:
        """The job once it is done. Raises what it ended with, if not well."""
        with closing(self.job_events(job_id)) as events:
            for _ in events:
                pass
        return self._interpreter.finished(self.job(job_id))

    def models(self) -> list[str]:
        """The ids that the server serves."""
        return self._interpreter.model_ids(self._ask(Call("GET", "/v1/models")))

    def ready(self) -> bool:
        """Whether a server is there and can generate now."""
        try:
            self._ask(Call("GET", "/readyz"), retries=0)
        except (NotReady, DeadlineExceeded):
            return False
        return True

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, call: Call, retries: int | None = None) -> Any:
        tries = 0
        while True:
            tries += 1
            with self._translated():
                response = self._http.request(call.method, call.path, **call.arguments())
            wait_s = wait_before_retry(response, tries, self.retries if retries is None else retries)
            if wait_s is None:
                return self._interpreter.content(response)
            time.sleep(wait_s)

    def _messages(self, call: Call) -> Generator[Message]:
        tries = 0
        while True:
            tries += 1
            with self._translated():
                with self._http.stream(call.method, call.path, **call.arguments()) as response:
                    if response.is_success:
                        decoder = Decoder()
                        for line in response.iter_lines():
                            if message := decoder.feed(line):
                                yield message
                        return
                    response.read()
                wait_s = wait_before_retry(response, tries, self.retries)
                if wait_s is None:
                    self._interpreter.content(response)
                    return
            time.sleep(wait_s)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._interpreter.failure(error) from error
