"""What the service answers, typed."""

import base64
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _decoded(value: Any) -> Any:
    return base64.b64decode(value, validate=True) if isinstance(value, str) else value


Png = Annotated[bytes, BeforeValidator(_decoded)]


class GenerateResult(BaseModel):
    """What `POST /generate` answered: PNG bytes and, image by image, the seed that makes it again."""

    model_config = ConfigDict(frozen=True)

    id: str
    model: str
    images: list[Png] = Field(repr=False, description="PNG files, each with its recipe inside")
    seeds: list[int]
    timings: dict[str, float] = Field(description="seconds: queue_s, encode_s, denoise_s, decode_s, total_s")
    warnings: list[str] = []


class JobImage(BaseModel):
    model_config = ConfigDict(frozen=True)

    index: int
    seed: int
    png: Png = Field(validation_alias="b64_json", repr=False)


class JobFailure(BaseModel):
    model_config = ConfigDict(frozen=True)

    message: str
    code: str | None = None
    param: str | None = None


class JobStatus(BaseModel):
    """A job as it stands."""

    model_config = ConfigDict(frozen=True)

    id: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int = Field(description="Unix time in seconds")
    progress: float = Field(description="the part of all steps that is done")
    retries: int = 0
    images: list[JobImage] = []
    timings: dict[str, float] = {}
    warnings: list[str] = []
    error: JobFailure | None = None

    @property
    def has_ended(self) -> bool:
        return self.status not in ("queued", "running")
