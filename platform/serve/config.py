"""Settings of the service. Imports neither torch nor ray."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.generation import AdapterReference
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.config import BaseConfig

CompileMode = Literal["none", "regional", "full"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
RoutingPolicy = Literal["affinity", "least_busy", "random"]


class BankConfig(BaseModel):
    """How many adapters are on the device at once, how large they may be, and how a row combines them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    slots: int = Field(default=8, ge=1, le=256, description="adapters on the device at once")
    max_rank: int = Field(
        default=64,
        ge=1,
        le=128,
        description="largest rank served; device memory and time of every row grow with it, so take the next of "
        "8, 16, 32, 64, 128 above your adapters' largest",
    )
    per_row: int = Field(default=4, ge=1, le=4, description="adapters that one image may combine")
    rows: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="rows of the largest UNet batch; guidance takes two an image; left out: as many as batches have",
    )
    text_rows: int = Field(default=2, ge=1, le=256, description="prompts of the largest text encoder batch")
    host_bytes: int = Field(
        default=4 << 30, ge=0, description="bytes of CPU memory for adapters that are ready to be copied to the device"
    )
    max_wait_s: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="seconds that an image waits while no slot gets free; then it is refused",
    )
    targets: str = Field(
        default=r"unet\..+\.attentions\..+|text_encoder(_2)?\..+",
        description="regular expression over module names; the linears it matches can take adapters",
    )

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"targets is no regular expression: {error}") from error
        return self


class EngineSettings(BaseModel):
    """How a replica shares its model between the images it works on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_batch: int = Field(
        default=8, ge=1, le=64, description="images that take a denoising step together, unless exact is on"
    )
    exact: bool | None = Field(
        default=None,
        description="images that do not depend on their neighbours in the batch, bit by bit; off, pixels may differ "
        "in the last bit and the throughput is higher; left out: on, except on a GPU",
    )
    exact_jobs: int = Field(
        default=1,
        ge=1,
        le=64,
        description="images in the one batch size of exact mode, filled up when there are fewer; more of them raise "
        "the throughput of many requests and the latency of a single one",
    )
    row_buckets: tuple[Annotated[int, Field(ge=1, le=128)], ...] | None = Field(
        default=None,
        description="row counts that a batch is filled up to, unless exact is on; an image has 2 rows, without "
        "guidance 1; left out: 2, 4 and eighths of the largest (powers of two with compile=full) where shapes are "
        "compiled or recorded, else batches are not filled up",
    )
    compile: CompileMode | None = Field(
        default=None,
        description="what torch.compile takes of the UNet before the start is done: none, regional (its repeated "
        "blocks, seconds a shape), full (a minute a shape, fastest); left out: regional on a GPU, else none",
    )
    cuda_graphs: bool | None = Field(
        default=None,
        description="record the UNet's kernels for each row count and size, so that none waits for the CPU; left out: "
        "on a GPU",
    )
    fp8: bool = Field(
        default=False,
        description="8-bit floats in the products of the base's transformers, beside adapters as they are: faster at "
        "large batches, and images change slightly; needs an NVIDIA GPU of compute capability 8.9 or more",
    )
    step_reuse: bool | None = Field(
        default=None,
        description="let requests say step_reuse above 1, which changes their images and no others; a tenth more to "
        "record at the start, and memory: with SDXL 21 MB a row of the largest batch and of each such image; "
        "left out: on where nothing is compiled or recorded, without base.low_memory",
    )
    warm_sizes: tuple[tuple[int, int], ...] | None = Field(
        default=None,
        description="sizes [width, height] in pixels that are compiled and recorded at the start; others work, slower; "
        "left out: the base's own",
    )
    max_skipped_turns: int = Field(
        default=100,
        ge=0,
        le=100_000,
        description="steps that an image lets more urgent ones go before it; then it takes one itself",
    )
    prompt_cache_entries: int = Field(
        default=256, ge=0, le=100_000, description="prompts whose embeddings are kept; 0.3 MB each with SDXL"
    )
    bank: BankConfig | None = Field(default=None, description="slots for adapters; left out: no adapters")
    background: bool | None = Field(
        default=None,
        description="encode prompts and decode images in a thread beside the steps; left out: on a GPU only",
    )

    @property
    def most_rows(self) -> int:
        """Rows of the largest UNet batch."""
        return max(2 * self.max_batch, 2 * self.exact_jobs, *(self.row_buckets or ()), 0)

    @model_validator(mode="after")
    def _check_bank(self) -> Self:
        rows = self.most_rows
        if self.bank is not None and self.bank.rows is not None and self.bank.rows < rows:
            raise ValueError(
                f"bank.rows={self.bank.rows}, but a batch may have {rows} rows (max_batch, exact_jobs, row_buckets): "
                f"set bank.rows={rows} or leave it out"
            )
        if self.bank is not None and self.bank.rows is None:
            object.__setattr__(self, "bank", self.bank.model_copy(update={"rows": rows}))
        return self


RedisUrl = Annotated[str, Field(pattern=r"^(redis|rediss|unix)://")]


class CacheSettings(BaseModel):
    """Images that are asked for again, seed and all, come from here."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_bytes: int = Field(
        default=256 << 20,
        ge=0,
        description="bytes of images that are kept in memory; with redis_url, of one answer; 0 switches it off",
    )
    redis_url: RedisUrl | None = Field(
        default=None, description="keep them there, such as redis://127.0.0.1:6379/0; left out: in memory"
    )
    ttl_s: float = Field(default=86_400.0, ge=1, description="seconds that Redis keeps them")


