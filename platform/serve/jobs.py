"""Work that is taken in now, done when its turn comes, and asked for later."""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import aclosing, suppress
from typing import Any, Final

from lorafleet.core.errors import IdempotencyConflict, JobNotFound, LorafleetError, NotReady, Overloaded
from lorafleet.core.metrics import JOB_RETRIES, JOBS, JOBS_ACCEPTED, JOBS_ENDED, OK, Result
from lorafleet.serve import logs
from lorafleet.serve.admission import MIN_RETRY_AFTER_S
from lorafleet.serve.config import JobSettings
from lorafleet.serve.events import to_json
from lorafleet.serve.job_store import ENDS, FIRST, LEASE_S, MAX_ATTEMPTS, Job, JobStore, Told, make_store
from lorafleet.serve.runs import Run
from lorafleet.serve.service import Service
from lorafleet.serve.terms import KEY_HEADER, Terms
from lorafleet.serve.work import Work

logger = logging.getLogger(__name__)

READ_S: Final = 30.0
CANCEL_AGAIN_S: Final = 0.5
LOOK_S: Final = 5.0  # how often a gateway looks for jobs that another one left behind
CANCELLED: Final = {"type": "cancelled"}
RESULTS: Final[dict[str, Result]] = {"done": OK, "error": "error", "cancelled": "cancelled"}
_NUMBER: Final = re.compile(r"^[0-9]{1,20}(-[0-9]{1,20})?$")


