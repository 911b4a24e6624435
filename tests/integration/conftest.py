"""One service for the whole session: real Ray, real HTTP, the embedded base."""

import socket
from collections.abc import Iterator

import httpx
import pytest

from lorafleet.serve.config import ServeSettings
from lorafleet.serve.launch import running_service

SETTINGS = {"max_queued": 2, "request_timeout_s": 15.0, "replica_cpus": 0.2, "max_body_bytes": 100_000}


@pytest.fixture(scope="session")
def service_url() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = ServeSettings.model_validate({**SETTINGS, "port": port, "base": {"device": "cpu"}})
    with running_service(settings) as address:
        yield address


@pytest.fixture(scope="session")
def http(service_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service_url, timeout=60) as client:
        yield client
