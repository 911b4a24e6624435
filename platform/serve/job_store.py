"""Where jobs and what happened to them are kept: in memory, or in a Redis that outlives the gateway.

A job's events are the only record of how it goes; the last one says how it ended. Their numbers are opaque texts that
grow, as Redis makes them; FIRST is before all.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from lorafleet.core.errors import JobNotFound, NotReady
from lorafleet.serve.config import JobSettings
from lorafleet.serve.redis import BLOCK_S, connect

Told = tuple[str, dict[str, Any]]
"""An event's number and what it says."""
FIRST: Final = "0"
ENDS: Final = frozenset({"done", "error", "cancelled"})
LEASE_S: Final = 15.0
MAX_ATTEMPTS: Final = 2
OPEN: Final = "lorafleet:jobs:open"


@dataclass(frozen=True)
class Job:
    """`work` is a Work as JSON."""

    id: str
    created_unix_s: int
    work: dict[str, Any] = field(repr=False)


class JobStore(Protocol):
    """Every method raises JobNotFound for an id that it does not know, and NotReady if it cannot be reached."""

    async def create(self, job: Job) -> bool:
        """False, and nothing is changed, if there is one with that id."""

    async def get(self, job_id: str) -> Job: ...

    async def append(self, job_id: str, event: dict[str, Any]) -> bool:
        """False, and nothing is added, when the job has ended."""

    async def read(self, job_id: str, after: str, wait_s: float) -> list[Told]:
        """Events after that number; if there are none, those that come within about `wait_s`."""

    async def attempt(self, job_id: str) -> int:
        """Notes that the job is begun; for the how many-th time."""

    async def lease(self, job_id: str) -> None:
        """Whoever calls this works on the job for the next LEASE_S seconds."""

    async def abandoned(self) -> list[Job]:
        """Jobs that nobody works on any more although they have not ended; now the caller does."""

    async def close(self) -> None: ...


def make_store(settings: JobSettings) -> JobStore:
    """Raises ConfigError."""
    return RedisJobs(settings) if settings.redis_url else MemoryJobs(settings)


@dataclass
class _Kept:
    job: Job
    events: list[dict[str, Any]] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    attempts: int = 0
    size: int = 0
    ended_at: float | None = None


