"""Bodies of the arena's routes. Nothing that a rater gets says which system made a picture."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from lorafleet.core.arena.records import Choice
from lorafleet.core.generation import (
    AdapterReference,
    AdapterUse,
    AdapterWeight,
    GenerationRequest,
    Guidance,
    NegativePrompt,
    Prompt,
    Seed,
    Steps,
)
from lorafleet.core.manifest import Manifest

HEX_PATTERN = r"^[0-9a-f]{32}$"
Token = Annotated[str, StringConstraints(pattern=HEX_PATTERN)]


class VoteBody(BaseModel):
    """Body of `POST /v1/arena/votes`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    session: Token = Field(description="as the pair came with it")
    pair: Token = Field(description="as the pair came with it")
    choice: Choice = Field(description="the better picture, or neither")


class PairBody(BaseModel):
    """Body of `POST /v1/arena/pairs`: what two versions of an adapter are to draw."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    adapter: AdapterReference = Field(
        description="NAME or NAME@ALIAS whose alias names several versions; two are drawn by their weights"
    )
    prompt: Prompt = Field(description="what to draw")
    negative_prompt: NegativePrompt = Field(default="", description="what to avoid")
    steps: Steps = Field(default=20, description="denoising steps")
    guidance_scale: Guidance = Field(default=5.0, description="classifier-free guidance; 1 and below switch it off")
    seed: Seed | None = Field(default=None, description="noise seed of both pictures; left out: a random one")
    weight: AdapterWeight = Field(default=1.0, description="how strongly the adapter is used")
    session: Token | None = Field(default=None, description="a rater's; left out: a new one begins")

    def request(self, version: Manifest, seed: int) -> GenerationRequest:
        return GenerationRequest(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            seed=seed,
            adapters=[AdapterUse(name=f"{version.name}@{version.version}", weight=self.weight)],
        )


class PairReply(BaseModel):
    object: Literal["arena.pair"] = "arena.pair"
    session: str = Field(description="to vote with, and to ask for the next pair with")
    pair: str = Field(description="to vote with")
    prompt: str = Field(description="what both pictures were asked to show")
    left: str = Field(description="a PNG in base64; which picture is on which side was drawn by lot")
    right: str = Field(description="as left")
    remaining: int = Field(description="pairs that the session has not voted on, this one included")


class VoteReply(BaseModel):
    object: Literal["arena.vote"] = "arena.vote"
    pair: str
    choice: Choice