class JobSettings(BaseModel):
    """Work that is taken in now and asked for later: `POST /v1/jobs`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    running: int = Field(default=2, ge=1, le=1000, description="jobs that run at a time, per replica")
    max_waiting: int = Field(default=1000, ge=0, le=100_000, description="jobs that may wait; more get a 429")
    timeout_s: float = Field(
        default=3600.0, gt=0, le=86_400, description="seconds that a job may run, waiting left out"
    )
    ttl_s: float = Field(default=3600.0, ge=1, le=30 * 86_400, description="seconds that an ended job is kept")
    max_bytes: int = Field(
        default=512 << 20, ge=0, description="bytes of ended jobs that are kept in memory; the oldest go first"
    )
    redis_url: RedisUrl | None = Field(
        default=None, description="keep jobs there, over restarts of the gateway; left out: in memory"
    )


class Preload(BaseModel):
    """An adapter that replicas load before anybody asks for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: AdapterReference = Field(description="NAME, NAME@ALIAS or NAME@VERSION; what it means is looked up again")
    pin: bool = Field(default=False, description="keep it in a slot, whatever else is asked for")


class LiveSettings(BaseModel):
    """What can be changed while the service runs: Ray Serve's `user_config`, of gateway and replicas alike."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preload: tuple[Preload, ...] = Field(default=(), description="adapters that are loaded before they are asked for")
    max_queued: int = Field(
        default=32, ge=0, le=10_000, description="requests that may wait for a replica; more get a 429"
    )
    request_timeout_s: float = Field(
        default=300.0, gt=0, le=3600, description="seconds a request may take, waiting included; then it gets a 504"
    )


class RoutingSettings(BaseModel):
    """Which replica a request goes to: one that has its adapters, unless others are much less busy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: RoutingPolicy = Field(
        default="affinity",
        description="affinity: to who has the adapters, weighed against the work in front of each; least_busy: to who "
        "has the least work, random: to any of them, both whatever adapters they have",
    )
    slot_s: float = Field(
        default=4.0,
        ge=0,
        le=3600,
        description="seconds of work that a replica with the adapter in a slot may have more in front of it than "
        "another one; a hot adapter spreads to more replicas beyond",
    )
    host_s: float = Field(default=2.0, ge=0, le=3600, description="the same for an adapter in its CPU memory")
    stats_every_s: float = Field(
        default=1.0, gt=0, le=60, description="seconds between the replicas' reports of what they hold"
    )


class ScalingSettings(BaseModel):
    """How many replicas there are, by the seconds of work in front of them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(default=1, ge=0, le=64, description="0: none while nobody asks")
    max_replicas: int = Field(ge=1, le=64, description="never more")
    backlog_s: float = Field(
        default=10.0, gt=0, le=3600, description="seconds of work per replica that are held to be right"
    )
    upscale_delay_s: float = Field(default=10.0, ge=0, le=3600, description="seconds of too much work before one comes")
    downscale_delay_s: float = Field(
        default=300.0, ge=0, le=86_400, description="seconds of too little work before one goes"
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas={self.min_replicas} is above max_replicas={self.max_replicas}")
        return self


class TracingSettings(BaseModel):
    """Spans of requests for OpenTelemetry; its own variables (OTEL_TRACES_SAMPLER and so on) count too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s]+$",
        description="where a collector takes OTLP over HTTP, such as http://otel-collector:4318; needs the extra otel; "
        "left out: OTEL_EXPORTER_OTLP_ENDPOINT, and no traces without it",
    )