class Jobs:
    """Runs jobs, some at a time, in the order in which they came. For one event loop."""

    def __init__(self, service: Service, settings: JobSettings, replicas: int, store: JobStore | None = None) -> None:
        self._service = service
        self._recorder = service.recorder
        self._settings = settings
        self._store = store or make_store(settings)
        self._turns = asyncio.Semaphore(settings.running * replicas)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._runs: dict[str, Run] = {}
        self._looking: asyncio.Task[None] | None = None

    async def submit(self, work: Work, terms: Terms) -> Job:
        """Raises Overloaded, IdempotencyConflict, NotReady."""
        self.look_for_abandoned()
        content = work.to_json()
        # One key, one id: that the job exists already is found out by asking for it.
        job = Job(terms.key[:32] if terms.key else uuid.uuid4().hex, int(time.time()), content)
        if terms.key is not None:
            with suppress(JobNotFound):
                return self._same(await self._store.get(job.id), work)
        if len(self._tasks) - len(self._runs) >= self._settings.max_waiting:
            raise Overloaded(
                f"{len(self._tasks)} jobs are running or waiting, all that are accepted: try again later",
                retry_after_s=max(MIN_RETRY_AFTER_S, self._service.backlog_s),
                reason="jobs_full",
            )
        if not await self._store.create(job):  # by the same key, a moment ago
            return self._same(await self._store.get(job.id), work)
        await self._store.append(job.id, {"type": "queued"})
        self._recorder.add(JOBS_ACCEPTED)
        self._begin(job)
        return job

    async def get(self, job_id: str) -> tuple[Job, list[Told]]:
        """The job and all that has happened to it. Raises JobNotFound, NotReady."""
        return await self._store.get(job_id), await self._store.read(job_id, FIRST, 0.0)

    async def follow(self, job_id: str, after: str | None) -> AsyncIterator[Told]:
        """Its events, from the one after number `after` on until the last; a number that is none means the first."""
        number = after if after and _NUMBER.match(after) else FIRST
        while True:
            told = await self._store.read(job_id, number, READ_S)
            for number, event in told:
                yield number, event
                if event["type"] in ENDS:
                    return
            if not told and await self._has_ended(job_id):  # they had seen the end already
                return

    async def cancel(self, job_id: str) -> None:
        """It ends within a step, wherever it runs; one that has ended stays as it is. Raises JobNotFound, NotReady."""
        await self._store.get(job_id)
        if await self._store.append(job_id, CANCELLED):
            self._recorder.add(JOBS_ENDED, result=RESULTS["cancelled"])
        if job_id in self._tasks:
            self._tasks[job_id].cancel()

    def measure(self) -> None:
        """Sets the gauges; from any thread."""
        running = len(self._runs)
        self._recorder.set(JOBS, running, state="running")
        self._recorder.set(JOBS, max(0, len(self._tasks) - running), state="waiting")

    def look_for_abandoned(self) -> None:
        """From now on, now and then: jobs whose gateway is gone are taken over."""
        if self._looking is None:
            self._looking = _detached(self._look())

    async def close(self) -> None:
        """Stops all work; what had not ended is still there if the store is, for another gateway to go on with."""
        await _stopped([*self._tasks.values(), *([self._looking] if self._looking else [])])
        await self._store.close()

    # ---- inside ----

    def _same(self, known: Job, work: Work) -> Job:
        if self._service.asked_fingerprint(Work.from_json(known.work)) != self._service.asked_fingerprint(work):
            raise IdempotencyConflict(
                f"{KEY_HEADER} was used for another request: send that one again, or a new key", param=KEY_HEADER
            )
        return known

    async def _has_ended(self, job_id: str) -> bool:
        told = await self._store.read(job_id, FIRST, 0.0)
        return bool(told) and told[-1][1]["type"] in ENDS

    def _begin(self, job: Job) -> None:
        task = self._tasks[job.id] = _detached(self._work(job))
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def _work(self, job: Job) -> None:
        logs.note(job_id=job.id)
        leasing = asyncio.create_task(self._lease(job.id))
        try:
            async with self._turns:
                end = await self._attempt(job)
                if await self._store.append(job.id, end):
                    self._recorder.add(JOBS_ENDED, result=RESULTS[end["type"]])
        except LorafleetError as error:  # the store is away: who looks for abandoned jobs finds this one
            logger.warning("job %s cannot be noted: %s", job.id, error.message)
        finally:
            await _stopped([leasing])

    async def _attempt(self, job: Job) -> dict[str, Any]:
        """Does it; its last event."""
        tries = MAX_ATTEMPTS - await self._store.attempt(job.id) + 1
        if tries <= 0:
            return self._error(NotReady("the service went away twice while it worked on this job: send it again"))
        if self._service.known_model is None:
            with suppress(NotReady):
                await self._service.model()
        run = self._runs[job.id] = self._service.start_job(Work.from_json(job.work), tries)
        try:
            async with aclosing(run.follow()) as events:  # type: ignore[type-var] # it is a generator
                async for _, event in events:
                    content = to_json(event)
                    if content["type"] == "done":
                        return content
                    if content["type"] == "retrying":
                        await self._store.attempt(job.id)
                        self._recorder.add(JOB_RETRIES)
                    if not await self._store.append(job.id, content):
                        return CANCELLED
        except Exception as error:  # the process edge: the job ends with it
            return self._error(error)
        finally:
            run.let_go()
            self._runs.pop(job.id, None)
        raise AssertionError("good work ends with done")

    def _error(self, error: Exception) -> dict[str, Any]:
        return {"type": "error", **self._service.error_body(error)}

    async def _lease(self, job_id: str) -> None:
        while True:
            with suppress(LorafleetError):
                await self._store.lease(job_id)
            await asyncio.sleep(LEASE_S / 3)

    async def _look(self) -> None:
        logs.begin(None)
        while True:
            try:
                for job in await self._store.abandoned():
                    if job.id not in self._tasks:
                        self._begin(job)
            except NotReady as error:
                logger.warning("%s", error.message)
            await asyncio.sleep(LOOK_S)


async def _stopped(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended. Once may not do: what redis sends with, `asyncio.wait_for`, loses in Python
    3.11 a cancellation that comes as it is done (github.com/python/cpython/issues/86296)."""
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.error("a job's task failed", exc_info=error)


def _detached(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that the request which starts it does not take along when it ends."""
    return asyncio.create_task(work, context=logs.detached())
