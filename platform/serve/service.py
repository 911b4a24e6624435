"""What every route does with a request: checks, admission, deadlines, and the work itself on a backend."""

import asyncio
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any, BinaryIO, Final, Protocol

from lorafleet.core.errors import (
    AdapterIncompatible,
    AdapterNotFound,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    RecipeMismatch,
    StorageUnavailable,
)
from lorafleet.core.generation import MAX_ADAPTERS, MAX_SEED, AdapterUse, GenerationRequest
from lorafleet.core.manifest import REFERENCE_PATTERN, Manifest
from lorafleet.core.metrics import (
    ADAPTER_SECONDS,
    ADAPTER_USES,
    BACKLOG_SECONDS,
    CACHE_LOOKUPS,
    CANCELLED,
    MAX_COUNTED_ADAPTERS,
    OK,
    OTHER,
    REGISTRY_SILENT,
    FirstComers,
    Recorder,
    Result,
    Unrecorded,
)
from lorafleet.core.ranges import short
from lorafleet.core.recipe import BaseRef, RecipeStart
from lorafleet.serve import logs
from lorafleet.serve.admission import Admission, Place
from lorafleet.serve.cache import make_cache
from lorafleet.serve.config import LiveSettings, ServeSettings
from lorafleet.serve.events import Event, Image, Queued, Retrying
from lorafleet.serve.fleet import open_fleet
from lorafleet.serve.idempotency import RememberedRuns
from lorafleet.serve.pictures import Upload, prepare
from lorafleet.serve.result import GenerationResult, ModelInfo, told
from lorafleet.serve.runs import Run
from lorafleet.serve.terms import Terms
from lorafleet.serve.work import Start, Work, WorkAdapter

ANY_TERMS: Final = Terms()
ErrorBody = Callable[[Exception], dict[str, Any]]
DEADLINE_GRACE_S: Final = 5.0  # a replica notices a passed deadline itself, within one step; then the gateway does

VERSION_DIGITS: Final = 12  # of an adapter's version, in metrics
DECODINGS: Final = 2  # uploaded pictures that are in memory decoded at a time, up to 130 MB each with its mask


class Backend(Protocol):
    """What makes the images."""

    async def model(self) -> ModelInfo:
        """The base that is loaded. Raises NotReady."""

    def stream(self, work: Work, timeout_s: float, *, is_detailed: bool) -> AsyncGenerator[Event]:
        """The images and, with details, all that goes before as it happens. Closed, it calls off what is not done.

        Raises LorafleetError; DeadlineExceeded soon after `timeout_s`.
        """

    async def push(self, name: str, handed_in: str) -> Manifest:
        """Checks what was handed in at the registry against the base, and pushes it. Raises LorafleetError."""

    @property
    def is_asleep(self) -> bool:
        """Nobody has asked for long, so that no replica runs; one will as soon as somebody does."""


