"""What the gateway asks a replica to do. Imports no torch, so that the gateway need not either."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lorafleet.core.generation import GenerationRequest
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
class Work:
    """One request, nothing left open: size and seed are set. `previews`: small pictures on the way, per image.

    `is_seeded`: the seed is the caller's, not one drawn here; only then can the same be asked for again.
    """

    request: GenerationRequest
    start: Start | None = None
    previews: int = 0
    is_seeded: bool = True

    def to_json(self) -> dict[str, Any]:
        """For `from_json`, in another process or after a restart too."""
        start = None
        if self.start is not None:
            pictures = [
                None if png is None else base64.b64encode(png).decode() for png in (self.start.image, self.start.mask)
            ]
            start = {"image": pictures[0], "mask": pictures[1], "recipe": self.start.recipe.model_dump()}
        request = self.request.model_dump(mode="json")
        return {"request": request, "start": start, "previews": self.previews, "is_seeded": self.is_seeded}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        start = content["start"]
        if start is not None:
            mask = None if start["mask"] is None else base64.b64decode(start["mask"])
            start = Start(base64.b64decode(start["image"]), mask, RecipeStart(**start["recipe"]))
        request = GenerationRequest(**content["request"])
        return cls(request, start, content["previews"], content["is_seeded"])

    def cost(self) -> float:
        """How much there is to do, in megapixels that go through the UNet; encoding and decoding count as two more.

        Size is set.
        """
        request = self.request
        assert request.width is not None
        assert request.height is not None
        steps = request.steps * (1.0 if self.start is None else self.start.strength)
        evaluations = (2 if request.scheduler == "heun" else 1) * steps + 2
        rows = 2 if request.guidance_scale > 1 else 1
        return request.num_images * evaluations * rows * request.width * request.height / 1e6

    def fingerprint(self, base: str) -> str:
        """The same for work that makes the same images with the base of that fingerprint (a seed drawn here left out).

        Whatever else may shape an image, such as adapters, belongs in here.
        """
        asked = self.request.model_dump(mode="json", exclude=set() if self.is_seeded else {"seed"})
        start = None if self.start is None else self.start.recipe.model_dump()
        content = json.dumps([base, asked, start], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()
