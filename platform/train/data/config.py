"""Which pictures to train on and how they are prepared. Imports no torch."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorafleet.sdxl.config import BaseConfig


class DataConfig(BaseModel):
    """Pictures and captions. Everything but `endpoint_url` and `validation_share` shapes the cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="address of an S3 that is not Amazon's, such as http://minio:9000; left out: what AWS_ENDPOINT_URL "
        "says",
    )
    resolution_px: int | None = Field(
        default=None, ge=32, le=4096, description="side of a square picture in pixels; left out: the base's own"
    )
    bucket_step_px: int | None = Field(
        default=None,
        ge=8,
        le=1024,
        description="pixels between the sides of two aspect-ratio buckets; left out: a sixteenth of the resolution, at "
        "least the base's grid",
    )
    max_aspect: float = Field(
        default=2.0, ge=1, le=4, description="long side over short side of the longest bucket; 1: squares only"
    )
    max_pixels: int = Field(
        default=16_000_000, ge=4096, le=178_000_000, description="pixels of a picture; a larger one is refused"
    )
    crops: int = Field(
        default=1, ge=1, le=64, description="croppings kept of each picture: its middle, then places drawn by chance"
    )
    crop_zoom: float = Field(
        default=1.15, ge=1, le=4, description="how much a further cropping is enlarged at most before it is cut out"
    )
    flip: bool = Field(default=False, description="keep each cropping mirrored too; not for text or one-sided things")
    trigger: str = Field(
        default="", max_length=200, description='words put before every caption, such as "pixel art of"; may be empty'
    )
    caption_variants: int = Field(
        default=1,
        ge=1,
        le=64,
        description="wordings kept of each caption: itself, then its parts between commas in other orders",
    )
    keep_parts: int = Field(
        default=1, ge=0, le=100, description="parts of a caption that stay in front in every wording"
    )
    part_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the other parts that a further wording leaves out"
    )
    validation_share: float = Field(
        default=0.1,
        ge=0,
        le=0.9,
        description="share of the pictures held out for the validation loss, chosen by content; 0: none",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.part_dropout > 0 and self.caption_variants == 1:
            raise ValueError("data.part_dropout needs further wordings: set data.caption_variants to 2 or more")
        return self


class InspectSettings(BaseModel):
    """What of a training run's settings decides how its pictures are seen; other sections are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    base: BaseConfig = BaseConfig()
    data: DataConfig = DataConfig()
