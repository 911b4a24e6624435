"""Every metric of this project: its name, kind, labels and buckets stand here and nowhere else.

A name is `lorafleet_<part>_<thing>_<unit>`; the parts of serving are gateway, router, replica and engine, that of
training is train, that of evaluation eval. Whatever Ray hosts sends them through Ray, which puts `ray_`
in front and adds labels of its own; each of serving then has `REPLICA_LABEL` too.

Labels are bounded: routes, HTTP's methods, statuses, error codes and words listed here; names of adapters by
`FirstComers`. A histogram's `_sum` is approximate through Ray 2.60, and so is an average (Ray sends counts of buckets,
and takes the middle of each): buckets and counts are exact.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Final, Generic, Literal, Protocol, TypeVar

Kind = Literal["counter", "gauge", "histogram"]
Result = Literal["ok", "error", "cancelled", "cached"]
"""How it ended: `cancelled` means that whoever asked left or called it off."""

REPLICA_LABEL: Final = "replica"
"""The number that Ray Serve gives a process of a deployment, 0 to n-1; a new process takes over a lost one's."""
MAX_COUNTED_ADAPTERS: Final = 100
"""Versions of adapters that are told apart in one process, the first to be used; later ones are OTHER."""
OTHER: Final = "other"
OK: Final[Result] = "ok"
CANCELLED: Final[Result] = "cancelled"
CLIENT_LEFT: Final = 499
"""nginx's status for a client that left before its answer; no client sees it."""

BUCKETS: Final = (
    *(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0),
    *(7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 120.0, 300.0),
)
"""Of requests and stages: a picture takes from a few hundredths of a second to a minute, and may wait minutes."""
STEP_BUCKETS: Final = (
    *(0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 2.0, 5.0),
)
FILL_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
DOWNLOAD_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
EIGHTHS: Final = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)


@dataclass(frozen=True)
class Metric:
    """`buckets`: upper bounds of a histogram's, included; one without bound comes on top."""

    name: str
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# ---- the gateway: requests, jobs, what stands before the replicas ----

REQUESTS: Final = Metric(
    "lorafleet_gateway_requests_total",
    "counter",
    "HTTP requests that have ended. outcome: ok, cancelled (the client left, status 499) or the error's code; status: "
    "of an error inside a stream, the one that it would have had.",
    ("route", "method", "status", "outcome"),
)
REQUEST_SECONDS: Final = Metric(
    "lorafleet_gateway_request_seconds",
    "histogram",
    "Seconds from an HTTP request's arrival to the last byte of its answer, a stream's too. result: ok, error, "
    "cancelled.",
    ("route", "method", "result"),
    BUCKETS,
)
REQUESTS_IN_FLIGHT: Final = Metric(
    "lorafleet_gateway_requests_in_flight", "gauge", "HTTP requests whose answer has not ended."
)
REJECTIONS: Final = Metric(
    "lorafleet_gateway_rejections_total",
    "counter",
    "Requests refused for want of room. reason: queue_full, too_late (it would not be done in time), jobs_full, "
    "slots_busy (no adapter slot became free).",
    ("reason",),
)
ADAPTER_USES: Final = Metric(
    "lorafleet_gateway_adapter_uses_total",
    "counter",
    "Requests and jobs by adapter and the first 12 digits of its version, once for each adapter that they combine; the "
    f"first {MAX_COUNTED_ADAPTERS} versions are told apart, the rest is other. result: ok, error, cancelled, cached.",
    ("adapter", "version", "result"),
)
ADAPTER_SECONDS: Final = Metric(
    "lorafleet_gateway_adapter_seconds",
    "histogram",
    "Seconds of requests and jobs that ended well, by adapter and version as above, where the request's alias names "
    "several versions and one was drawn: what a canary is judged by.",
    ("adapter", "version"),
    BUCKETS,
)
CACHE_LOOKUPS: Final = Metric(
    "lorafleet_gateway_cache_lookups_total",
    "counter",
    "Requests that images made before could answer. result: hit, miss.",
    ("result",),
)
BACKLOG_SECONDS: Final = Metric(
    "lorafleet_gateway_backlog_seconds", "gauge", "Seconds that the work taken in and not done is estimated to take."
)
REGISTRY_SILENT: Final = Metric(
    "lorafleet_gateway_registry_silent", "gauge", "1 if the adapter registry did not answer the last time, else 0."
)
JOBS_ACCEPTED: Final = Metric("lorafleet_gateway_jobs_accepted_total", "counter", "Jobs taken in.")
JOBS_ENDED: Final = Metric(
    "lorafleet_gateway_jobs_ended_total",
    "counter",
    "Jobs by how they ended. result: ok, error, cancelled.",
    ("result",),
)
JOB_RETRIES: Final = Metric(
    "lorafleet_gateway_job_retries_total", "counter", "Jobs begun anew because their replica was lost."
)
JOBS: Final = Metric(
    "lorafleet_gateway_jobs", "gauge", "Jobs that have not ended. state: waiting, running.", ("state",)
)

