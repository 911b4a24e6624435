"""Where adapters are stored, and how much of this machine they take."""

from pydantic import BaseModel, ConfigDict, Field


class RegistryConfig(BaseModel):
    """The adapter registry. Credentials are no settings: they come from where the store's own library looks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(
        default=None,
        min_length=1,
        description="a folder, or s3://bucket/folder (another store that fsspec knows works too); left out: "
        "LORAFLEET_HOME/registry",
    )
    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="address of an S3 that is not Amazon's, such as http://minio:9000; left out: what "
        "AWS_ENDPOINT_URL says",
    )
    samples: bool = Field(
        default=True,
        description="put the sample adapters of emojixl into LORAFLEET_HOME/registry when a service starts and that "
        "folder is not there yet",
    )
    fresh_s: float | None = Field(
        default=None,
        ge=0,
        le=3600,
        description="seconds that a service goes by what it last read of a name; left out: 0 for a folder, else 1",
    )
    max_adapter_bytes: int = Field(
        default=2 << 30, ge=1024, le=64 << 30, description="bytes of an adapter file; a larger one is refused"
    )
    cache_bytes: int = Field(
        default=50 << 30,
        ge=0,
        description="bytes of LORAFLEET_HOME/cache/adapters; above it, the files that were not asked for longest go",
    )