class Service:
    """Admission, limits and deadlines around a backend."""

    def __init__(
        self, settings: ServeSettings, backend: Backend, error_body: ErrorBody, recorder: Recorder | None = None
    ) -> None:
        """`error_body` puts an error into the one shape."""
        self.settings = settings
        self.recorder = recorder or Unrecorded()
        self.error_body = error_body
        self.known_model: ModelInfo | None = None
        self._backend = backend
        self._cache = make_cache(settings.cache)
        self._remembered = RememberedRuns()
        self._decoding = asyncio.Semaphore(DECODINGS)
        self._admission = Admission(servers=settings.most_replicas, max_queued=settings.max_queued)
        self.fleet = open_fleet(settings.registry)
        self._request_timeout_s = settings.request_timeout_s
        self._counted = FirstComers[tuple[str, str]](MAX_COUNTED_ADAPTERS)

    def reconfigure(self, live: LiveSettings) -> None:
        """New limits for the requests that come from now on."""
        self._admission.max_queued = live.max_queued
        self._request_timeout_s = live.request_timeout_s

    async def model(self) -> ModelInfo:
        """Asks the backend, so that the answer also says whether one is there. Raises NotReady."""
        self.known_model = await self._backend.model()
        return self.known_model

    async def accept(
        self,
        request: GenerationRequest,
        *,
        base: BaseRef | None = None,
        model_id: str | None = None,
        upload: Upload | None = None,
        start: RecipeStart | None = None,
        previews: int = 0,
    ) -> tuple[ModelInfo, Work]:
        """The request with nothing left open. Raises what is wrong with it.

        `base` and `start` are what a recipe asks for: it would not make the same image from anything else.
        """
        model = await self._known_model()
        names = [f"adapters.{place}.name" for place in range(len(request.adapters))]
        if model_id is not None and model_id != model.ref.id:
            request, names = self._with_model(request, model_id, model), ["model", *names]
        if base is not None and base.fingerprint != model.ref.fingerprint:
            raise RecipeMismatch(
                f"base.fingerprint asks for {base.id} {base.fingerprint[:12]}, but {model.ref.id} "
                f"{model.ref.fingerprint[:12]} is loaded: start the service with that base, or leave base out",
                param="base.fingerprint",
            )
        prepared: Start | None = None
        if upload is not None:
            async with self._decoding:
                request, prepared = await asyncio.to_thread(prepare, upload, request, model.limits)
        if start is not None:
            _check_start(prepared, start)
        model.limits.check(request)
        width, height = model.limits.size_of(request)
        seed = secrets.randbelow(MAX_SEED + 1) if request.seed is None else request.seed
        settled = request.model_copy(update={"width": width, "height": height, "seed": seed})
        adapters = await self._adapters(request.adapters, names, model)
        is_seeded = request.seed is not None
        return model, Work(settled, prepared, previews=previews, is_seeded=is_seeded, adapters=adapters)

    async def start(self, work: Work, terms: Terms = ANY_TERMS, *, is_detailed: bool) -> Run:
        """Begins the work, or joins it; without details only `Queued` comes before the images.

        Raises Overloaded or IdempotencyConflict. The caller holds the run and lets it go.
        """
        logs.note_adapters(work)
        asked = "" if terms.key is None else self.asked_fingerprint(work)
        if terms.key is not None and (run := self._remembered.find(terms.key, asked)):
            return run
        is_cachable = work.is_seeded and self.settings.cache.max_bytes > 0
        fingerprint = self.fingerprint(work) if is_cachable else ""
        cached = None
        if is_cachable and terms.uses_cache:
            cached = await self._cache.get(fingerprint)
            self.recorder.add(CACHE_LOOKUPS, result="miss" if cached is None else "hit")
        if terms.key is not None and (run := self._remembered.find(terms.key, asked)):  # begun meanwhile
            return run
        if cached is not None:
            run = Run(_as_events(cached), is_cached=True)
            self._count_adapters(work, "cached")
        else:
            timeout_s = self._request_timeout_s
            place = self._admission.admit(work.cost(), timeout_s)
            begun_s = time.monotonic()
            run = Run(
                self._events(work, timeout_s, is_detailed), on_end=lambda run: self._ended(run, work, place, begun_s)
            )
            if is_cachable:
                run.when_good(lambda result: self._cache.put(fingerprint, result))
        if terms.key is not None:
            self._remembered.remember(terms.key, asked, run)
        return run

    def start_job(self, work: Work, tries: int) -> Run:
        """As `start`, for work that has waited for its turn elsewhere: nothing is refused, and it is begun anew when
        its replica is lost, so many times in all. The caller holds the run and lets it go."""
        logs.note_adapters(work)
        place = self._admission.enter(work.cost())
        events = self._tried(work, self.settings.jobs.timeout_s, tries)
        begun_s = time.monotonic()
        return Run(events, on_end=lambda run: self._ended(run, work, place, begun_s))

    async def push(self, name: str, file: BinaryIO) -> Manifest:
        """Makes a file the newest version of an adapter. The base, which only a replica has, says whether it fits.

        Raises AdapterTooLarge, AdapterUnreadable, AdapterIncompatible, NotReady and StorageUnavailable.
        """
        registry = self.fleet.registry
        handed_in = await self.fleet.ask(lambda: registry.hand_in(file), timeout_s=None)
        try:
            return await self._backend.push(name, handed_in)
        finally:
            self.fleet.forget(name)
            with suppress(StorageUnavailable):  # then `gc` finds it
                await asyncio.shield(self.fleet.ask(lambda: registry.withdraw(handed_in)))

    async def health(self) -> list[str]:
        """What the service works without. Raises NotReady when it does not."""
        problems = [] if self._backend.is_asleep else list((await self.model()).problems)
        silent = await self.fleet.probe() if self.settings.engine.bank is not None else None
        return problems if silent is None else [silent, *problems]

    async def generate(self, work: Work, terms: Terms = ANY_TERMS) -> GenerationResult:
        """All images; the work is called off when the caller leaves."""
        run = await self.start(work, terms, is_detailed=False)
        try:
            return await run.result()
        finally:
            run.let_go()

    @property
    def backlog_s(self) -> float:
        """Seconds that the work in flight takes, as far as is known."""
        return self._admission.backlog_s

    def measure(self) -> None:
        """Sets the gauges; from any thread."""
        self.recorder.set(BACKLOG_SECONDS, self.backlog_s)
        self.recorder.set(REGISTRY_SILENT, float(self.fleet.failure is not None))

    def fingerprint(self, work: Work) -> str:
        return work.fingerprint(self.known_model.ref.fingerprint if self.known_model else "")

    def asked_fingerprint(self, work: Work) -> str:
        return work.asked_fingerprint(self.known_model.ref.fingerprint if self.known_model else "")

    async def close(self) -> None:
        self.fleet.close()
        await self._cache.close()

    async def adapter_model(self, model_id: str) -> Manifest:
        """The adapter that the id of a model other than the base means. Raises ModelNotFound, NotReady, what keeps it
        from being served, and StorageUnavailable."""
        model = await self._known_model()
        self._check_adapter_id(model_id, model)
        return (await self._adapter(AdapterUse(name=model_id), "model", model)).manifest

    def unfit(self, manifest: Manifest, model: ModelInfo) -> str | None:
        """Why an adapter cannot be served on the base that is loaded, None if it can; to go after its name."""
        bank = self.settings.engine.bank
        if manifest.base_fingerprint not in (None, model.ref.fingerprint):
            return (
                f"was trained on another base ({manifest.base_fingerprint[:12]}) than {model.ref.id} "
                f"({model.ref.fingerprint[:12]}), which is loaded: use an adapter of this one"
            )
        if bank is not None and manifest.rank > bank.max_rank:
            return f"has rank {manifest.rank}, here at most {bank.max_rank} are served: raise engine.bank.max_rank"
        return None

    async def _known_model(self) -> ModelInfo:
        return self.known_model or await self.model()

    def _with_model(self, request: GenerationRequest, model_id: str, model: ModelInfo) -> GenerationRequest:
        """The request with the adapter that it names as its model. Raises ModelNotFound, InvalidRequest."""
        self._check_adapter_id(model_id, model)
        if len(request.adapters) == MAX_ADAPTERS:
            raise InvalidRequest(
                f"adapters may be {MAX_ADAPTERS - 1} where model names one more, got {MAX_ADAPTERS}", param="adapters"
            )
        return request.model_copy(update={"adapters": [AdapterUse(name=model_id), *request.adapters]})

    def _check_adapter_id(self, model_id: str, model: ModelInfo) -> None:
        """Raises ModelNotFound for what cannot be an adapter's."""
        if self.settings.engine.bank is None:
            raise ModelNotFound(f"no model {short(model_id)}: known is {model.ref.id}", param="model")
        if not re.fullmatch(REFERENCE_PATTERN, model_id):
            raise ModelNotFound(
                f"no model {short(model_id)}: known are {model.ref.id} and the adapters that GET /v1/models lists",
                param="model",
            )

    async def _adapters(
        self, asked: Sequence[AdapterUse], names: Sequence[str], model: ModelInfo
    ) -> tuple[WorkAdapter, ...]:
        """The versions that are meant, those of weight 0 left out. Raises what is wrong with one; `names` are what the
        request calls them."""
        wanted = [(name, use) for name, use in zip(names, asked, strict=True) if use.weight]
        if wanted and self.settings.engine.bank is None:
            raise InvalidRequest("adapters are not served here: set engine.bank, or leave them out", param="adapters")
        return tuple(await asyncio.gather(*(self._adapter(use, name, model) for name, use in wanted)))

    async def _adapter(self, use: AdapterUse, param: str, model: ModelInfo) -> WorkAdapter:
        try:
            chosen = await self.fleet.resolve(use.name)
        except (AdapterNotFound, InvalidRequest) as error:
            if param == "model":
                raise ModelNotFound(
                    f"no model {use.name}: known are {model.ref.id} and the adapters; {error.message}", param=param
                ) from error
            raise type(error)(error.message, param=param) from error
        if (reason := self.unfit(chosen.manifest, model)) is not None:
            if chosen.share < 1:  # a canary that cannot be served is one that fails
                name, digits = self._labels(chosen.manifest)
                self.recorder.add(ADAPTER_USES, adapter=name, version=digits, result="error")
            raise AdapterIncompatible(f"{use.name} {reason}", param=param)
        return WorkAdapter(chosen.manifest, use.weight, chosen.alias, is_split=chosen.share < 1)

    def _ended(self, run: Run, work: Work, place: Place, begun_s: float) -> None:
        place.leave(is_done=run.is_good)
        for adapter in work.adapters if run.is_good else ():
            if adapter.is_split:
                name, digits = self._labels(adapter.manifest)
                self.recorder.observe(ADAPTER_SECONDS, time.monotonic() - begun_s, adapter=name, version=digits)
        self._count_adapters(work, OK if run.is_good else CANCELLED if run.is_called_off else "error")

    def _count_adapters(self, work: Work, result: Result) -> None:
        for adapter in work.adapters:
            name, digits = self._labels(adapter.manifest)
            self.recorder.add(ADAPTER_USES, adapter=name, version=digits, result=result)

    def _labels(self, manifest: Manifest) -> tuple[str, str]:
        version = manifest.name, manifest.version[:VERSION_DIGITS]
        return version if self._counted.knows(version) else (OTHER, OTHER)

    async def _tried(self, work: Work, timeout_s: float, tries: int) -> AsyncGenerator[Event]:
        images: set[int] = set()
        for left in reversed(range(tries)):
            try:
                async with aclosing(self._events(work, timeout_s, is_detailed=True)) as events:
                    async for event in events:
                        if isinstance(event, Queued) or (isinstance(event, Image) and event.image in images):
                            continue
                        if isinstance(event, Image):
                            images.add(event.image)
                        yield event
                return
            except NotReady as error:
                if not left:
                    raise
                yield Retrying(error.message)

    async def _events(self, work: Work, timeout_s: float, is_detailed: bool) -> AsyncGenerator[Event]:
        try:
            async with asyncio.timeout(timeout_s + DEADLINE_GRACE_S):
                yield Queued()
                async with aclosing(self._backend.stream(work, timeout_s, is_detailed=is_detailed)) as events:
                    async for event in events:
                        yield event
        except TimeoutError:
            raise DeadlineExceeded(f"the images were not done in {timeout_s:g} seconds") from None


async def _as_events(result: GenerationResult) -> AsyncGenerator[Event]:
    """A result as the events that tell it."""
    yield Queued()
    for event in told(result):
        yield event


def _check_start(start: Start | None, expected: RecipeStart) -> None:
    if start is None:
        raise InvalidRequest("this recipe's image was made from a picture: send that as init_image", param="init_image")
    for name, ours, theirs in (
        ("init_image", start.recipe.image, expected.image),
        ("mask", start.recipe.mask, expected.mask),
    ):
        if ours != theirs:
            raise RecipeMismatch(f"{name} is not the picture that the recipe names in start: send that one", param=name)
