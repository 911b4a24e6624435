"""One request in traces and log lines, from the gateway to its images."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.adapter_file import base_targets, check_against
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_write import write_adapter

APPLE = {"prompt": "red apple on a blue background", "steps": 2, "seed": 3}
STAGES = ["queue", "encode", "denoise", "decode"]
ARRIVED_S = 20.0
Spans = list[tuple[str, Any]]


@pytest.fixture(scope="module")
def adapter(service_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What names its version, as log lines do."""
    targets = base_targets(BaseConfig())
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    write_adapter(random_adapter(targets, 2, modules=r"unet\.mid.+attn1.+"), file)
    manifest = open_registry(RegistryConfig()).push("traced", file, check_against(targets))
    return f"traced@{manifest.version[:12]}"


def waited_for(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + ARRIVED_S
    while not (found := look()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def trace(collector: Any, trace_id: str, spans: int) -> Spans:
    """All spans of it, once there are so many."""
    of_it = lambda: [each for each in collector.spans if each[1].trace_id.hex() == trace_id]  # noqa: E731
    assert waited_for(lambda: len(of_it()) >= spans), [span.name for _, span in of_it()]
    return of_it()


def named(spans: Spans, name: str) -> list[Any]:
    return [span for _, span in spans if span.name == name]


def attributes(span: Any) -> dict[str, Any]:
    def value(of: Any) -> Any:
        kind = of.WhichOneof("value")
        return [value(each) for each in of.array_value.values] if kind == "array_value" else getattr(of, kind)

    return {attribute.key: value(attribute.value) for attribute in span.attributes}


def lines(**wanted: str) -> Iterator[dict[str, Any]]:
    """Log lines of all serving processes that say this; other tests may have started a Ray of their own since."""
    for file in (Path(os.environ["LORAFLEET_HOME"]) / "ray").glob("session_2*/logs/worker-*.err"):
        for text in file.read_text().splitlines():
            if text.startswith("{"):
                line = json.loads(text)
                if wanted.items() <= line.items():
                    yield line


def test_a_request_is_one_trace_from_its_caller_to_its_images(http: httpx.Client, collector: Any, adapter: str) -> None:
    trace_id, caller = os.urandom(16).hex(), os.urandom(8).hex()
    headers = {"traceparent": f"00-{trace_id}-{caller}-01", "x-request-id": f"traced-{caller}"}
    asked = {**APPLE, "num_images": 2, "adapters": [{"name": "traced"}]}
    assert http.post("/generate", json=asked, headers=headers).status_code == 200
    spans = trace(collector, trace_id, 2 + 2 * 5)
    assert {(service, span.name) for service, span in spans} == {
        ("lorafleet-gateway", "POST /generate"),
        *(("lorafleet-replica", name) for name in ("generate", "image", *STAGES)),
    }
    ((server,), (generate,)) = named(spans, "POST /generate"), named(spans, "generate")
    assert server.parent_span_id.hex() == caller
    assert generate.parent_span_id == server.span_id
    about = {"lorafleet.request_id": f"traced-{caller}", "lorafleet.adapters": [adapter]}
    assert (
        attributes(server).items()
        >= {**about, "http.route": "/generate", "http.response.status_code": 200, "lorafleet.outcome": "ok"}.items()
    )
    images = named(spans, "image")
    assert [image.parent_span_id for image in images] == [generate.span_id] * 2
    assert {attributes(image)["lorafleet.image"] for image in images} == {0, 1}
    for image in images:
        assert attributes(image).items() >= {**about, "lorafleet.steps": 2}.items()
        stages = [span for _, span in spans if span.parent_span_id == image.span_id]
        assert [stage.name for stage in sorted(stages, key=lambda stage: stage.start_time_unix_nano)] == STAGES
        assert min(stage.start_time_unix_nano for stage in stages) >= server.start_time_unix_nano
        assert max(stage.end_time_unix_nano for stage in stages) <= server.end_time_unix_nano
        assert all(stage.end_time_unix_nano >= stage.start_time_unix_nano for stage in stages)


def test_streams_and_jobs_are_traced_too(http: httpx.Client, collector: Any) -> None:
    for path, headers in (("/generate", {"accept": "text/event-stream"}), ("/v1/jobs", {})):
        trace_id = os.urandom(16).hex()
        headers = {**headers, "traceparent": f"00-{trace_id}-{'1' * 16}-01"}
        reply = http.post(path, json=APPLE, headers=headers)
        spans = trace(collector, trace_id, 2 + 5)
        ((server,), (generate,)) = named(spans, f"POST {path}"), named(spans, "generate")
        assert generate.parent_span_id == server.span_id
        if path == "/v1/jobs":
            job = reply.json()["id"]
            assert (
                attributes(generate)["lorafleet.job_id"]
                == attributes(named(spans, "image")[0])["lorafleet.job_id"]
                == job
            )
            (line,) = waited_for(lambda job=job: list(lines(job_id=job, event="images made")))
            assert line["request_id"] == reply.headers["x-request-id"]


def test_errors_are_told_and_what_is_not_to_be_kept_is_not(http: httpx.Client, collector: Any) -> None:
    trace_id, unkept = os.urandom(16).hex(), os.urandom(16).hex()
    http.post("/generate", json=APPLE, headers={"traceparent": f"00-{unkept}-{'2' * 16}-00"})
    http.post("/generate", json={**APPLE, "steps": 0}, headers={"traceparent": f"00-{trace_id}-{'2' * 16}-01"})
    ((_, server),) = trace(collector, trace_id, 1)
    assert attributes(server)["lorafleet.outcome"] == "invalid_value"
    assert server.status.code == 0  # the client's fault is no error of the service
    assert [span for _, span in collector.spans if span.trace_id.hex() == unkept] == []


def test_every_log_line_of_a_request_has_its_id_on_both_sides(http: httpx.Client, adapter: str) -> None:
    reply = http.post("/generate", json={**APPLE, "adapters": [{"name": "traced"}]})
    request_id = reply.headers["x-request-id"]
    assert waited_for(lambda: len(list(lines(request_id=request_id))) >= 2)
    told = {line["logger"]: line for line in lines(request_id=request_id)}
    assert told.keys() == {"lorafleet.serve.edge", "lorafleet.serve.app"}
    for line in told.values():
        assert line["adapters"] == [adapter]
        assert len(line["trace_id"]) == 32
        assert line["level"] == "info"
        assert line["timestamp"].endswith("Z")
    assert told["lorafleet.serve.app"]["trace_id"] == told["lorafleet.serve.edge"]["trace_id"]
    assert told["lorafleet.serve.edge"].items() >= {"route": "/generate", "status": 200, "outcome": "ok"}.items()
