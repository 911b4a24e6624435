"""Scorers: each one class that looks at the pictures of one system. Ours are below; others come as plug-ins.

A plug-in is a package with an entry point in the group `lorafleet.eval.scorers`, whose name is what `scores` calls it:

    [project.entry-points."lorafleet.eval.scorers"]
    aesthetic = "my_package:Aesthetic"

    class Aesthetic:
        def __init__(self, context: Context) -> None: ...
        def measure(self, samples: Samples) -> Measured | None:
            return Measured(per_image=self.model(samples.images()), about={"model": "my-aesthetic-2"})
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from lorafleet.core.errors import ConfigError, DataUnreadable
from lorafleet.eval.captioned import read_captioned
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.features import FeatureModel
from lorafleet.eval.images import read_picture
from lorafleet.eval.run import Picture
from lorafleet.eval.scores import (
    DEFINITIONS,
    clip_score,
    cmmd,
    cmmd_interval,
    diversity,
    retrieval_hits,
    similarity,
)
from lorafleet.eval.statistics import by_prompt
from lorafleet.eval.suites import Suite

GROUP: Final = "lorafleet.eval.scorers"
CMMD_RESAMPLES: Final = 500


@dataclass(frozen=True)
class Measured:
    """A scorer's finding about one system.

    One of `per_image[n]`, `per_prompt[prompts]` (NaN: none) and `value` (of the whole set, with its interval) is given.
    `about`: what one must know to compare the number; JSON.
    """

    per_image: npt.ArrayLike | None = None
    per_prompt: npt.ArrayLike | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True
    about: Mapping[str, Any] = field(default_factory=dict)

    def by_prompt(self, samples: "Samples") -> npt.NDArray[np.float64] | None:
        """One number a prompt, seeds averaged; None where there is but one for the whole set."""
        if self.per_image is not None:
            return by_prompt(self.per_image, samples.prompt, len(samples.suite.prompts))
        return None if self.per_prompt is None else np.asarray(self.per_prompt, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Context:
    """What scorers share. `text_features[prompts, P]` and `reference_features[m, P]` are computed once."""

    config: EvalConfig
    suite: Suite
    features: FeatureModel

    @cached_property
    def text_features(self) -> torch.Tensor:
        return self.features.texts([each.text for each in self.suite.prompts])

    @cached_property
    def truncation(self) -> list[str]:
        """Ids of the prompts that the scorer's window cuts."""
        prompts = self.suite.prompts
        cut = self.features.truncated([each.text for each in prompts])
        return [prompt.id for prompt, is_cut in zip(prompts, cut, strict=True) if is_cut]

    @cached_property
    def reference_features(self) -> torch.Tensor | None:
        if self.config.reference is None:
            return None
        pictures = [read_picture(each.file) for each in read_captioned(self.config.reference)]
        if len(pictures) < 2:
            raise DataUnreadable(f"the reference {self.config.reference} needs two pictures at least.")
        return self.features.images(pictures)


@dataclass(frozen=True, eq=False)
class Samples:
    """The pictures of one system, by prompt and seed. `prompt[n]`: which of the suite's prompts each is of."""

    context: Context
    pictures: tuple[Picture, ...]

    @property
    def suite(self) -> Suite:
        return self.context.suite

    @cached_property
    def prompt(self) -> list[int]:
        return [each.prompt for each in self.pictures]

    def images(self) -> list[Image.Image]:
        """All of them, RGB, read anew."""
        return [read_picture(each.file) for each in self.pictures]

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) in pixels."""
        found = []
        for each in self.pictures:
            with Image.open(each.file) as image:
                found.append(image.size)
        return found

    @cached_property
    def features(self) -> torch.Tensor:
        """[n, P], unit vectors."""
        batch = 256  # pictures in memory at once
        parts = []
        for at in range(0, len(self.pictures), batch):
            images = [read_picture(each.file) for each in self.pictures[at : at + batch]]
            parts.append(self.context.features.images(images))
        return torch.concat(parts)


class Scorer(Protocol):
    """Measures one system after the other."""

    def measure(self, samples: Samples) -> Measured | None:
        """None where the samples do not allow it, such as a diversity of single pictures."""


class ClipScore:
    """How well pictures fit their prompts."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def measure(self, samples: Samples) -> Measured:
        texts, definition = self._context.text_features[samples.prompt], self._context.config.scorer.definition
        cut = self._context.truncation
        about = {
            "definition": definition,
            "formula": DEFINITIONS[definition],
            "truncation_rate": len(cut) / len(samples.suite.prompts),
            "truncated": cut,
            **self._context.features.about,
        }
        scores = clip_score(samples.features, texts, definition)
        return Measured(per_image=scores.numpy(), about=about)