class MemoryJobs:
    """For one event loop. Jobs that have not ended are never dropped."""

    def __init__(self, settings: JobSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._max_bytes = settings.ttl_s, settings.max_bytes
        self._clock = clock
        self._jobs: OrderedDict[str, _Kept] = OrderedDict()  # the one that ended last is the last
        self._ended_bytes = 0

    async def create(self, job: Job) -> bool:
        self._forget()
        if job.id in self._jobs:
            return False
        self._jobs[job.id] = _Kept(job)
        return True

    async def get(self, job_id: str) -> Job:
        self._forget()
        return self._kept(job_id).job

    async def append(self, job_id: str, event: dict[str, Any]) -> bool:
        kept = self._kept(job_id)
        if kept.ended_at is not None:
            return False
        kept.events.append(event)
        kept.size += sum(len(value) for value in event.values() if isinstance(value, str))
        if event["type"] in ENDS:
            kept.ended_at = self._clock()
            self._ended_bytes += kept.size
            self._jobs.move_to_end(job_id)
        kept.changed.set()
        kept.changed = asyncio.Event()
        return True

    async def read(self, job_id: str, after: str, wait_s: float) -> list[Told]:
        kept = self._kept(job_id)
        number = int(after.partition("-")[0])
        if number >= len(kept.events) and kept.ended_at is None:
            try:
                async with asyncio.timeout(wait_s):
                    await kept.changed.wait()
            except TimeoutError:
                return []
        return [(str(i + 1), event) for i, event in enumerate(kept.events) if i >= number]

    async def attempt(self, job_id: str) -> int:
        kept = self._kept(job_id)
        kept.attempts += 1
        return kept.attempts

    async def lease(self, job_id: str) -> None:
        self._kept(job_id)

    async def abandoned(self) -> list[Job]:
        return []  # whoever worked on them has taken this memory along

    async def close(self) -> None:
        return

    def _kept(self, job_id: str) -> _Kept:
        if job_id not in self._jobs:
            raise _unknown(job_id)
        return self._jobs[job_id]

    def _forget(self) -> None:
        for job_id, kept in list(self._jobs.items()):
            if kept.ended_at is None:
                continue
            if self._clock() < kept.ended_at + self._ttl_s and self._ended_bytes <= self._max_bytes:
                break
            self._ended_bytes -= kept.size
            del self._jobs[job_id]


class RedisJobs:
    """Keys: `lorafleet:job:<id>` the job, `:events` a stream, `:end` once it has ended, `:attempts`, `:lease`; and
    `lorafleet:jobs:open`, the ids of those that have not ended. All of a job's keys expire with it."""

    def __init__(self, settings: JobSettings) -> None:
        assert settings.redis_url is not None
        self._redis = connect(settings.redis_url, "jobs.redis_url")
        self._ttl_s = round(settings.ttl_s)

    async def create(self, job: Job) -> bool:
        content = json.dumps({"id": job.id, "created_unix_s": job.created_unix_s, "work": job.work})
        async with _reached():
            if not await self._redis.set(_key(job.id), content, nx=True):
                return False
        async with _reached(), self._redis.pipeline() as pipe:
            pipe.set(_key(job.id, "lease"), 1, ex=round(LEASE_S))
            pipe.sadd(OPEN, job.id)
            await pipe.execute()
        return True

    async def get(self, job_id: str) -> Job:
        async with _reached():
            content = await self._redis.get(_key(job_id))
        if content is None:
            raise _unknown(job_id)
        return Job(**json.loads(content))

    async def append(self, job_id: str, event: dict[str, Any]) -> bool:
        is_end = event["type"] in ENDS
        async with _reached():
            if is_end and not await self._redis.set(_key(job_id, "end"), 1, nx=True, ex=self._ttl_s):
                return False
            if not is_end and await self._redis.exists(_key(job_id, "end")):
                return False
            async with self._redis.pipeline() as pipe:
                pipe.xadd(_key(job_id, "events"), {"event": json.dumps(event)})
                if is_end:
                    pipe.srem(OPEN, job_id)
                    for part in ("", "events", "attempts", "lease"):
                        pipe.expire(_key(job_id, part), self._ttl_s)
                await pipe.execute()
        return True

    async def read(self, job_id: str, after: str, wait_s: float) -> list[Told]:
        await self.get(job_id)
        deadline = time.monotonic() + wait_s
        async with _reached():
            if await self._redis.exists(_key(job_id, "end")):
                deadline = 0.0
            while True:
                block_s = min(BLOCK_S, deadline - time.monotonic())
                found = await self._redis.xread({_key(job_id, "events"): after}, block=max(1, round(1000 * block_s)))
                if found or time.monotonic() >= deadline:
                    break
        entries = found[0][1] if found else []
        return [(number.decode(), json.loads(fields[b"event"])) for number, fields in entries]

    async def attempt(self, job_id: str) -> int:
        async with _reached():
            return int(await self._redis.incr(_key(job_id, "attempts")))

    async def lease(self, job_id: str) -> None:
        async with _reached():
            await self._redis.set(_key(job_id, "lease"), 1, ex=round(LEASE_S))

    async def abandoned(self) -> list[Job]:
        found = []
        async with _reached():
            for job_id in await self._redis.smembers(OPEN):
                if await self._redis.set(_key(job_id.decode(), "lease"), 1, nx=True, ex=round(LEASE_S)):
                    content = await self._redis.get(_key(job_id.decode()))
                    if content is None:
                        await self._redis.srem(OPEN, job_id)
                    else:
                        found.append(Job(**json.loads(content)))
        return found

    async def close(self) -> None:
        await self._redis.aclose()


def _key(job_id: str, part: str = "") -> str:
    return f"lorafleet:job:{job_id}:{part}" if part else f"lorafleet:job:{job_id}"


@asynccontextmanager
async def _reached() -> AsyncIterator[None]:
    from redis.exceptions import RedisError

    try:
        yield
    except (RedisError, OSError) as error:
        raise NotReady("the store of jobs cannot be reached: try again later") from error


def _unknown(job_id: str) -> JobNotFound:
    return JobNotFound(f"no job {job_id!r}: it never was, or ended long ago", param="id")
