"""What Grafana's dashboards show; dashboards.py writes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

S: Final = 'namespace=~"$namespace", service=~"$service"'
RATE: Final = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A graph (or a number, or a table of the latest values) of queries: (PromQL, legend)."""

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: Literal["graph", "number", "table"] = "graph"
    width: int = 8
    runbook: str | None = None


@dataclass(frozen=True)
class Dashboard:
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]
    anchor: str = ""

    @property
    def uid(self) -> str:
        return f"lorafleet-{self.title.lower().replace(' and ', '-')}"


def counted(metric: str, by: str, more: str = "") -> str:
    return f"sum by ({by}) (rate(ray_lorafleet_{metric}{{{S}{more}}}{RATE}))"


def quantile(share: float, metric: str, by: str = "", more: str = "") -> str:
    return (
        f"histogram_quantile({share}, sum by ({', '.join(filter(None, ('le', by)))}) "
        f"(rate(ray_lorafleet_{metric}_bucket{{{S}{more}}}{RATE})))"
    )


def quantiles(metric: str, more: str = "") -> list[tuple[str, str]]:
    return [(quantile(share, metric, more=more), f"p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)]


def gauge(metric: str, by: str, how: str = "sum") -> str:
    return f"{how} by ({by}) (ray_lorafleet_{metric}{{{S}}})"


def job(metric: str, more: str = "") -> str:
    """A measurement of a job: with `ray_` in front where Ray hosts it, without where it has its own port."""
    return f'{{__name__=~"(ray_)?lorafleet_{metric}", {S}{more}}}'


IMAGES_ONLY: Final = ', route=~"/generate|/v1/images/.+|/models/.+", result="ok"'

OVERVIEW: Final = Dashboard(
    "Overview",
    "Whether the service keeps its word, and what is in its way.",
    [
        (
            "Now",
            [
                Panel(
                    "Replicas ready",
                    "Replicas that have their model loaded and whose engine moves.",
                    "short",
                    [(f"sum(ray_lorafleet_replica_ready{{{S}}})", "ready")],
                    "number",
                    4,
                    "replicas",
                ),
                Panel(
                    "Images per second",
                    "Finished images, all replicas.",
                    "short",
                    [(f"sum(lorafleet:images:rate5m{{{S}}})", "images/s")],
                    "number",
                    4,
                ),
                Panel(
                    "Errors",
                    "Share of requests of the last five minutes that got a 5xx; what clients get wrong (4xx) or leave "
                    "(499) is in neither number.",
                    "percentunit",
                    [(f"max(lorafleet:request_errors:ratio_rate5m{{{S}}})", "errors")],
                    "number",
                    4,
                    "availability",
                ),
                Panel(
                    "Slow images",
                    "Share of good answers of the last five minutes that took longer than the objective's bound.",
                    "percentunit",
                    [(f"max(lorafleet:slow_requests:ratio_rate5m{{{S}}})", "slow")],
                    "number",
                    4,
                    "latency",
                ),
                Panel(
                    "Backlog",
                    "Seconds that the work taken in and not done is estimated to take.",
                    "s",
                    [(f"max(ray_lorafleet_gateway_backlog_seconds{{{S}}})", "backlog")],
                    "number",
                    4,
                    "backlog",
                ),
                Panel(
                    "Alerts",
                    "Alerts of this project that fire.",
                    "short",
                    [('count(ALERTS{alertname=~"Lorafleet.+", alertstate="firing"}) or vector(0)', "firing")],
                    "number",
                    4,
                ),
            ],
        ),
        (
            "Service levels",
            [
                Panel(
                    "Availability: burn rate",
                    "How many times faster than allowed errors use up the month's budget. Alerts: 14.4 over 1 h, 6 "
                    "over 6 h, 1 over 3 d.",
                    "short",
                    [
                        (
                            f"max(lorafleet:request_errors:ratio_rate{window}{{{S}}}) "
                            "/ scalar(1 - lorafleet:slo_availability:objective)",
                            window,
                        )
                        for window in ("1h", "6h", "3d")
                    ],
                    width=12,
                    runbook="availability",
                ),
                Panel(
                    "Latency: burn rate",
                    "The same for images that take longer than the bound.",
                    "short",
                    [
                        (
                            f"max(lorafleet:slow_requests:ratio_rate{window}{{{S}}}) "
                            "/ scalar(1 - lorafleet:slo_latency:objective)",
                            window,
                        )
                        for window in ("1h", "6h", "3d")
                    ],
                    width=12,
                    runbook="latency",
                ),
            ],
        ),
        (
            "Requests",
            [
                Panel(
                    "By outcome",
                    "HTTP requests a second that have ended; outcome is ok, cancelled or the error's code.",
                    "reqps",
                    [(counted("gateway_requests_total", "outcome"), "{{outcome}}")],
                ),
                Panel(
                    "By route",
                    "HTTP requests a second.",
                    "reqps",
                    [(counted("gateway_requests_total", "route"), "{{route}}")],
                ),
                Panel(
                    "Latency of images",
                    "Seconds from a request's arrival to the last byte of its answer, good answers of the synchronous "
                    "routes.",
                    "s",
                    quantiles("gateway_request_seconds", IMAGES_ONLY),
                    runbook="latency",
                ),
                Panel(
                    "In flight",
                    "HTTP requests whose answer has not ended, and jobs.",
                    "short",
                    [
                        (f"sum(ray_lorafleet_gateway_requests_in_flight{{{S}}})", "requests"),
                        (gauge("gateway_jobs", "state"), "jobs {{state}}"),
                    ],
                ),
                Panel(
                    "Refused",
                    "Requests refused for want of room.",
                    "reqps",
                    [(counted("gateway_rejections_total", "reason"), "{{reason}}")],
                    runbook="backlog",
                ),
                Panel(
                    "Cache",
                    "Requests that images made before could answer.",
                    "reqps",
                    [(counted("gateway_cache_lookups_total", "result"), "{{result}}")],
                ),
            ],
        ),
        (
            "Work",
            [
                Panel(
                    "Backlog",
                    "Seconds of work in front of gateways and replicas; replicas are added by the latter.",
                    "s",
                    [
                        (gauge("gateway_backlog_seconds", "replica", "max"), "gateway {{replica}}"),
                        (gauge("replica_backlog_seconds", "replica", "max"), "replica {{replica}}"),
                    ],
                    runbook="backlog",
                ),
                Panel(
                    "Jobs",
                    "Asynchronous jobs a minute: taken in, ended by result, and begun anew because a replica was lost.",
                    "short",
                    [
                        (f"60 * {counted('gateway_jobs_accepted_total', 'service')}", "taken in"),
                        (f"60 * {counted('gateway_jobs_ended_total', 'result')}", "{{result}}"),
                        (f"60 * {counted('gateway_job_retries_total', 'service')}", "begun anew"),
                    ],
                    runbook="jobs",
                ),
                Panel(
                    "Replicas",
                    "Replicas by whether they are ready, requests that they hold, and whether the adapter registry "
                    "is silent (1).",
                    "short",
                    [
                        (gauge("replica_ready", "replica", "max"), "replica {{replica}} ready"),
                        (gauge("replica_requests_in_flight", "replica", "max"), "replica {{replica}} requests"),
                        (f"max(ray_lorafleet_gateway_registry_silent{{{S}}})", "registry silent"),
                    ],
                    runbook="replicas",
                ),
            ],
        ),
    ],
)

ENGINE: Final = Dashboard(
    "Engine and adapters",
    "What replicas do with their batches and slots.",
    [
        (
            "Batches",
            [
                Panel("Step", "Seconds of a denoising step of a batch.", "s", quantiles("engine_step_seconds")),
                Panel(
                    "Images per step",
                    "Images that take a step together, on average (Ray's sums are approximate), and the share of a "
                    "batch's rows that are used at the median.",
                    "short",
                    [
                        (
                            f"sum(rate(ray_lorafleet_engine_step_images_sum{{{S}}}{RATE})) "
                            f"/ sum(rate(ray_lorafleet_engine_step_images_count{{{S}}}{RATE}))",
                            "images",
                        ),
                        (quantile(0.5, "engine_step_occupancy_ratio"), "used rows"),
                    ],
                ),
                Panel(
                    "Stages",
                    "Seconds that a finished image spent in a stage, 95th percentile. queue: for its adapters and its "
                    "turn; denoise: its neighbours' steps included.",
                    "s",
                    [(quantile(0.95, "engine_stage_seconds", "stage"), "{{stage}}")],
                    runbook="latency",
                ),
                Panel(
                    "Images",
                    "Images that have ended, by outcome.",
                    "short",
                    [(counted("engine_images_total", "outcome"), "{{outcome}}")],
                ),
                Panel(
                    "Compiled graphs",
                    "Graphs that torch.compile has made; they do not grow once a replica is ready.",
                    "short",
                    [(gauge("engine_compiled_graphs", "replica", "max"), "replica {{replica}}")],
                    runbook="replicas",
                ),
                Panel(
                    "Routing",
                    "What the replica that a request was sent to had of its adapters. spread: a busier one had them.",
                    "reqps",
                    [(counted("router_choices_total", "choice"), "{{choice}}")],
                    runbook="adapters",
                ),
            ],
        ),
        (
            "Slots",
            [
                Panel(
                    "Fills by need",
                    "Share of the adapters that images ask for which have to be copied into a slot first.",
                    "percentunit",
                    [(f"lorafleet:slot_fills:ratio_rate10m{{{S}}}", "{{service}}")],
                    runbook="adapters",
                ),
                Panel(
                    "Slot traffic",
                    "Adapters a second: there already, copied from CPU memory, evicted for another one, failed.",
                    "short",
                    [
                        (counted("engine_slot_hits_total", "service"), "there already"),
                        (counted("engine_host_hits_total", "service"), "from CPU memory"),
                        (counted("engine_slot_evictions_total", "service"), "evicted"),
                        (counted("engine_slot_fill_failures_total", "service"), "failed"),
                    ],
                    runbook="adapters",
                ),
                Panel(
                    "Filling a slot",
                    "Seconds to copy an adapter into a slot; reading its file left out.",
                    "s",
                    quantiles("engine_slot_fill_seconds"),
                ),
                Panel(
                    "Slots",
                    "Slots in all, used by images in work, and pinned.",
                    "short",
                    [(gauge("engine_slots", "replica, state", "max"), "replica {{replica}} {{state}}")],
                ),
                Panel(
                    "Adapters at hand",
                    "In slots, and in CPU memory.",
                    "short",
                    [(gauge("engine_resident_adapters", "replica, tier", "max"), "replica {{replica}} {{tier}}")],
                ),
                Panel(
                    "CPU memory of adapters",
                    "Bytes of adapters in CPU memory.",
                    "bytes",
                    [(gauge("engine_host_bytes", "replica", "max"), "replica {{replica}}")],
                ),
            ],
        ),
        (
            "Adapters",
            [
                Panel(
                    "Most used",
                    "Requests and jobs a second by adapter, the ten most used; of all, the first 100 versions are told "
                    "apart.",
                    "reqps",
                    [
                        (
                            f"topk(10, {counted('gateway_adapter_uses_total', 'adapter, version')})",
                            "{{adapter}}@{{version}}",
                        )
                    ],
                    width=12,
                ),
                Panel(
                    "Failures by adapter",
                    "Requests and jobs a second that ended with an error, by adapter.",
                    "reqps",
                    [
                        (
                            "topk(10, " + counted("gateway_adapter_uses_total", "adapter", ', result="error"') + ")",
                            "{{adapter}}",
                        )
                    ],
                    width=12,
                    runbook="adapters",
                ),
                Panel(
                    "Download time",
                    "Seconds to fetch an adapter that requests wait for.",
                    "s",
                    quantiles("replica_download_seconds"),
                    runbook="registry",
                ),
                Panel(
                    "Downloads",
                    "Bytes a second, and downloads a second by result.",
                    "Bps",
                    [
                        (counted("replica_download_bytes_total", "service"), "bytes"),
                        (counted("replica_download_seconds_count", "result"), "{{result}}"),
                    ],
                    runbook="registry",
                ),
                Panel(
                    "Preload problems",
                    "Adapters of the preload list that are not loaded.",
                    "short",
                    [(gauge("replica_preload_problems", "replica", "max"), "replica {{replica}}")],
                    runbook="adapters",
                ),
            ],
        ),
    ],
    "adapters",
)

TRAINING: Final = Dashboard(
    "Training",
    "Runs that are going on.",
    [
        (
            "Runs",
            [
                Panel("Steps", "Steps taken.", "short", [(job("train_step"), "{{instance}}")]),
                Panel("Epoch", "Epoch of the last step, from 0.", "short", [(job("train_epoch"), "{{instance}}")]),
                Panel(
                    "Throughput",
                    "Images a second of the last step, all workers.",
                    "short",
                    [(job("train_images_per_second"), "{{instance}}")],
                ),
                Panel(
                    "Loss",
                    "Of the last step, and on held-out images at eight fixed timesteps.",
                    "short",
                    [
                        (job("train_loss"), "{{instance}} step"),
                        (job("train_validation_loss"), "{{instance}} held out"),
                    ],
                ),
                Panel(
                    "CLIP score",
                    "Mean CLIP score of the last sample pictures.",
                    "short",
                    [(job("train_clip_score"), "{{instance}}")],
                ),
                Panel("Learning rate", "Of the last step.", "sci", [(job("train_learning_rate"), "{{instance}}")]),
                Panel(
                    "Gradient norm",
                    "Before clipping.",
                    "short",
                    [(job("train_gradient_norm"), "{{instance}}")],
                    width=12,
                ),
                Panel(
                    "Skipped steps",
                    "Steps that changed nothing because the loss or its gradient was NaN or infinite.",
                    "short",
                    [(job("train_skipped_steps_total"), "{{instance}}")],
                    width=12,
                    runbook="training",
                ),
            ],
        )
    ],
    "training",
)

E: Final = ', suite=~"$suite", adapter=~"$adapter"'
EVALUATION: Final = Dashboard(
    "Evaluation",
    "CLIP scores of prompt suites by adapter. Evaluations come and go: the last value of a day counts.",
    [
        (
            "Scores",
            [
                Panel(
                    "CLIP score",
                    "Mean CLIP score of a suite's images, 0 to 100; base is the model without adapters.",
                    "short",
                    [(f"lorafleet:clip_score:last1d{{{S}{E}}}", "{{suite}} {{adapter}}")],
                    width=24,
                    runbook="evaluation",
                ),
                Panel(
                    "Latest",
                    "The last score of each suite and adapter.",
                    "short",
                    [(f"lorafleet:clip_score:last1d{{{S}{E}}}", "")],
                    "table",
                    12,
                ),
                Panel(
                    "Against the best of two weeks",
                    "Change to the best score of the two weeks before; below -2 an alert fires.",
                    "short",
                    [
                        (
                            f"lorafleet:clip_score:last1d{{{S}{E}}} "
                            f"- max_over_time(lorafleet:clip_score:last1d{{{S}{E}}}[14d])",
                            "",
                        )
                    ],
                    "table",
                    12,
                    "evaluation",
                ),
            ],
        )
    ],
    "evaluation",
)

GPU: Final = Dashboard(
    "GPU",
    "GPUs and nodes, as Ray's agents see them.",
    [
        (
            "GPUs",
            [
                Panel(
                    "Utilisation",
                    "Share of time in which a kernel ran.",
                    "percent",
                    [(f"ray_node_gpus_utilization{{{S}}}", "{{instance}} GPU {{GpuIndex}}")],
                ),
                Panel(
                    "Memory used",
                    "Share of a GPU's memory.",
                    "percentunit",
                    [
                        (
                            f"ray_node_gram_used{{{S}}} / (ray_node_gram_used{{{S}}} + ray_node_gram_available{{{S}}})",
                            "{{instance}} GPU {{GpuIndex}}",
                        )
                    ],
                    runbook="gpu-memory",
                ),
                Panel(
                    "Memory",
                    "In use.",
                    "decmbytes",
                    [(f"ray_node_gram_used{{{S}}}", "{{instance}} GPU {{GpuIndex}}")],
                    runbook="gpu-memory",
                ),
            ],
        ),
        (
            "Nodes",
            [
                Panel("CPU", "Of all cores.", "percent", [(f"ray_node_cpu_utilization{{{S}}}", "{{instance}}")]),
                Panel(
                    "Memory",
                    "Used, and what there is.",
                    "bytes",
                    [
                        (f"ray_node_mem_used{{{S}}}", "{{instance}} used"),
                        (f"ray_node_mem_total{{{S}}}", "{{instance}} all"),
                    ],
                ),
                Panel(
                    "Memory of processes",
                    "Resident bytes by Ray's component; Serve's replicas are by name.",
                    "bytes",
                    [(f"sum by (Component) (ray_component_rss_bytes{{{S}}})", "{{Component}}")],
                ),
                Panel("Disk", "Used.", "percent", [(f"ray_node_disk_utilization_percentage{{{S}}}", "{{instance}}")]),
                Panel(
                    "Network",
                    "Bytes a second.",
                    "Bps",
                    [
                        (f"ray_node_network_receive_speed{{{S}}}", "{{instance}} in"),
                        (f"ray_node_network_send_speed{{{S}}}", "{{instance}} out"),
                    ],
                ),
                Panel(
                    "Object store",
                    "Ray's shared memory, which holds images on their way.",
                    "bytes",
                    [(f"sum by (instance) (ray_object_store_memory{{{S}}})", "{{instance}}")],
                ),
            ],
        ),
    ],
    "gpu-memory",
)

ALL: Final = (OVERVIEW, ENGINE, TRAINING, EVALUATION, GPU)
