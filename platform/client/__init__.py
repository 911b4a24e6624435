"""A typed client for a running Lorafleet, for threads and for event loops. No torch, no Ray.

`http` and `async_http` are the two clients, `adapters` their parts for the registry; `exchange` what they share,
without the network; `events` and `results` what comes back. Errors are those of `lorafleet.core.errors`.
"""

from lorafleet.client.async_http import AsyncClient
from lorafleet.client.events import Cancelled, Done, Downloading, Event, Image, Queued, Retrying, Started, Step
from lorafleet.client.http import Client
from lorafleet.client.results import (
    AdapterAlias,
    AdapterDetails,
    AdapterEntry,
    GenerateResult,
    JobFailure,
    JobImage,
    JobStatus,
)

__all__ = [
    "AdapterAlias",
    "AdapterDetails",
    "AdapterEntry",
    "AsyncClient",
    "Cancelled",
    "Client",
    "Done",
    "Downloading",
    "Event",
    "GenerateResult",
    "Image",
    "JobFailure",
    "JobImage",
    "JobStatus",
    "Queued",
    "Retrying",
    "Started",
    "Step",
]
