"""Settings of the adapter bank. Imports no torch."""

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    rows: int = Field(
        default=16, ge=1, le=256, description="rows of the largest UNet batch; guidance takes two an image"
    )
    text_rows: int = Field(default=2, ge=1, le=256, description="prompts of the largest text encoder batch")
    host_bytes: int = Field(
        default=4 << 30, ge=0, description="bytes of CPU memory for adapters that are ready to be copied to the device"
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
