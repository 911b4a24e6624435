"""Bodies of the HTTP API. Types are strict: "20" is not 20, true is not 1; 20.0 is 20, as JSON has it."""

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from lorafleet.core.generation import (
    GenerationRequest,
    Guidance,
    ImageCount,
    NegativePrompt,
    Prompt,
    SchedulerName,
    Seed,
    Steps,
)
from lorafleet.core.recipe import BaseRef

MAX_PREVIEWS: Final = 8


class GenerateBody(GenerationRequest):
    """Body of `POST /generate`. The recipe in a PNG is such a body, so posting it makes the image again."""

    base: BaseRef | None = Field(default=None, description="the base that must run; another one loaded is a 409")
    versions: Annotated[dict[str, str], Field(max_length=100)] | None = Field(
        default=None, description="what made the image, as a recipe says it; not checked"
    )

    previews: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] = Field(
        default=0, description="small pictures of each image on its way, with Accept: text/event-stream"
    )

    def request(self) -> GenerationRequest:
        return GenerationRequest(**self.model_dump(include=set(GenerationRequest.model_fields)))


class GenerateReply(BaseModel):
    """Answer of `POST /generate`."""

    id: str = Field(description="the request's id, as in the header x-request-id")
    model: str = Field(description="the base that ran")
    images: list[str] = Field(description="PNGs in base64, each with its recipe inside")
    seeds: list[int] = Field(description="the seed of each image")
    timings: dict[str, float] = Field(description="seconds: queue_s, encode_s, denoise_s, decode_s, total_s")
    warnings: list[str] = Field(description="what was done otherwise than asked, such as a prompt cut short")


def _refuse_streaming(value: Any) -> Any:
    if value is True:
        raise ValueError("streaming is not offered yet: leave stream out")
    if value == 0 and value is not False:  # which pydantic takes for false, and JSON does not
        raise ValueError(f"stream must be false, got {value}")
    return value


class ImagesBody(BaseModel):
    """Body of `POST /v1/images/generations`: OpenAI's, and seed to scheduler as extras."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Prompt = Field(description="what to draw, 1 to 2000 characters")
    model: str | None = Field(default=None, max_length=1000, description="an id of GET /v1/models; left out: the base")
    n: ImageCount | None = Field(default=None, description="images to make; left out: 1")
    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$")] | None = Field(
        default=None, description="WIDTHxHEIGHT in pixels on the base's grid, or \"auto\" for the base's own size"
    )
    response_format: Literal["b64_json"] | None = Field(default=None, description="images come in the answer")
    output_format: Literal["png"] | None = Field(default=None, description="PNG, which carries the recipe")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="no effect on a PNG"
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        default=None, description="no effect: num_inference_steps decides"
    )
    style: Literal["vivid", "natural"] | None = Field(default=None, description="no effect")
    background: Literal["auto", "opaque"] | None = Field(default=None, description="images are opaque")
    moderation: Literal["auto", "low"] | None = Field(default=None, description="no effect")
    user: Annotated[str, Field(max_length=1000)] | None = Field(default=None, description="no effect")
    stream: Annotated[Literal[False], BeforeValidator(_refuse_streaming)] | None = Field(
        default=None, description="not offered yet"
    )
    partial_images: Annotated[int, Field(ge=0, le=0)] | None = Field(default=None, description="not offered yet")
    seed: Seed | None = Field(default=None, description="noise seed of the first image; left out: a random one")
    negative_prompt: NegativePrompt | None = Field(default=None, description="what to avoid")
    num_inference_steps: Steps | None = Field(default=None, description="denoising steps; left out: 20")
    guidance_scale: Guidance | None = Field(default=None, description="left out: 5; 1 and below switch it off")
    scheduler: SchedulerName | None = Field(default=None, description="the sampler; left out: euler")

    def request(self) -> GenerationRequest:
        width, height = None, None
        if self.size is not None and self.size != "auto":
            width, height = (int(side) for side in self.size.split("x"))
        asked = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "width": width,
            "height": height,
            "steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": self.scheduler,
            "seed": self.seed,
            "num_images": self.n,
        }
        # model_construct: each value has passed its own range above; a size is judged by the base's limits.
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return GenerationRequest.model_construct(**given)


class ImageData(BaseModel):
    b64_json: str = Field(description="a PNG in base64, with its recipe inside")


class ImagesReply(BaseModel):
    """Answer of `POST /v1/images/generations`, as OpenAI's."""

    created: int = Field(description="Unix time in seconds")
    data: list[ImageData]
    size: str = Field(description="WIDTHxHEIGHT in pixels")
    output_format: Literal["png"] = "png"


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which it was loaded")
    owned_by: str = "lorafleet"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    status: Literal["ok", "ready"]


class ErrorDetail(BaseModel):
    message: str
    param: str | None


class ErrorInfo(BaseModel):
    message: str = Field(description="one sentence that names the field and the allowed range")
    type: str = Field(description="the kind of error")
    param: str | None = Field(description="the field at fault")
    code: str = Field(description="stable name of the error, for machines")
    errors: list[ErrorDetail] | None = Field(default=None, description="all fields at fault, where there are several")


class ErrorReply(BaseModel):
    """Every error of every route."""

    error: ErrorInfo
