"""Blind comparison: pairs of pictures, votes, ratings. The store is a database, asked in threads."""

import asyncio
import base64
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

from fastapi import Depends, FastAPI, Query, Request
from fastapi.responses import JSONResponse, Response

from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.arena.export import ratings_csv, votes_csv
from lorafleet.core.arena.records import Entrant, Ratings, Shown
from lorafleet.core.errors import InvalidRequest, PairNotFound, StorageUnavailable
from lorafleet.core.generation import MAX_SEED, GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.ranges import short
from lorafleet.core.registry import Resolved, drawn
from lorafleet.serve.arena_schemas import HEX_PATTERN, PairBody, PairReply, VoteBody, VoteReply
from lorafleet.serve.body import read_body
from lorafleet.serve.openapi import MAY_FAIL, errors, json_body
from lorafleet.serve.routes.adapters import admin_only
from lorafleet.serve.runs import Run
from lorafleet.serve.service import Service

if TYPE_CHECKING:
    from lorafleet.core.arena.store import Store

VOTE_BYTES: Final = 4 << 10
PAIR_BYTES: Final = 64 << 10
MAX_POOL_CHARS: Final = 200
THREADS: Final = 4
CSV: Final = "text/csv; charset=utf-8"
VERSION_DIGITS: Final = 12
T = TypeVar("T")
# For the document: they are checked here, so that what is wrong gets the one error shape.
SessionInQuery = Annotated[
    str | None, Query(json_schema_extra={"pattern": HEX_PATTERN}, description="left out: a new one begins")
]
PoolInQuery = Annotated[
    str | None, Query(json_schema_extra={"maxLength": MAX_POOL_CHARS}, description="left out: all pools")
]
FormatInQuery = Annotated[str, Query(json_schema_extra={"enum": ["json", "csv"]})]


class Votes:
    """The store for an event loop: opened when it is first asked, whose tables are then brought up to date."""

    def __init__(self, config: ArenaConfig) -> None:
        self._config = config
        self._threads = ThreadPoolExecutor(THREADS, "arena")
        self._lock = threading.Lock()
        self._store: Store | None = None

    async def ask(self, question: Callable[["Store"], T]) -> T:
        """Raises StorageUnavailable."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: question(self._opened()))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            if self._store is not None:
                self._store.close()

    def _opened(self) -> "Store":
        with self._lock:
            if self._store is None:
                try:
                    from lorafleet.core.arena.store import open_store
                except ModuleNotFoundError as error:
                    raise StorageUnavailable(
                        f"votes need {error.name}, which is not installed: pip install 'lorafleet[arena]'"
                    ) from error
                self._store = open_store(self._config)
            return self._store


def add(app: FastAPI, service: Service) -> None:
    app.state.votes = votes = Votes(service.settings.arena)
    admin = [Depends(admin_only(service.settings.admin_key))]

    @app.get("/v1/arena/pair", tags=["arena"], response_model=PairReply, responses=errors(404, 422, 503))
    async def next_pair(session: SessionInQuery = None, pool: PoolInQuery = None) -> Response:
        """Two pictures of one prompt and seed by different systems, which it does not name. One of those with the
        fewest votes that the session has not voted on."""
        if session is not None and not re.fullmatch(HEX_PATTERN, session):
            raise InvalidRequest(f"session must match {HEX_PATTERN}, not {short(session)}", param="session")
        wanted = _pool(pool)
        return _reply(await votes.ask(lambda store: store.draw(session, wanted)))

    @app.post(
        "/v1/arena/pairs",
        tags=["arena"],
        response_model=PairReply,
        responses=errors(*MAY_FAIL),
        openapi_extra=json_body(PairBody),
    )
    async def make_pair(http: Request) -> Response:
        """Two pictures made now, by two versions that share the requests of one alias. Only this session sees them, and
        they are not kept; the vote says which versions they were."""
        body = await read_body(http, PairBody, PAIR_BYTES)
        registry = service.fleet.registry
        versions = _two(await service.fleet.ask(lambda: registry.choices(body.adapter)), body.adapter)
        seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
        pngs = await _pictures(service, [body.request(version, seed) for version in versions])
        first, second = (
            Entrant(_system(version, body.weight), body.prompt, seed, png)
            for version, png in zip(versions, pngs, strict=True)
        )
        return _reply(await votes.ask(lambda store: store.add_live(body.session, (first, second))))

    @app.post(
        "/v1/arena/votes",
        tags=["arena"],
        status_code=201,
        responses=errors(400, 404, 409, 413, 415, 422, 503),
        openapi_extra=json_body(VoteBody),
    )
    async def vote(http: Request) -> VoteReply:
        """A session's answer to a pair that it was shown. There is one, and it stays."""
        body = await read_body(http, VoteBody, VOTE_BYTES)
        await votes.ask(lambda store: store.vote(body.session, body.pair, body.choice))
        return VoteReply(pair=body.pair, choice=body.choice)

    @app.get(
        "/v1/arena/ratings",
        tags=["arena"],
        response_model=Ratings,
        responses={200: {"content": {"text/csv": {}}}, **errors(422, 503)},
    )
    async def ratings(pool: PoolInQuery = None, format: FormatInQuery = "json") -> Ratings | Response:
        """Ratings with 95 % intervals from all votes, or those of a pool: a Bradley-Terry model with ties."""
        if format not in ("json", "csv"):
            raise InvalidRequest(f"format must be json or csv, not {short(format)}", param="format")
        wanted = _pool(pool)
        found = await votes.ask(lambda store: _rated(store, wanted))
        return found if format == "json" else Response(ratings_csv(found.systems), media_type=CSV)

    @app.get(
        "/v1/arena/votes",
        tags=["arena"],
        dependencies=admin,
        response_class=Response,
        responses={200: {"content": {"text/csv": {}}}, **errors(401, 403, 422, 503)},
    )
    async def export(pool: PoolInQuery = None) -> Response:
        """All votes as CSV, systems and prompts named: for who has the admin key."""
        wanted = _pool(pool)
        return Response(await votes.ask(lambda store: votes_csv(store.votes(wanted))), media_type=CSV)


