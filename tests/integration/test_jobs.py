"""Jobs over real Ray and HTTP, and what becomes of them when processes are killed."""

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

APPLE = {"prompt": "red apple on a blue background", "steps": 4, "seed": 7}
LONG = {"prompt": "x", "steps": 30, "seed": 3, "num_images": 2}


def ended(http: httpx.Client, job_id: str, timeout_s: float = 60.0) -> dict[str, Any]:
    deadline = time.monotonic() + timeout_s
    job: dict[str, Any] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):  # no gateway listens
            reply = http.get(f"/v1/jobs/{job_id}")
            if reply.status_code == 200:
                job = reply.json()
                if job["status"] not in ("queued", "running"):
                    return job
        time.sleep(0.2)
    raise AssertionError(job)


def running(http: httpx.Client, job_id: str) -> None:
    while http.get(f"/v1/jobs/{job_id}").json()["progress"] == 0:
        time.sleep(0.02)


def process_of(deployment: str) -> int:
    """The id of our own service's process that runs it; other services may run beside it."""
    home = os.environ["LORAFLEET_HOME"].encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = home in (process / "environ").read_bytes()
            if is_ours and f"ServeReplica:lorafleet:{deployment}".encode() in (process / "cmdline").read_bytes():
                return int(process.name)
        except OSError:
            continue  # it ended, or is not ours
    pytest.skip("no /proc on this system, or Ray names its processes otherwise")


def test_a_job_can_be_watched_and_gives_the_same_image(http: httpx.Client) -> None:
    plain = http.post("/generate", json=APPLE).json()["images"]
    reply = http.post("/v1/jobs", json=APPLE)
    assert reply.status_code == 202
    events = http.get(f"{reply.headers['location']}/events").text
    assert [line for line in events.splitlines() if line.startswith("event: ")][-2:] == ["event: image", "event: done"]
    job = ended(http, reply.json()["id"])
    assert [image["b64_json"] for image in job["images"]] == plain


def test_a_job_is_called_off_within_a_step(http: httpx.Client) -> None:
    job_id = http.post("/v1/jobs", json={**LONG, "steps": 150, "num_images": 8}).json()["id"]
    running(http, job_id)
    assert http.delete(f"/v1/jobs/{job_id}").json()["status"] == "cancelled"
    start = time.monotonic()
    assert http.post("/generate", json=APPLE).status_code == 200
    assert time.monotonic() - start < 3


def test_jobs_outlive_their_replica(http: httpx.Client) -> None:
    events = {"accept": "text/event-stream"}
    with http.stream("POST", "/generate", json={**LONG, "steps": 150}, headers=events) as reply:
        lines = reply.iter_lines()
        assert any("event: step" in line for line in lines)
        jobs = [http.post("/v1/jobs", json={**LONG, "seed": seed}).json()["id"] for seed in (3, 4)]
        running(http, jobs[0])
        os.kill(process_of("Replica"), signal.SIGKILL)
        rest = "\n".join(lines)
    assert "event: error" in rest
    assert '"code": "not_ready"' in rest  # what was being waited for may be tried again
    assert http.get("/readyz").status_code in (200, 503)
    for job_id in jobs:
        job = ended(http, job_id)
        assert (job["status"], len(job["images"])) == ("succeeded", 2)
        assert job["retries"] <= 1
    assert ended(http, jobs[0])["retries"] == 1


@pytest.mark.nightly
def test_jobs_outlive_the_gateway(http: httpx.Client, jobs: dict[str, object]) -> None:
    if not jobs:
        pytest.skip("no redis-server on this machine: jobs are in the gateway's memory")
    done = http.post("/v1/jobs", json=APPLE).json()["id"]
    images = ended(http, done)["images"]
    left = http.post("/v1/jobs", json=LONG).json()["id"]
    running(http, left)
    os.kill(process_of("Gateway"), signal.SIGKILL)
    assert ended(http, done)["images"] == images
    job = ended(http, left)
    assert (job["status"], len(job["images"])) == ("succeeded", 2)