# ---- the router, in the gateway's process ----

ROUTER_CHOICES: Final = Metric(
    "lorafleet_router_choices_total",
    "counter",
    "Requests by what the replica that they were sent to had of their adapters. choice: slot, host (in CPU memory), "
    "cold (nobody had them), spread (a busier replica had them), none (no adapters).",
    ("choice",),
)

# ---- a replica ----

REPLICA_READY: Final = Metric(
    "lorafleet_replica_ready", "gauge", "1 if the replica has its model loaded and its engine moves, else 0."
)
REPLICA_REQUESTS: Final = Metric(
    "lorafleet_replica_requests_in_flight", "gauge", "Requests that the replica works on or holds waiting."
)
REPLICA_BACKLOG_SECONDS: Final = Metric(
    "lorafleet_replica_backlog_seconds", "gauge", "Seconds that these are estimated to take; what autoscaling goes by."
)
PRELOAD_PROBLEMS: Final = Metric(
    "lorafleet_replica_preload_problems", "gauge", "Adapters of the preload list that are not loaded, for some reason."
)
DOWNLOAD_SECONDS: Final = Metric(
    "lorafleet_replica_download_seconds",
    "histogram",
    "Seconds to fetch an adapter that requests wait for from the registry. result: ok, error.",
    ("result",),
    DOWNLOAD_BUCKETS,
)
DOWNLOAD_BYTES: Final = Metric(
    "lorafleet_replica_download_bytes_total", "counter", "Bytes of adapters fetched from the registry for requests."
)

# ---- its engine ----

IMAGES: Final = Metric(
    "lorafleet_engine_images_total",
    "counter",
    "Images that have ended. outcome: ok, or the error's code; cancelled and deadline_exceeded among them.",
    ("outcome",),
)
STAGE_SECONDS: Final = Metric(
    "lorafleet_engine_stage_seconds",
    "histogram",
    "Seconds that a finished image spent in a stage. stage: queue (for its adapters and its turn), encode, denoise "
    "(waits for its neighbours' steps included), decode.",
    ("stage",),
    BUCKETS,
)
STEP_SECONDS: Final = Metric(
    "lorafleet_engine_step_seconds", "histogram", "Seconds of a denoising step of a batch.", (), STEP_BUCKETS
)
STEP_IMAGES: Final = Metric(
    "lorafleet_engine_step_images",
    "histogram",
    "Images that took a step together.",
    (),
    (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0),
)
STEP_OCCUPANCY: Final = Metric(
    "lorafleet_engine_step_occupancy_ratio",
    "histogram",
    "Rows of a step's batch that images use, of those that it was filled up to.",
    (),
    EIGHTHS,
)
SLOT_HITS: Final = Metric(
    "lorafleet_engine_slot_hits_total", "counter", "Adapters of images that were in a slot or on their way there."
)
HOST_HITS: Final = Metric(
    "lorafleet_engine_host_hits_total", "counter", "Fills of slots from adapters that were in CPU memory."
)
SLOT_FILL_SECONDS: Final = Metric(
    "lorafleet_engine_slot_fill_seconds",
    "histogram",
    "Seconds to copy an adapter into a slot; reading its file left out.",
    (),
    FILL_BUCKETS,
)
SLOT_FILL_FAILURES: Final = Metric(
    "lorafleet_engine_slot_fill_failures_total", "counter", "Adapters that could not be put into a slot."
)
SLOT_EVICTIONS: Final = Metric(
    "lorafleet_engine_slot_evictions_total", "counter", "Adapters that left their slot for another one."
)
RESIDENT_ADAPTERS: Final = Metric(
    "lorafleet_engine_resident_adapters", "gauge", "Adapters at hand. tier: slot, host (CPU memory).", ("tier",)
)
SLOTS: Final = Metric(
    "lorafleet_engine_slots",
    "gauge",
    "Adapter slots. state: total, leased (images in work use them), pinned.",
    ("state",),
)
HOST_BYTES: Final = Metric("lorafleet_engine_host_bytes", "gauge", "Bytes of adapters in CPU memory.")
COMPILED_GRAPHS: Final = Metric(
    "lorafleet_engine_compiled_graphs",
    "gauge",
    "Graphs that torch.compile has made in the process; it does not grow once the replica is ready.",
)

