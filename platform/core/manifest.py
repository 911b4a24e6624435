"""What the registry knows of an adapter, and the names by which people ask for one.

A reference is `name`, `name@alias` or `name@version`, the version being sha256 of the file or its first digits. The
bare name means the alias `production`, and `latest` where there is no `production`.
"""

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.ranges import short

PRODUCTION: Final = "production"
LATEST: Final = "latest"
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
REFERENCE_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}(@[a-z0-9][a-z0-9._-]{0,63})?$"
ALIAS_PATTERN: Final = r"^(?![0-9a-f]{6,64}$)[a-z0-9][a-z0-9._-]{0,63}$"  # what could be a version is none
MIN_PREFIX_CHARS: Final = 6
MAX_TRIGGER_WORDS: Final = 32
MAX_SHARES: Final = 16

_NAME: Final = re.compile(NAME_PATTERN)
_ALIAS: Final = re.compile(ALIAS_PATTERN)
_VERSION: Final = re.compile(rf"[0-9a-f]{{{MIN_PREFIX_CHARS},64}}")

FileFormat = Literal["diffusers", "peft", "kohya"]
Version = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Shares = dict[str, float]
"""What an alias points at: versions with their shares of the requests, which sum to 1."""


class TrainingFacts(BaseModel):
    """How an adapter was trained; fields of later versions are skipped."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    base_id: str = Field(description="of the base, as its owner calls it")
    base_revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    data_fingerprint: str = Field(description="sha256 over pictures, captions and what encoded them")
    images: int = Field(ge=1, description="that it was trained on")
    steps: int = Field(ge=1, description="of the optimizer, to the weights that were kept")
    seconds: float = Field(ge=0, description="in these steps, validation left out")
    validation_loss: float | None = Field(default=None, description="mean squared error on held-out images")
    clip_score: float | None = Field(default=None, description="mean of the sample pictures and their prompts")
    settings: dict[str, dict[str, JsonValue]] = Field(default={}, description="of training, by section")


class AdapterFacts(BaseModel):
    """What the check of an adapter's file found; fields of later versions are skipped."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: FileFormat = Field(description="whose keys the file has")
    rank: int = Field(ge=1, description="the largest of its modules")
    alpha: float | None = Field(default=None, description="left out where its modules have different ones")
    modules: dict[str, int] = Field(description="how many linears it changes, by part of the base")
    trigger_words: tuple[Annotated[str, StringConstraints(min_length=1, max_length=200)], ...] = Field(
        default=(), max_length=MAX_TRIGGER_WORDS, description="words that call for what it was trained on"
    )
    base_fingerprint: str | None = Field(
        default=None, description="of the base it was trained on; left out where the file does not say"
    )
    fits_fingerprint: str = Field(description="of the base whose modules it was checked against")
    training: TrainingFacts | None = Field(default=None, description="left out for what was trained elsewhere")

    @field_validator("trigger_words")
    @classmethod
    def _printable(cls, words: tuple[str, ...]) -> tuple[str, ...]:
        if not all(word.isprintable() for word in words):  # they end up in terminals
            raise ValueError("trigger_words hold control characters")
        return words


class Manifest(AdapterFacts):
    """One version of an adapter, as `manifest.json` says it. Never changed once written."""

    name: str = Field(pattern=NAME_PATTERN)
    version: Version = Field(description="sha256 of the file")
    size_bytes: int = Field(ge=0)
    pushed_at: datetime = Field(description="by the pusher's clock, UTC")


class Entry(BaseModel):
    """One adapter in the list."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    manifest: Manifest = Field(description="of the version that the bare name means")
    versions: tuple[Version, ...] = Field(description="newest first")
    aliases: dict[str, Shares] = Field(description="`latest` is one of them")

    @property
    def name(self) -> str:
        return self.manifest.name


@dataclass(frozen=True)
class Reference:
    """An adapter as a request names it; at most one of `alias` and `version` (its first digits) is there."""

    name: str
    alias: str | None = None
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InvalidRequest."""
        name, at, rest = text.partition("@")
        check_name(name)
        if not at:
            return cls(name)
        return cls(name, version=rest) if _VERSION.fullmatch(rest) else cls(name, alias=check_alias(rest))

    def __str__(self) -> str:
        rest = self.alias or self.version
        return f"{self.name}@{rest}" if rest else self.name


def check_name(name: str) -> str:
    """The name itself. Raises InvalidRequest: names become paths and are never joined into one unchecked."""
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"an adapter's name must match {NAME_PATTERN}, not {short(name)}.", param="name")
    return name


def check_alias(alias: str) -> str:
    """The alias itself. Raises InvalidRequest; what could be a version's first digits is no alias."""
    if not _ALIAS.fullmatch(alias):
        raise InvalidRequest(
            f"an alias must match {NAME_PATTERN} and not look like a version (hexadecimal digits), not {short(alias)}.",
            param="alias",
        )
    return alias


def check_shares(weights: Shares) -> Shares:
    """The weights as shares that sum to 1. Raises InvalidRequest."""
    total = sum(weights.values())
    if not 1 <= len(weights) <= MAX_SHARES or not all(0 < weight <= 1e9 for weight in weights.values()):
        raise InvalidRequest(
            f"an alias names 1 to {MAX_SHARES} versions, each with a weight above 0, not {short(weights)}.",
            param="versions",
        )
    return {version: weight / total for version, weight in weights.items()}


def write_alias(shares: Shares) -> bytes:
    """The alias's object: one version as plain text, several as JSON."""
    if len(shares) == 1:
        return f"{next(iter(shares))}\n".encode()
    return _SHARES.dump_json(shares, indent=1)


def read_alias(data: bytes) -> Shares | None:
    """None where the object is damaged."""
    text = data.decode(errors="replace").strip()
    try:
        return check_shares(_SHARES.validate_json(text) if text.startswith("{") else _SHARES.validate_python({text: 1}))
    except (ValidationError, InvalidRequest):
        return None


_SHARES: Final = TypeAdapter(dict[Version, float])
