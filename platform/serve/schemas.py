"""Bodies of the HTTP API. Types are strict: "20" is not 20, true is not 1; 20.0 is 20, as JSON has it."""

from datetime import datetime
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.generation import (
    MAX_ADAPTERS,
    AdapterUses,
    GenerationRequest,
    Guidance,
    ImageCount,
    NegativePrompt,
    Prompt,
    SchedulerName,
    Seed,
    SidePx,
    StepReuse,
    Steps,
)
from lorafleet.core.manifest import MAX_SHARES, NAME_PATTERN, Manifest, Shares
from lorafleet.core.recipe import BaseRef, RecipeStart
from lorafleet.serve.pictures import Upload, from_base64

MAX_PREVIEWS: Final = 8
STRENGTH: Final = 0.8
EDIT_STRENGTH: Final = 0.7

Strength = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
AdapterName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
AliasTarget = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
AliasTargets = Annotated[
    dict[AliasTarget, Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]],
    Field(min_length=1, max_length=MAX_SHARES, json_schema_extra={"additionalProperties": False}),
]
PictureText = Annotated[str, Field(min_length=1, json_schema_extra={"format": "picture"})]


class GenerateBody(GenerationRequest):
    """Body of `POST /generate`. The recipe in a PNG is such a body, so posting it makes the image again."""

    base: BaseRef | None = Field(default=None, description="the base that must run; another one loaded is a 409")
    versions: Annotated[dict[str, str], Field(max_length=100)] | None = Field(
        default=None, description="what made the image, as a recipe says it; not checked"
    )

    start: RecipeStart | None = Field(default=None, description="what pictures a recipe needs; others are a 409")
    init_image: PictureText | None = Field(
        default=None,
        description="a picture to begin with: PNG, JPEG or WebP in base64, at most 16 megapixels; width and height, if "
        "left out, follow its proportions",
    )
    mask: PictureText | None = Field(
        default=None, description="a picture as large as init_image; what is white in it is drawn anew, the rest kept"
    )
    strength: Strength | None = Field(
        default=None,
        description=f"the part of the steps that is taken from init_image on, at least one; left out: {STRENGTH:g}",
    )
    previews: Annotated[int, Field(ge=0, le=MAX_PREVIEWS)] = Field(
        default=0, description="small pictures of each image on its way, at most, among its events"
    )

    def request(self) -> GenerationRequest:
        return GenerationRequest.model_construct(
            **{name: getattr(self, name) for name in GenerationRequest.model_fields}
        )

    def upload(self) -> Upload | None:
        """Raises InvalidRequest for what is not base64, or not there."""
        if self.init_image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise InvalidRequest(f"{name} needs init_image, the picture that it is about", param=name)
            return None
        mask = None if self.mask is None else from_base64(self.mask, "mask")
        by_default = STRENGTH if self.start is None else self.start.strength
        strength = by_default if self.strength is None else self.strength
        return Upload(from_base64(self.init_image, "init_image"), mask, strength)


class GenerateReply(BaseModel):
    """Answer of `POST /generate`."""

    id: str = Field(description="the request's id, as in the header x-request-id")
    model: str = Field(description="the base that ran")
    images: list[str] = Field(description="PNGs in base64, each with its recipe inside")
    seeds: list[int] = Field(description="the seed of each image")
    timings: dict[str, float] = Field(description="seconds: queue_s, encode_s, denoise_s, decode_s, total_s")
    warnings: list[str] = Field(description="what was done otherwise than asked, such as a prompt cut short")


class ImagesFields(BaseModel):
    """What OpenAI's generations and edits share, and seed to adapters as extras."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Prompt = Field(description="what to draw, 1 to 2000 characters")
    model: str | None = Field(
        default=None,
        max_length=1000,
        description="an id of GET /v1/models, an adapter's with @ALIAS or @VERSION too; left out: the base",
    )
    n: ImageCount | None = Field(default=None, description="images to make; left out: 1")
    size: Annotated[str, StringConstraints(pattern=r"^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$")] | None = Field(
        default=None, description="WIDTHxHEIGHT in pixels on the base's grid, or \"auto\" for the base's own size"
    )
    response_format: Literal["b64_json"] | None = Field(default=None, description="images come in the answer")
    output_format: Literal["png"] | None = Field(default=None, description="PNG, which carries the recipe")
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        default=None, description="no effect on a PNG"
    )
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = Field(
        default=None, description="no effect: num_inference_steps decides"
    )
    background: Literal["auto", "opaque"] | None = Field(default=None, description="images are opaque")
    user: Annotated[str, Field(max_length=1000)] | None = Field(default=None, description="no effect")
    safety_identifier: Annotated[str, Field(max_length=1000)] | None = Field(default=None, description="no effect")
    stream: bool | None = Field(default=None, description="send events, images as they are done")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        default=None, description="with stream: pictures of each image on its way, at most"
    )
    seed: Seed | None = Field(default=None, description="noise seed of the first image; left out: a random one")
    negative_prompt: NegativePrompt | None = Field(default=None, description="what to avoid")
    num_inference_steps: Steps | None = Field(default=None, description="denoising steps; left out: 20")
    guidance_scale: Guidance | None = Field(default=None, description="left out: 5; 1 and below switch it off")
    scheduler: SchedulerName | None = Field(default=None, description="the sampler; left out: euler")
    step_reuse: StepReuse | None = Field(
        default=None, description="above 1 quicker, and another image, as on /generate; left out: 1"
    )
    adapters: AdapterUses | None = Field(
        default=None,
        description=f"at most {MAX_ADAPTERS} adapters, that of model included; "
        "in a form as JSON text: the list, or each item in a field of its own",
    )

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
            "step_reuse": self.step_reuse,
            "adapters": self.adapters,
        }
        # model_construct: each value has passed its own range above; a size is judged by the base's limits.
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return GenerationRequest.model_construct(**given)


class ImagesBody(ImagesFields):
    """Body of `POST /v1/images/generations`."""

    style: Literal["vivid", "natural"] | None = Field(default=None, description="no effect")
    moderation: Literal["auto", "low"] | None = Field(default=None, description="no effect")


class EditsBody(ImagesFields):
    """Fields of the form of `POST /v1/images/edits`; `image` and `mask` are files beside them."""

    strength: Strength | None = Field(
        default=None, description=f"the part of the steps that is taken; left out: {EDIT_STRENGTH:g}, with a mask 1"
    )
    input_fidelity: Literal["high", "low"] | None = Field(default=None, description="no effect: strength decides")


class ImageData(BaseModel):
    b64_json: str = Field(description="a PNG in base64, with its recipe inside")


class ImagesReply(BaseModel):
    """Answer of `POST /v1/images/generations`, as OpenAI's."""

    created: int = Field(description="Unix time in seconds")
    data: list[ImageData]
    size: str = Field(description="WIDTHxHEIGHT in pixels")
    output_format: Literal["png"] = "png"


