"""What the gateway asks a replica to do. Imports no torch, so that the gateway need not either."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from lorafleet.core.generation import AdapterUse, GenerationRequest
from lorafleet.core.manifest import Manifest
from lorafleet.core.recipe import RecipeStart


@dataclass(frozen=True)
class Start:
    """Pictures to begin with, at the size of the images to make: PNGs, `image` RGB, `mask` grey (white is drawn anew).

    Of the request's steps only the last `strength` (0 to 1, at least one step) are taken.
    """

    image: bytes = field(repr=False)
    mask: bytes | None = field(repr=False)
    recipe: RecipeStart

    @property
    def strength(self) -> float:
        return self.recipe.strength


@dataclass(frozen=True)
class WorkAdapter:
    """The version of an adapter that work is done with. `alias`: what led to it, None where a version was asked for.
    `is_split`: the alias names several versions, and this one was drawn."""

    manifest: Manifest
    weight: float
    alias: str | None = None
    is_split: bool = False

    @property
    def key(self) -> str:
        """Names its bytes: two names may have the same."""
        return self.manifest.version

    @property
    def use(self) -> AdapterUse:
        """How a request asks for exactly this one."""
        return AdapterUse(name=f"{self.manifest.name}@{self.manifest.version}", weight=self.weight)


@dataclass(frozen=True)
class Work:
    """One request, nothing left open: size, seed and the versions of its adapters are set. `previews`: small pictures
    on the way, per image.

    `is_seeded`: the seed is the caller's, not one drawn here; only then can the same be asked for again.
    """

    request: GenerationRequest
    start: Start | None = None
    previews: int = 0
    is_seeded: bool = True
    adapters: tuple[WorkAdapter, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For `from_json`, in another process or after a restart too."""
        start = None
        if self.start is not None:
            pictures = [
                None if png is None else base64.b64encode(png).decode() for png in (self.start.image, self.start.mask)
            ]
            start = {"image": pictures[0], "mask": pictures[1], "recipe": self.start.recipe.model_dump()}
        request = self.request.model_dump(mode="json")
        adapters = [
            {**asdict(adapter), "manifest": adapter.manifest.model_dump(mode="json")} for adapter in self.adapters
        ]
        return {
            "request": request,
            "start": start,
            "previews": self.previews,
            "is_seeded": self.is_seeded,
            "adapters": adapters,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        start = content["start"]
        if start is not None:
            mask = None if start["mask"] is None else base64.b64decode(start["mask"])
            start = Start(base64.b64decode(start["image"]), mask, RecipeStart(**start["recipe"]))
        request = GenerationRequest(**content["request"])
        adapters = [
            WorkAdapter(**{**adapter, "manifest": Manifest.model_validate(adapter["manifest"])})
            for adapter in content["adapters"]
        ]
        return cls(request, start, content["previews"], content["is_seeded"], tuple(adapters))

    def cost(self) -> float:
        """How much there is to do, in megapixels that go through the UNet; encoding and decoding count as two more,
        steps that run only the outermost blocks as a tenth each.

        Size is set.
        """
        request = self.request
        assert request.width is not None
        assert request.height is not None
        steps = request.steps * (1.0 if self.start is None else self.start.strength)
        whole = 0.1 + 0.9 / request.step_reuse
        evaluations = (2 if request.scheduler == "heun" else 1) * steps * whole + 2
        rows = 2 if request.guidance_scale > 1 else 1
        return request.num_images * evaluations * rows * request.width * request.height / 1e6

    def asked_fingerprint(self, base: str) -> str:
        """The same for the same request, whatever its adapters' names mean by now."""
        asked = self.request.model_dump(mode="json", exclude=set() if self.is_seeded else {"seed"})
        start = None if self.start is None else self.start.recipe.model_dump()
        return _hash([base, asked, start])

    def fingerprint(self, base: str) -> str:
        """The same for work that makes the same images with the base of that fingerprint (a seed drawn here left out).

        Whatever else may shape an image belongs in here.
        """
        asked = self.request.model_dump(mode="json", exclude={"adapters"} if self.is_seeded else {"adapters", "seed"})
        start = None if self.start is None else self.start.recipe.model_dump()
        adapters = [(adapter.key, adapter.weight) for adapter in self.adapters]
        return _hash([base, asked, start, adapters])


def _hash(content: list[Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
