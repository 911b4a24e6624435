"""When a canary passes, breaches or is watched on, and what is read of metrics."""

import contextlib
import itertools
import json
import math
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from lorafleet.core.errors import StorageUnavailable
from lorafleet.eval.canary import Limits, Tally, judge, watch, wilson
from lorafleet.eval.canary_metrics import Pages, Prometheus

LIMITS = Limits(watch_s=60, requests=50)


def tally(requests: int, errors: int = 0, slow: int = 0) -> Tally:
    return Tally(requests, errors, {1.0: requests - errors - slow, 10.0: slow, math.inf: 0})


@pytest.mark.parametrize(
    ("stable", "canary", "is_over", "state", "reason"),
    [
        (tally(500), tally(60), True, "passed", "0 of 60 requests failed"),
        (tally(500), tally(60), False, "watching", ""),
        (tally(500, errors=50), tally(60, errors=6), True, "passed", "6 of 60"),  # as bad as before
        (tally(20), tally(5, errors=5), False, "breached", "5 of 5 requests failed, of the version before 0 of 20"),
        (tally(20), tally(4, errors=4), False, "watching", ""),  # too few to tell from bad luck
        (tally(500), tally(60, errors=1), True, "passed", "1 of 60"),
        (tally(500), tally(60, errors=8), False, "breached", "8 of 60"),
        (tally(500), tally(60, slow=30), False, "breached", "30 of 60 requests took longer than 1.5 s"),
        (tally(500), tally(60, slow=3), True, "passed", "95 % took at most 1 s"),
        (tally(500, slow=200), tally(60, slow=30), True, "passed", "0 of 60"),  # slow as before
        (tally(500), tally(49), True, "breached", "the candidate had 49 of the 50 requests"),
        (tally(10), tally(90), True, "breached", "the version before had 10 of the 50 requests"),
        (tally(0), tally(0), False, "watching", ""),
    ],
)
def test_a_canary_is_judged_by_errors_and_slow_requests(
    stable: Tally, canary: Tally, is_over: bool, state: str, reason: str
) -> None:
    found = judge(stable, canary, LIMITS, is_over=is_over)
    assert (found.state, reason in found.reason) == (state, True), found.reason


def test_the_watch_ends_at_the_first_breach_or_when_the_time_is_up() -> None:
    class Growing:
        def __init__(self, errors: int) -> None:
            self._looks = itertools.count()
            self._errors = errors

        def read(self) -> Mapping[str, Tally]:
            looks = next(self._looks)
            return {"old": tally(90 * looks), "new": tally(10 * looks, errors=self._errors * looks)}

    for errors, state, seconds in ((0, "passed", 60.0), (9, "breached", 5.0)):
        now = [0.0]

        def sleep(seconds: float, now: list[float] = now) -> None:
            now[0] += seconds

        judgement, stable, canary, took = watch(
            Growing(errors), "old", "new", LIMITS, every_s=5.0, clock=lambda now=now: now[0], sleep=sleep
        )
        assert (judgement.state, took) == (state, seconds)
        assert stable.requests == 9 * canary.requests == 90 * (seconds / 5)


def test_wilsons_interval_is_that_of_the_paper() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 5)[0] == pytest.approx(0.5655, abs=1e-4)


class Page(BaseHTTPRequestHandler):
    text = ""

    def do_GET(self) -> None:
        self.send_response(200 if self.text else 500)
        self.end_headers()
        self.wfile.write(self.text.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def page() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/metrics"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def exported(ok: int, error: int, below: tuple[int, int], process: str = "a") -> str:
    labels = f'adapter="plush",version="abc",Pid="{process}"'
    name, seconds = "ray_lorafleet_gateway_adapter_uses_total", "ray_lorafleet_gateway_adapter_seconds_bucket"
    return (
        f"# TYPE ray_lorafleet_gateway_adapter_uses counter\n"
        f'{name}{{{labels},result="ok"}} {ok}\n{name}{{{labels},result="error"}} {error}\n'
        f'{name}{{{labels},result="cached"}} 77\n{name}{{adapter="other",version="abc",result="ok"}} 99\n'
        f"# TYPE ray_lorafleet_gateway_adapter_seconds histogram\n"
        f'{seconds}{{{labels},le="0.5"}} {below[0]}\n{seconds}{{{labels},le="+Inf"}} {below[1]}\n'
    )


def test_pages_are_counted_from_the_first_look_over_restarts(page: str) -> None:
    Page.text = exported(100, 5, (90, 100))
    pages = Pages([page], "plush", sleep=lambda _: None)
    Page.text = exported(110, 6, (95, 110))
    assert pages.read() == {"abc": Tally(11, 1, {0.5: 5, math.inf: 5})}
    Page.text = exported(3, 1, (3, 3))  # a new process
    assert pages.read() == {"abc": Tally(15, 2, {0.5: 8, math.inf: 5})}
    Page.text += exported(2, 0, (0, 2), process="b")  # one more
    assert pages.read() == {"abc": Tally(17, 2, {0.5: 8, math.inf: 7})}
    Page.text = ""
    with pytest.raises(StorageUnavailable, match="cannot be read"):
        pages.read()


def test_a_server_that_is_no_prometheus_is_said(page: str) -> None:
    Page.text = "<html>"
    with pytest.raises(StorageUnavailable, match="does not answer as a Prometheus"):
        Prometheus(page, "plush", sleep=lambda _: None)


def test_a_prometheus_says_what_has_come_since_the_watch_began(
    page: str, tmp_path: Path, require: Callable[[str], str], unused_port: int
) -> None:
    Page.text = exported(100, 5, (90, 100))
    target = page.removeprefix("http://").removesuffix("/metrics")
    scrape = [{"job_name": "gateway", "static_configs": [{"targets": [target]}]}]
    settings = {"global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"}, "scrape_configs": scrape}
    (tmp_path / "prometheus.yml").write_text(json.dumps(settings))
    options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    command = [require("prometheus"), *options, f"--web.listen-address=127.0.0.1:{unused_port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{unused_port}"
        until(lambda: httpx.get(f"{url}/-/ready").is_success)
        until(lambda: bool(httpx.get(f"{url}/api/v1/query", params={"query": "up == 1"}).json()["data"]["result"]))
        time.sleep(2)  # so that there is a sample from before the watch, which looks back by whole seconds
        prometheus = Prometheus(url, "plush")
        Page.text = exported(110, 6, (95, 110)) + exported(2, 1, (0, 2), process="b")  # one that is new
        expected = Tally(14, 2, {0.5: 5, math.inf: 7})
        until(lambda: prometheus.read() == {"abc": expected})
        Page.text = exported(3, 1, (3, 3)) + exported(2, 1, (0, 2), process="b")  # the first has begun anew
        until(lambda: prometheus.read()["abc"].requests == 4 + 3)
    finally:
        process.terminate()
        process.wait()


def until(holds: Callable[[], bool]) -> None:
    give_up_at = time.monotonic() + 30
    while True:
        with contextlib.suppress(httpx.TransportError):
            if holds():
                return
        assert time.monotonic() < give_up_at
        time.sleep(0.1)