async def _pictures(service: Service, requests: Sequence[GenerationRequest]) -> list[bytes]:
    """One PNG of each, made at the same time; all are called off when one fails or the caller leaves."""
    works = [(await service.accept(request))[1] for request in requests]
    runs: list[Run] = []
    try:
        for work in works:
            runs.append(await service.start(work, is_detailed=False))
        return [(await run.result()).images[0] for run in runs]
    finally:
        for run in runs:
            run.let_go()


def _two(choices: Sequence[Resolved], reference: str) -> tuple[Manifest, Manifest]:
    """Two versions of those that an alias names, drawn by their shares."""
    if len(choices) < 2:
        raise PairNotFound(
            f"adapter must be an alias that names several versions, {reference} means one: "
            "`lorafleet adapters alias NAME ALIAS VERSION=WEIGHT VERSION=WEIGHT` splits it",
            param="adapter",
        )
    first = drawn(choices)
    rest = [choice for choice in choices if choice is not first]
    left = sum(choice.share for choice in rest)
    second = drawn([replace(choice, share=choice.share / left) for choice in rest])
    return first.manifest, second.manifest


def _system(version: Manifest, weight: float) -> str:
    name = f"{version.name}@{version.version[:VERSION_DIGITS]}"
    return name if weight == 1 else f"{name}:{weight:g}"


def _pool(pool: str | None) -> str | None:
    if pool is not None and len(pool) > MAX_POOL_CHARS:
        raise InvalidRequest(f"pool must be at most {MAX_POOL_CHARS} characters, got {len(pool)}", param="pool")
    return None if pool is None else pool.replace("\0", "")  # which PostgreSQL's text cannot hold


def _reply(shown: Shown) -> Response:
    reply = PairReply(
        session=shown.session,
        pair=shown.pair,
        prompt=shown.prompt,
        left=base64.b64encode(shown.left).decode(),
        right=base64.b64encode(shown.right).decode(),
        remaining=shown.remaining,
    )
    return JSONResponse(reply.model_dump(), headers={"cache-control": "no-store"})


def _rated(store: "Store", pool: str | None) -> Ratings:
    from lorafleet.core.arena.ratings import rate

    return rate(store.votes(pool))
