"""What the service answers, typed."""

import base64
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from lorafleet.core.manifest import Manifest, Shares


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


class AdapterEntry(Manifest):
    """An adapter of the registry: the version that its bare name means."""

    aliases: dict[str, Shares] = Field(description="versions by alias, with their shares of the requests")
    versions: list[str] = Field(description="newest first")


class AdapterVersion(BaseModel):
    model_config = ConfigDict(frozen=True)

    version: str = Field(description="sha256 of the file")
    pushed_at: datetime


class AdapterDetails(Manifest):
    """One version of an adapter, and what else there is of its name."""

    aliases: dict[str, Shares] = Field(description="versions by alias, with their shares of the requests")
    versions: list[AdapterVersion] = Field(description="newest first")


class AdapterList(BaseModel):
    data: list[AdapterEntry]


class AdapterAlias(BaseModel):
    """What an alias points at now; nothing where it was removed."""

    model_config = ConfigDict(frozen=True)

    name: str
    alias: str
    versions: Shares


class AdaptersDeleted(BaseModel):
    deleted: list[str] = Field(description="as NAME@VERSION")