class ServeSettings(LiveSettings):
    """What is served, where, and how much of the machine it takes."""

    base: BaseConfig = Field(default_factory=BaseConfig, description="the base model")
    registry: RegistryConfig = Field(default_factory=RegistryConfig, description="where the adapters are")
    engine: EngineSettings = Field(
        default_factory=EngineSettings,
        description="batching; with slots for adapters, unless bank is null or base.low_memory is on",
    )
    routing: RoutingSettings = Field(default_factory=RoutingSettings, description="which replica works on what")
    host: str = Field(
        default="127.0.0.1",
        pattern=r"^[0-9A-Za-z.:-]+$",
        description="address to listen on; 127.0.0.1 is this machine only, 0.0.0.0 everyone who can reach it",
    )
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port to listen on")
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="TCP port of this machine, 127.0.0.1 only, where Prometheus finds /metrics of a Ray of our own; "
        "left out: a free one, told at the start; with ray_address the cluster's nodes have theirs",
    )
    direct_ingress: bool = Field(
        default=True,
        description="let a Ray of our own hand requests to the gateway's process itself; false: to Ray's proxy before "
        "it, which takes longer than all else that a request costs besides its images, but holds connections while a "
        "gateway that died comes back; no effect with ray_address",
    )
    replicas: int = Field(default=1, ge=1, le=64, description="copies of the model, each in a process of its own")
    replica_cpus: float = Field(
        default=0.5, gt=0, le=256, description="CPU cores that Ray reserves per replica; a fraction shares them"
    )
    replica_gpus: float | None = Field(
        default=None,
        ge=0,
        le=8,
        description="GPUs that Ray reserves per replica; left out: 1 where the base runs on CUDA, else 0",
    )
    replica_threads: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="CPU threads that one replica computes with; left out: all cores divided by the replicas",
    )
    scaling: ScalingSettings | None = Field(
        default=None, description="more and fewer replicas as the work asks for it; left out: always `replicas`"
    )
    drain_s: float = Field(
        default=60.0,
        ge=0,
        le=3600,
        description="seconds that a replica which is to go has for the images it works on; then jobs begin anew on "
        "another one, and other requests get a 503",
    )
    max_body_bytes: int = Field(
        default=16 << 20,
        ge=1024,
        le=1 << 30,
        description="bytes of a request body, pictures in it included; a larger one gets a 413",
    )
    cache: CacheSettings = Field(default_factory=CacheSettings, description="images made before")
    jobs: JobSettings = Field(default_factory=JobSettings, description="work that is asked for later")
    arena: ArenaConfig = Field(default_factory=ArenaConfig, description="votes on pairs of pictures")
    admin_key: SecretStr | None = Field(
        default=None,
        min_length=16,
        description="what `Authorization: Bearer` must say to push, delete and name adapters over HTTP; better as "
        "LORAFLEET_ADMIN_KEY than as a flag; left out: adapters cannot be changed over HTTP",
    )
    cors_origins: tuple[str, ...] = Field(
        default=(),
        description='web origins that may call from a browser, such as http://localhost:3000; "*" is all',
    )
    start_timeout_s: float = Field(
        default=600.0, gt=0, le=7200, description="seconds until the model must be loaded; then the start fails"
    )
    log_level: LogLevel = Field(
        default="warning", description="least severity that is logged; info has a line for each request"
    )
    log_format: LogFormat = Field(
        default="text", description="of log lines, all on stderr: text, or a JSON object each"
    )
    tracing: TracingSettings = Field(default_factory=TracingSettings, description="OpenTelemetry's spans of requests")
    ray_address: str | None = Field(
        default=None,
        min_length=1,
        description='a running Ray cluster, such as ray-head:6379, or "auto" for the one in RAY_ADDRESS; '
        "left out: a Ray of its own on this machine",
    )

    @property
    def live(self) -> LiveSettings:
        return LiveSettings.model_validate({name: getattr(self, name) for name in LiveSettings.model_fields})

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.scaling is None else self.scaling.max_replicas

    @model_validator(mode="after")
    def _serve_adapters(self) -> Self:
        if "bank" not in self.engine.model_fields_set and not self.base.low_memory:
            # Whoever serves has adapters; the engine as a library has none unless asked.
            given = {name: getattr(self.engine, name) for name in self.engine.model_fields_set}
            object.__setattr__(self, "engine", EngineSettings(**given, bank=BankConfig()))
        return self

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.base.device in ("cpu", "mps") and self.replica_gpus:
            raise ValueError(f"replica_gpus={self.replica_gpus:g} but base.device={self.base.device}: set one of them")
        if self.metrics_port is not None and self.ray_address is not None:
            raise ValueError("metrics_port is for a Ray of our own, and ray_address names another one: set one of them")
        if self.metrics_port is not None and self.metrics_port == self.port:
            raise ValueError(f"metrics_port and port are both {self.port}: set another one")
        if self.base.device.startswith("cuda:"):
            raise ValueError(f"base.device={self.base.device}, but Ray hands out the GPUs here: set base.device=cuda")
        return self
