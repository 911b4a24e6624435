"""Events over real HTTP, and work that is called off when its client is gone."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

APPLE = {"prompt": "red apple on a blue background", "steps": 4, "seed": 7}
HEAVY = {"prompt": "x", "steps": 150, "num_images": 8, "width": 256, "height": 256}
EVENTS = {"accept": "text/event-stream"}


def events_of(reply: httpx.Response) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in reply.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_events_arrive_while_the_image_is_made(http: httpx.Client) -> None:
    plain = http.post("/generate", json=APPLE).json()["images"]
    with http.stream("POST", "/generate", json={**APPLE, "previews": 1}, headers=EVENTS) as reply:
        events = [(name, data, time.monotonic()) for name, data in events_of(reply)]
    names = [name for name, _, _ in events]
    assert names == ["queued", "started", "step", "step", "step", "step", "image", "done"]
    assert [data["png"] for name, data, _ in events if name == "image"] == plain
    assert [data["done"] for name, data, _ in events if "preview" in data] == [2]
    first_step, last_step = events[2][2], events[5][2]
    assert last_step - first_step > 0.02  # not all at once at the end


def test_what_fails_at_once_has_a_status(http: httpx.Client) -> None:
    reply = http.post("/generate", json={**APPLE, "width": 65}, headers=EVENTS)
    assert (reply.status_code, reply.json()["error"]["param"]) == (422, "width")


def test_who_leaves_a_stream_calls_the_work_off(http: httpx.Client) -> None:
    for _ in range(3):  # as many as there are places
        with http.stream("POST", "/generate", json=HEAVY, headers=EVENTS) as reply:
            for name, _ in events_of(reply):
                if name == "step":
                    break
    start = time.monotonic()
    while (status := http.post("/generate", json=APPLE).status_code) == 429:  # for as long as it takes to notice
        assert time.monotonic() - start < 1
    assert status == 200
    assert time.monotonic() - start < 3
