"""What an evaluation found of one version of an adapter, and what was decided by it.

Versions never change, and so neither does their manifest: what is found later lies beside it, one object an evaluation.
"""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from lorafleet.core.manifest import Version

Decision = Literal["promoted", "refused", "rolled_back"]


class Measured(BaseModel):
    """A mean over prompts, or a difference of two, with its interval."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    mean: float
    low: float
    high: float


class CanaryFacts(BaseModel):
    """What the candidate did with a share of the requests."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    share: float = Field(description="of the requests, 0 to 1")
    seconds: float = Field(description="that it was watched")
    candidate: dict[str, JsonValue] = Field(description="requests, errors, seconds that 95 % took at most")
    stable: dict[str, JsonValue] = Field(description="the same of the version before")


class Evaluation(BaseModel):
    """One comparison; fields of later versions are skipped."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    decision: Decision
    reasons: tuple[str, ...] = Field(description="of the decision, one sentence each")
    decided_at: datetime = Field(description="by the clock of who decided, UTC")
    suite: str
    suite_digest: str = Field(description="sha256 over the prompts")
    prompts: int
    seeds: int = Field(description="pictures a prompt")
    weight: float = Field(description="that the adapters were used with")
    sampling: dict[str, JsonValue] = Field(description="steps, guidance and so on, of the candidate")
    scorer: dict[str, JsonValue] = Field(description="the model behind the scores, and their definition")
    against: Version | None = Field(description="the version in production, or null for the base alone")
    scores: dict[str, dict[str, Measured]] = Field(description="by system (base, candidate, production) and score")
    differences: dict[str, Measured] = Field(description="candidate less the one it was compared with, by score")
    canary: CanaryFacts | None = None
