"""All settings of training, one frozen model; every number has its home here. Imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from lorafleet.core.registry_config import RegistryConfig
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.data.config import DataConfig

OptimizerName = Literal["adamw", "adamw8bit", "prodigy"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=2000)]
Target = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_.]+$", max_length=100)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AdapterConfig(_Section):
    """The LoRA: where it sits and how large it is."""

    rank: int = Field(default=8, ge=1, le=128, description="rank of every module's A and B")
    alpha: float = Field(default=16, gt=0, le=1024, description="the adapter adds alpha / rank times B A")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="share of a module's inputs that are dropped, 0 to 1")
    targets: tuple[Target, ...] = Field(
        default=("to_k", "to_q", "to_v", "to_out.0"),
        min_length=1,
        description="ends of the names of the UNet's linears that get an adapter",
    )
    text_encoders: bool = Field(default=False, description="train adapters in both text encoders too")
    text_targets: tuple[Target, ...] = Field(
        default=("k_proj", "q_proj", "v_proj", "out_proj"),
        min_length=1,
        description="the same for the text encoders' linears",
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank), which suits high ranks")
    dora: bool = Field(
        default=False,
        description="learn each output's magnitude too (DoRA); such adapters cannot be served here, only written",
    )


class ObjectiveConfig(_Section):
    """What is minimised."""

    prediction: Literal["auto", "epsilon", "v_prediction"] = Field(
        default="auto", description="what the UNet predicts; auto: what the base's scheduler says"
    )
    min_snr_gamma: float | None = Field(
        default=None, gt=0, le=1000, description="clips the weight of nearly clean timesteps (5 is usual); empty: off"
    )
    noise_offset: float = Field(
        default=0, ge=0, le=1, description="strength of a noise that is one for a whole channel"
    )
    max_timestep: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the noise schedule that is trained, from its clean end; below 1 an adapter learns how "
        "things look and less where they are",
    )
    caption_dropout: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of samples that see an empty caption, so that guidance keeps working",
    )


class OptimizerConfig(_Section):
    """How the weights move."""

    name: OptimizerName = Field(
        default="adamw", description="adamw, adamw8bit (needs bitsandbytes), prodigy (needs prodigyopt; set lr=1)"
    )
    lr: float = Field(default=1e-4, gt=0, le=10, description="highest learning rate")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=(0.9, 0.999), description="decay of the gradient's running mean and of its square's"
    )
    eps: float = Field(default=1e-8, gt=0, le=1e-2, description="added to the denominator")
    weight_decay: float = Field(default=1e-2, ge=0, le=1, description="decoupled weight decay, as a share of lr")
    clip: float = Field(default=1.0, gt=0, description="largest norm of a step's whole gradient")
    warmup_steps: int = Field(default=20, ge=0, description="steps in which lr rises from 0")
    schedule: Literal["cosine", "constant"] = Field(default="cosine", description="lr after the warm-up")
    final_lr_share: float = Field(default=0.0, ge=0, le=1, description="share of lr that the cosine ends at")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="decay a step of a running mean of the weights, which is then the result"
    )


class LoopConfig(_Section):
    """How long, and in which portions."""

    steps: int = Field(default=1000, ge=1, le=10_000_000, description="steps of the optimizer")
    batch_size: int = Field(default=4, ge=1, le=65536, description="images a step, of all workers together")
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="images that a worker computes at once; a step is batch_size / micro_batch such portions, dealt "
        "out to the workers; empty: batch_size",
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="of everything that is drawn")
    gradient_checkpointing: bool = Field(default=False, description="less memory, a third more time")
    quantise_base: bool = Field(
        default=False,
        description="keep the UNet's linears as 8-bit integers; needs gradient_checkpointing, saves memory",
    )
    compile: Literal["none", "regional", "full"] = Field(
        default="none",
        description="for GPUs: regional compiles each kind of the UNet's blocks (a minute for each size of images), "
        "full all of it at once (minutes)",
    )
    fused: bool = Field(
        default=True, description="on a GPU, compute what the adapter adds by kernels of our own; needs Triton"
    )
    cuda_graphs: bool = Field(
        default=True,
        description="on a GPU, if compile is not none: record the passes of each shape of batch once and replay them",
    )
    max_bad_steps: int = Field(
        default=10, ge=1, description="steps in a row with a loss or gradient that is no number, before the run ends"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            raise ValueError(
                f"loop.batch_size must be a multiple of loop.micro_batch, not {self.batch_size} and {self.micro_batch}"
            )
        if self.quantise_base and not self.gradient_checkpointing:
            raise ValueError("loop.quantise_base saves nothing without loop.gradient_checkpointing: set both")
        return self

    @property
    def portion(self) -> int:
        """Images of a micro-batch."""
        return self.micro_batch or self.batch_size


class CheckpointConfig(_Section):
    """What a run can go on from."""

    every_steps: int = Field(default=100, ge=1, description="steps between two checkpoints")
    keep_last: int = Field(default=2, ge=1, le=100, description="newest checkpoints that are kept")
    keep_best: int = Field(default=1, ge=0, le=100, description="checkpoints of least validation loss kept besides")


class ValidationConfig(_Section):
    """What is looked at while training."""

    every_steps: int = Field(default=100, ge=1, description="steps between two validations")
    patience: int | None = Field(
        default=None, ge=1, description="validations without a lower loss after which the run ends; empty: never"
    )
    min_delta: float = Field(default=0.0, ge=0, description="how much lower a loss must be to count")
    prompts: tuple[Text, ...] = Field(
        default=(), max_length=64, description="of the sample pictures; empty: none are made"
    )
    sample_steps: int = Field(default=20, ge=1, le=150, description="denoising steps of a sample picture")
    guidance_scale: float = Field(default=5.0, ge=1, le=30, description="guidance of a sample picture")
    sample_seed: int = Field(
        default=1, ge=0, le=2**32 - 1, description="seed of the first sample picture, then counting"
    )


class RunConfig(_Section):
    """Where the work is done."""

    workers: int = Field(default=1, ge=1, le=4096, description="processes; more than one run under Ray Train")
    min_workers: int | None = Field(
        default=None, ge=1, description="go on with as few as these when workers are lost; empty: workers"
    )
    ray: bool = Field(default=False, description="use Ray Train for one worker too: it starts again what dies")
    ray_address: str | None = Field(
        default=None, min_length=1, description="a Ray cluster to train on; empty: one of our own on this machine"
    )
    max_failures: int = Field(default=3, ge=0, description="times that Ray Train begins again from the last checkpoint")
    timeout_s: float = Field(default=1800, gt=0, description="seconds that a worker waits for the others")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"run.min_workers is {self.min_workers}, above run.workers, {self.workers}")
        return self


class WatchConfig(_Section):
    """Who is told how it goes. TensorBoard's files are always written."""

    mlflow_uri: str | None = Field(
        default=None,
        min_length=1,
        description="tracking server, or a database such as sqlite:///runs.db (with all of mlflow); empty: no MLflow",
    )
    wandb_project: str | None = Field(default=None, min_length=1, description="project; empty: no Weights & Biases")
    metrics_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="where Prometheus may scrape a run outside of Ray, on 127.0.0.1; empty: nowhere",
    )