class TargetSize(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    width: SidePx
    height: SidePx


class TextToImageParameters(BaseModel):
    """Hugging Face's names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    negative_prompt: NegativePrompt | None = None
    num_inference_steps: Steps | None = None
    guidance_scale: Guidance | None = None
    scheduler: SchedulerName | None = None
    seed: Seed | None = None
    width: SidePx | None = None
    height: SidePx | None = None


class ImageToImageParameters(TextToImageParameters):
    prompt: Prompt
    target_size: TargetSize | None = None
    strength: Strength | None = None


class TextToImageBody(BaseModel):
    """Body of `POST /models/{name}`: Hugging Face's text-to-image."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    inputs: Prompt = Field(description="what to draw, 1 to 2000 characters")
    parameters: TextToImageParameters | None = None


class ImageToImageBody(BaseModel):
    """Body of `POST /models/{name}`: Hugging Face's image-to-image, told by `parameters.prompt`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    inputs: PictureText = Field(description="a picture to begin with: PNG, JPEG or WebP in base64")
    parameters: ImageToImageParameters


class JobImage(BaseModel):
    index: int = Field(description="which of the job's images, from 0")
    seed: int
    b64_json: str = Field(description="a PNG in base64, with its recipe inside")


class JobReply(BaseModel):
    """A job: work that is asked for later."""

    id: str
    object: Literal["job"] = "job"
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created_at: int = Field(description="Unix time in seconds")
    progress: float = Field(ge=0, le=1, description="the part of all steps that is done")
    retries: int = Field(description="how often it was begun anew because its replica was lost: 0 or 1")
    images: list[JobImage] = Field(description="those that are done")
    timings: dict[str, float] = Field(description="seconds by stage of the image that was done last")
    warnings: list[str]
    error: "ErrorInfo | None" = Field(description="why it failed")


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="Unix time in seconds at which the base was loaded, the adapter pushed")
    owned_by: str = "lorafleet"
    parent: str | None = Field(default=None, description="of an adapter: the base that it is used with")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class AdapterBody(BaseModel):
    """Fields of the form of `POST /v1/adapters`; `file` is a file beside them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: AdapterName = Field(description="what it is called; a new version where there is one of that name")


class AliasBody(BaseModel):
    """Body of `PUT /v1/adapters/{name}/aliases/{alias}`: one version, or several with their weights."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: AliasTarget | None = Field(default=None, description="first digits of a version, or another alias")
    versions: AliasTargets | None = Field(
        default=None,
        description="versions, or aliases, with the weights by which they share requests",
    )

    @model_validator(mode="after")
    def _check_one(self) -> Self:
        if (self.version is None) == (self.versions is None):
            raise ValueError("give version or versions, one of them")
        return self

    def shares(self) -> str | dict[str, float]:
        if self.version is not None:
            return self.version
        assert self.versions is not None
        return self.versions


class AdapterEntry(Manifest):
    """An adapter in the list: the version that its bare name means."""

    aliases: dict[str, Shares] = Field(description="versions by alias, with their shares of the requests")
    versions: list[str] = Field(description="newest first")


class AdapterList(BaseModel):
    object: Literal["list"] = "list"
    data: list[AdapterEntry]


class AdapterVersion(BaseModel):
    version: str = Field(description="sha256 of the file")
    pushed_at: datetime


class AdapterDetails(Manifest):
    """One version, and what else there is of its name."""

    aliases: dict[str, Shares] = Field(description="versions by alias, with their shares of the requests")
    versions: list[AdapterVersion] = Field(description="newest first")


class AdaptersDeleted(BaseModel):
    deleted: list[str] = Field(description="as NAME@VERSION")


class AdapterAlias(BaseModel):
    name: str
    alias: str
    versions: Shares = Field(description="with their shares of the requests; empty where the alias was removed")


class Status(BaseModel):
    status: Literal["ok", "ready", "degraded"]
    reasons: list[str] = Field(default_factory=list, description="what the service works without, while it answers")


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