class RetrievalAt1:
    """Share of pictures that are nearer to their own prompt than to any other of the suite, in percent."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def measure(self, samples: Samples) -> Measured:
        hits = retrieval_hits(samples.features, self._context.text_features, samples.prompt)
        about = {"of": len(samples.suite.prompts), **self._context.features.about}
        return Measured(per_image=100 * hits.numpy(), about=about)


class Diversity:
    """How different the seeds of a prompt are."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def measure(self, samples: Samples) -> Measured | None:
        prompt = np.asarray(samples.prompt)
        values = np.full(len(samples.suite.prompts), np.nan)
        for number in np.unique(prompt):
            rows = np.flatnonzero(prompt == number)
            if len(rows) > 1:
                values[number] = diversity(samples.features[rows])
        if np.isnan(values).any():
            return None
        return Measured(per_prompt=values, about=self._context.features.about)


class Similarity:
    """How near pictures are to those of the reference, whatever their prompts: for a style."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def measure(self, samples: Samples) -> Measured | None:
        reference = self._context.reference_features
        if reference is None:
            return None
        about = {"reference": str(self._context.config.reference), "of": len(reference), **self._context.features.about}
        return Measured(per_image=similarity(samples.features, reference).numpy(), about=about)


class Cmmd:
    """How far the set of pictures is from the reference's; less is better."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def measure(self, samples: Samples) -> Measured | None:
        reference, statistics = self._context.reference_features, self._context.config.statistics
        if reference is None or len(samples.pictures) < 2:
            return None
        low, high = cmmd_interval(
            samples.features,
            samples.prompt,
            reference,
            confidence=statistics.confidence,
            resamples=CMMD_RESAMPLES,
            seed=statistics.seed,
        )
        about = {"reference": str(self._context.config.reference), "of": len(reference), **self._context.features.about}
        value = cmmd(samples.features, reference)
        return Measured(value=value, low=low, high=high, higher_is_better=False, about=about)


class Fid:
    """Frechet distance of Inception features, by torchmetrics with the user's weights; less is better."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._inception = load_inception(context.config.fid_weights)

    def measure(self, samples: Samples) -> Measured | None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        reference = self._context.config.reference
        if reference is None:
            raise ConfigError("the score fid needs `reference`, a folder of real pictures.", param="reference")
        metric = FrechetInceptionDistance(feature=self._inception)
        for is_real, files in (
            (True, [each.file for each in read_captioned(reference)]),
            (False, [each.file for each in samples.pictures]),
        ):
            for file in files:
                metric.update(_pixels(read_picture(file)), real=is_real)
        about = {"weights": str(self._context.config.fid_weights), "reference": str(reference)}
        return Measured(value=float(metric.compute()), higher_is_better=False, about=about)


def load_inception(weights: Path | None) -> torch.nn.Module:
    """A TorchScript network, uint8 [1, 3, H, W] -> features [1, F]. Raises ConfigError."""
    if weights is None or not weights.is_file():
        raise ConfigError(
            f"the score fid needs fid_weights, a TorchScript file of an Inception network, not {weights or 'none'}.",
            param="fid_weights",
        )
    try:
        import torchmetrics  # noqa: F401 - says now that it is missing
    except ImportError:
        raise ConfigError('the score fid needs torchmetrics: pip install "lorafleet[fid]"', param="scores") from None
    try:
        script = torch.jit.load(str(weights), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{weights} is no TorchScript file: {str(error).splitlines()[0]}", param="fid_weights"
        ) from error
    return _Inception(script)


class _Inception(torch.nn.Module):
    """What torchmetrics asks of a network: uint8 pictures of any size in, features [n, F] out."""

    def __init__(self, script: Any) -> None:
        super().__init__()
        self.script = script
        names = [argument.name for argument in script.forward.schema.arguments]
        self._options = {"return_features": True} if "return_features" in names else {}  # as NVIDIA's file has it
        self.num_features = int(self(torch.zeros(1, 3, 299, 299, dtype=torch.uint8)).shape[1])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            features: torch.Tensor = self.script(pixels, **self._options)
        return features.flatten(1)


def _pixels(image: Image.Image) -> torch.Tensor:
    """uint8 [1, 3, H, W]"""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


SCORERS: Final[Mapping[str, Callable[[Context], Scorer]]] = {
    "clip": ClipScore,
    "r1": RetrievalAt1,
    "diversity": Diversity,
    "similarity": Similarity,
    "cmmd": Cmmd,
    "fid": Fid,
}


def make_scorers(context: Context) -> dict[str, Scorer]:
    """Those that `scores` names, ours and plug-ins. Raises ConfigError for a name that is none."""
    plugins: dict[str, Any] = {point.name: point for point in metadata.entry_points(group=GROUP)}
    made: dict[str, Scorer] = {}
    for name in context.config.scores:
        if name in SCORERS:
            made[name] = SCORERS[name](context)
        elif name in plugins:
            made[name] = plugins[name].load()(context)
        else:
            known = ", ".join([*SCORERS, *sorted(plugins)])
            raise ConfigError(f"there is no score {name}: known are {known}.", param="scores")
    return made
