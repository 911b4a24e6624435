"""What one text-to-image request asks for, with the range of every field.

The same words are used by the HTTP schemas, the recipe in a PNG, the client, the reference pipeline and the engine.
"""

from typing import Annotated, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from lorafleet.core.manifest import REFERENCE_PATTERN

SchedulerName = Literal[
    "euler", "euler_a", "ddim", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "unipc", "lcm", "heun", "euler_trailing"
]
SCHEDULERS: Final[tuple[str, ...]] = get_args(SchedulerName)

MAX_PROMPT_CHARS: Final = 2000
MAX_STEPS: Final = 150
MAX_GUIDANCE: Final = 30.0
MAX_IMAGES: Final = 8
MAX_SEED: Final = 2**32 - 1
MIN_SIDE_PX: Final = 64
MAX_SIDE_PX: Final = 2048

Prompt = Annotated[str, StringConstraints(min_length=1, max_length=MAX_PROMPT_CHARS, pattern=r"\S")]
NegativePrompt = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
MAX_ADAPTERS: Final = 4
MAX_WEIGHT: Final = 4.0
MAX_STEP_REUSE: Final = 5

SidePx = Annotated[int, Field(ge=MIN_SIDE_PX, le=MAX_SIDE_PX)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]
Guidance = Annotated[float, Field(ge=0.0, le=MAX_GUIDANCE, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
ImageCount = Annotated[int, Field(ge=1, le=MAX_IMAGES)]
StepReuse = Annotated[int, Field(ge=1, le=MAX_STEP_REUSE)]
AdapterReference = Annotated[str, StringConstraints(max_length=129, pattern=REFERENCE_PATTERN)]
AdapterWeight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)]


class AdapterUse(BaseModel):
    """One adapter that images are made with, and how strongly."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: AdapterReference = Field(
        description="NAME, which means its alias production or else the latest, NAME@ALIAS, or NAME@ and a version's "
        "first digits"
    )
    weight: AdapterWeight = Field(default=1.0, description="0 leaves it out, below 0 turns it around")


AdapterUses = Annotated[list[AdapterUse], Field(max_length=MAX_ADAPTERS)]


class GenerationRequest(BaseModel):
    """A request for `num_images` images of one prompt.

    Image i uses seed `seed + i` (mod 2**32), so that each image can be made again alone. `width`/`height` left
    out mean the base model's own size; the base model narrows their range further (see `lorafleet.sdxl.base`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: Prompt = Field(description=f"what to draw, 1 to {MAX_PROMPT_CHARS} characters")
    negative_prompt: NegativePrompt = Field(
        default="", description=f"what to avoid, at most {MAX_PROMPT_CHARS} characters"
    )
    width: SidePx | None = Field(default=None, description="pixels, on the base model's grid")
    height: SidePx | None = Field(default=None, description="pixels, on the base model's grid")
    steps: Steps = Field(default=20, description="denoising steps")
    guidance_scale: Guidance = Field(default=5.0, description="classifier-free guidance; 1 and below switch it off")
    scheduler: SchedulerName = Field(
        default="euler",
        description="the sampler; lcm and euler_trailing are for bases or adapters distilled to 1 to 8 steps (LCM, "
        "Turbo, Lightning), others' images they change for the worse",
    )
    seed: Seed | None = Field(default=None, description="noise seed; left out: a random one, returned with the image")
    num_images: ImageCount = Field(default=1, description="images to make, seeds counting up")
    step_reuse: StepReuse = Field(
        default=1,
        description="above 1 quicker, and another image: only every n-th step runs the whole UNet, those between its "
        "outermost blocks",
    )
    adapters: AdapterUses = Field(default=[], description=f"at most {MAX_ADAPTERS} adapters, whose changes add up")
