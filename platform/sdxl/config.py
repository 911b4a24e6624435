"""Which SDXL base to load and how. Imports no torch."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DTypeName = Literal["auto", "float32", "float16", "bfloat16"]
AttentionName = Literal["sdpa", "xformers", "sliced"]


class BaseConfig(BaseModel):
    """The base model: id plus revision, and how it sits on the device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(
        default="emojixl",
        min_length=1,
        description='"emojixl" (the embedded base), a folder in diffusers\' layout, or a Hugging Face hub id',
    )
    revision: str | None = Field(
        default=None, description="branch, tag or commit of a hub id; left out: its main branch"
    )
    variant: str | None = Field(
        default=None,
        description='weight file variant of a hub id or folder, such as "fp16"; left out: the plain files',
    )
    vae: str | None = Field(
        default=None,
        description="folder or hub id of a VAE, such as madebyollin/sdxl-vae-fp16-fix; left out: the base's own",
    )
    vae_revision: str | None = Field(default=None, description="branch, tag or commit of the hub id in `vae`")
    dtype: DTypeName = Field(
        default="auto", description="number format of the weights; auto: bfloat16 on CUDA, float32 on CPU and MPS"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="auto, cpu, mps, cuda or cuda:N; auto: the first GPU there is, else the CPU",
    )
    attention: AttentionName = Field(
        default="sdpa",
        description="attention kernels: sdpa (PyTorch's), xformers (else sdpa), sliced (slow, least memory)",
    )
    vae_slicing: bool = Field(default=False, description="decode a batch image by image: less memory")
    vae_tiling: bool = Field(
        default=False, description="decode large images in overlapping tiles: less memory, changes pixels slightly"
    )
    low_memory: bool = Field(
        default=False,
        description="for small GPUs: weights wait in CPU memory until needed, and the VAE is sliced and tiled; "
        "on a CPU only the slicing and tiling",
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.dtype == "float16" and self.device in ("cpu", "mps"):
            raise ValueError(f"dtype=float16 does not work on {self.device}: set dtype=float32 or device=cuda")
        if self.attention == "xformers" and self.device in ("cpu", "mps"):
            raise ValueError(f"attention=xformers needs a CUDA GPU, device is {self.device}: set attention=sdpa")
        if self.vae_revision is not None and self.vae is None:
            raise ValueError("vae_revision is set but vae is not: set vae to the hub id it belongs to")
        if self.id == "emojixl" and (self.revision is not None or self.variant is not None):
            raise ValueError("revision and variant do not apply to the embedded base emojixl: leave them out")
        return self

    @property
    def vae_is_sliced(self) -> bool:
        return self.vae_slicing or self.low_memory

    @property
    def vae_is_tiled(self) -> bool:
        return self.vae_tiling or self.low_memory
