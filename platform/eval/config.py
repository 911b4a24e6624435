"""All settings of evaluation, one frozen model. Imports no torch."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints

from lorafleet.core.generation import Guidance, SchedulerName, SidePx, Steps
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.config import BaseConfig, DTypeName

DefinitionName = Literal["cosine", "hessel", "mlperf"]
IntervalMethod = Literal["bca", "percentile"]
ScoreName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,39}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SamplingConfig(_Section):
    """How pictures are made; what is left out, the suite says."""

    steps: Steps | None = Field(default=None, description="denoising steps; empty: the suite's")
    guidance_scale: Guidance | None = Field(default=None, description="classifier-free guidance; empty: the suite's")
    scheduler: SchedulerName | None = Field(default=None, description="the sampler; empty: the suite's")
    width: SidePx | None = Field(default=None, description="pixels; empty: the suite's, else each model's own size")
    height: SidePx | None = Field(default=None, description="pixels; empty: the suite's, else each model's own size")
    seeds: int | None = Field(
        default=None, ge=1, le=64, description="pictures a prompt, each from another seed; empty: the suite's"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="what all seeds follow from, with the prompt")
    limit: int | None = Field(
        default=None, ge=1, description="take only so many prompts, evenly from the whole suite; empty: all"
    )


class ScorerConfig(_Section):
    """The model that compares pictures with texts, and what is computed from it."""

    model: str = Field(
        default="base",
        min_length=1,
        description="\"base\" (the base's own scorer/ folder), a folder in transformers' layout, or a hub id such as "
        "openai/clip-vit-base-patch32, openai/clip-vit-large-patch14, laion/CLIP-ViT-bigG-14-laion2B-39B-b160k, "
        "google/siglip-base-patch16-224",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    dtype: DTypeName = Field(default="float32", description="number format the model runs in; scores are float32")
    batch_size: int = Field(default=32, ge=1, le=4096, description="pictures or texts that it sees at once")
    definition: DefinitionName = Field(
        default="cosine",
        description="cosine: 100 cos; hessel: 2.5 max(cos, 0) of Hessel et al. 2021; mlperf: 100 cos by ViT-B/32, as "
        "MLPerf's text-to-image task",
    )


class StatisticsConfig(_Section):
    """How differences become evidence."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1, description="of all intervals")
    resamples: int = Field(default=10_000, ge=200, le=1_000_000, description="of bootstrap and permutation tests")
    interval: IntervalMethod = Field(default="bca", description="kind of bootstrap interval")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="of resampling")
    power: float = Field(default=0.8, gt=0, lt=1, description="chance to find a wanted difference, for sample sizes")
    wanted_difference: float = Field(
        default=0.5, gt=0, description="in CLIP score, what the report says the needed number of prompts for"
    )


class RunConfig(_Section):
    """Where pictures are made."""

    workers: int | None = Field(
        default=None,
        ge=1,
        le=1024,
        description="processes that make pictures; empty: one for each GPU, or for each CPU core, but none for fewer "
        "than 64 pictures",
    )
    batch_size: int = Field(
        default=8, ge=1, le=256, description="pictures made at once; part of what decides their last bits"
    )
    threads: int = Field(default=1, ge=1, le=256, description="of each worker on a CPU")
    ray: bool | None = Field(
        default=None, description="workers are actors of Ray; empty: where RAY_ADDRESS is set, as in a RayJob"
    )
    ray_address: str | None = Field(
        default=None, description='a Ray cluster, "auto" for the one around; empty: RAY_ADDRESS, else one of our own'
    )
    gpus_per_worker: float = Field(default=1.0, gt=0, le=8, description="share of a GPU that a Ray actor takes")
    max_losses: int = Field(
        default=3, ge=0, description="times that a batch is begun again because its worker died, before the run ends"
    )
    endpoint_threads: int = Field(default=4, ge=1, le=64, description="requests at a time to an endpoint")
    endpoint_timeout_s: float = Field(default=600, gt=0, description="seconds that an endpoint may take for a picture")
    endpoint_retries: int = Field(
        default=4, ge=0, le=100, description="times that an endpoint is asked again that is busy or not reached"
    )
    api_key: SecretStr | None = Field(
        default=None,
        description="what endpoints are told as `Authorization: Bearer`; better as LORAFLEET_RUN__API_KEY than a flag",
    )


class EvalConfig(_Section):
    """Everything that an evaluation can be told."""

    base: BaseConfig = BaseConfig()
    registry: RegistryConfig = RegistryConfig()
    sampling: SamplingConfig = SamplingConfig()
    scorer: ScorerConfig = ScorerConfig()
    scores: tuple[ScoreName, ...] = Field(
        default=("clip", "r1", "diversity", "similarity", "cmmd"),
        min_length=1,
        description="what is measured, the first decides comparisons; similarity and cmmd need `reference`; plug-ins "
        "of the entry point group lorafleet.eval.scorers go by their names",
    )
    reference: Path | None = Field(
        default=None, description="folder of real pictures that similarity, cmmd and fid compare with; empty: left out"
    )
    fid_weights: Path | None = Field(
        default=None,
        description="TorchScript file of the Inception network for fid, such as NVIDIA's inception-2015-12-05.pt",
    )
    statistics: StatisticsConfig = StatisticsConfig()
    run: RunConfig = RunConfig()
    metrics_file: Path | None = Field(
        default=None, description="Prometheus text file that scores are written to, for node_exporter's collector"
    )
    metrics_gateway: str | None = Field(
        default=None, pattern=r"^https?://", description="address of a Prometheus Pushgateway that scores are pushed to"
    )
