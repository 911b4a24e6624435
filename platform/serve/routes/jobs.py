"""Work that is asked for later: taken in, watched, called off."""

from collections.abc import AsyncIterator
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from lorafleet.serve import sse
from lorafleet.serve.body import read_body
from lorafleet.serve.job_store import Job, Told
from lorafleet.serve.jobs import Jobs
from lorafleet.serve.openapi import errors, json_body
from lorafleet.serve.schemas import GenerateBody, JobImage, JobReply
from lorafleet.serve.service import Service
from lorafleet.serve.terms import terms_of

RESUME_HEADER: Final = "last-event-id"
STATUSES: Final = {"done": "succeeded", "error": "failed", "cancelled": "cancelled", "queued": "queued"}


def add(app: FastAPI, service: Service, jobs: Jobs) -> None:
    settings = service.settings

    @app.post(
        "/v1/jobs",
        tags=["jobs"],
        status_code=202,
        response_model=JobReply,
        responses=errors(400, 404, 409, 413, 415, 422, 429, 503),
        openapi_extra=json_body(GenerateBody),
    )
    async def create(http: Request) -> Response:
        """A generation to be done later. With an idempotency key, the job that it made the first time."""
        body = await read_body(http, GenerateBody, settings.max_body_bytes)
        _, work = await service.accept(
            body.request(), base=body.base, upload=body.upload(), start=body.start, previews=body.previews
        )
        job = await jobs.submit(work, terms_of(http))
        reply = _reply(*await jobs.get(job.id))
        return JSONResponse(reply.model_dump(), status_code=202, headers={"location": f"/v1/jobs/{job.id}"})

    @app.get("/v1/jobs/{job_id}", tags=["jobs"], responses=errors(404, 422, 503))
    async def show(job_id: str) -> JobReply:
        """How far it is; its images as they are done."""
        return _reply(*await jobs.get(job_id))

    @app.get(
        "/v1/jobs/{job_id}/events",
        tags=["jobs"],
        response_class=Response,
        responses={200: {"content": {sse.MEDIA_TYPE: {}}}, **errors(404, 422, 503)},
    )
    async def events(http: Request, job_id: str) -> Response:
        """What has happened and happens until it ends with `done`, `error` or `cancelled`. Each event has an id; with
        `Last-Event-ID` only those after that one come."""
        await jobs.get(job_id)
        return sse.EventStream(_encoded(jobs.follow(job_id, http.headers.get(RESUME_HEADER))))

    @app.delete("/v1/jobs/{job_id}", tags=["jobs"], responses=errors(404, 422, 503))
    async def cancel(job_id: str) -> JobReply:
        """Calls it off within a step; one that has ended stays as it is."""
        await jobs.cancel(job_id)
        return _reply(*await jobs.get(job_id))


async def _encoded(told: AsyncIterator[Told]) -> AsyncIterator[bytes]:
    async for number, event in told:
        yield sse.encode(event["type"], event, number)


def _reply(job: Job, told: list[Told]) -> JobReply:
    """The job as its events leave it."""
    status, steps, last = "queued", dict[int, tuple[int, int]](), dict[str, Any]()
    images, retries = [], 0
    for _, last in told:
        status = STATUSES.get(last["type"], "running")
        if last["type"] == "step":
            steps[last["image"]] = (last["done"], last["total"])
        elif last["type"] == "image":
            images.append(JobImage(index=last["image"], seed=last["seed"], b64_json=last["png"]))
        elif last["type"] == "retrying":
            retries, steps = retries + 1, {}
    total = max((total for _, total in steps.values()), default=0)
    count = job.work["request"].get("num_images", 1)
    return JobReply(
        id=job.id,
        status=status,  # type: ignore[arg-type] # one of STATUSES or "running"
        created_at=job.created_unix_s,
        progress=min(1.0, sum(done for done, _ in steps.values()) / (total * count)) if total else 0.0,
        retries=retries,
        images=sorted(images, key=lambda image: image.index),
        timings=last.get("timings", {}),
        warnings=last.get("warnings", []),
        error=last.get("error"),
    )