class TrainConfig(_Section):
    """Everything that `lorafleet train` can be told."""

    base: BaseConfig = BaseConfig()
    registry: RegistryConfig = RegistryConfig()
    data: DataConfig = DataConfig()
    adapter: AdapterConfig = AdapterConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig = LoopConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    run: RunConfig = RunConfig()
    watch: WatchConfig = WatchConfig()
    publish: bool = Field(default=True, description="push the adapter into the registry when it is done")
    publish_best: bool = Field(
        default=False, description="the result is the checkpoint of least validation loss, not the last state"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.adapter.dora and self.publish:
            raise ValueError(
                "adapter.dora makes an adapter that cannot be served and so not be published, which only LoRAs can, "
                "adapter.rslora too: set publish=false to get its file, which diffusers loads, or adapter.dora=false"
            )
        if self.adapter.dora and self.adapter.rslora:
            raise ValueError("adapter.dora and adapter.rslora cannot both be true: choose one")
        if self.adapter.dora and self.adapter.dropout > 0:
            raise ValueError("adapter.dora needs adapter.dropout=0: its magnitudes are learnt from whole inputs")
        if self.publish_best and self.checkpoint.keep_best == 0:
            raise ValueError("publish_best needs checkpoint.keep_best of at least 1")
        if self.optimizer.warmup_steps > self.loop.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, above loop.steps, {self.loop.steps}"
            )
        if self.optimizer.name == "prodigy" and self.optimizer.lr < 0.1:
            raise ValueError("optimizer.name=prodigy finds the learning rate itself: set optimizer.lr=1")
        if self.base.low_memory:
            raise ValueError(
                "base.low_memory moves weights while pictures are made and does not train: set it to false"
            )
        return self