# ---- training: of one run, in its process or its first worker's; no labels ----

TRAIN_STEP: Final = Metric("lorafleet_train_step", "gauge", "Steps taken.")
TRAIN_EPOCH: Final = Metric("lorafleet_train_epoch", "gauge", "Epoch of the last step, from 0.")
TRAIN_LOSS: Final = Metric("lorafleet_train_loss", "gauge", "Loss of the last step, weights of the objective included.")
TRAIN_LEARNING_RATE: Final = Metric("lorafleet_train_learning_rate", "gauge", "Learning rate of the last step.")
TRAIN_GRADIENT_NORM: Final = Metric(
    "lorafleet_train_gradient_norm", "gauge", "Norm of the last step's gradient, before clipping."
)
TRAIN_IMAGES_PER_SECOND: Final = Metric(
    "lorafleet_train_images_per_second", "gauge", "Images a second of the last step, all workers."
)
TRAIN_SKIPPED_STEPS: Final = Metric(
    "lorafleet_train_skipped_steps_total",
    "counter",
    "Steps that changed nothing because the loss or its gradient was NaN or infinite.",
)
TRAIN_VALIDATION_LOSS: Final = Metric(
    "lorafleet_train_validation_loss", "gauge", "Loss on held-out images at eight fixed timesteps."
)
TRAIN_CLIP_SCORE: Final = Metric("lorafleet_train_clip_score", "gauge", "Mean CLIP score of the last sample pictures.")

# ---- evaluation: of the last one of a suite; an adapter is a system's name, of which a run has few ----

EVAL_CLIP_SCORE: Final = Metric(
    "lorafleet_eval_clip_score",
    "gauge",
    "Mean CLIP score over the prompts of a suite. adapter: the system's name, base for the base model alone.",
    ("suite", "adapter"),
)

ALL: Final = tuple(value for value in list(globals().values()) if isinstance(value, Metric))


class Recorder(Protocol):
    """Where measurements go. For every thread; never raises. `labels` are exactly the metric's own."""

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        """Counts; an amount of 0 says nothing."""

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """The gauge's value until the next one."""

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """One more for a histogram."""


class Unrecorded:
    """A Recorder for where nobody looks."""

    def add(self, metric: Metric, amount: float = 1.0, **labels: str) -> None:
        return

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        return

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        return


Value = TypeVar("Value", bound=Hashable)


class FirstComers(Generic[Value]):
    """Tells the first so many values apart, so that a label made of them is bounded."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[Value] = set()

    def knows(self, value: Value) -> bool:
        """Whether it is one of them, now that it has come."""
        if value not in self._known and len(self._known) < self._most:
            self._known.add(value)
        return value in self._known
