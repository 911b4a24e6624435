"""Scores as pure functions of features. `[n, P]` are features of n pictures or texts, any float type and length."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from lorafleet.eval.config import DefinitionName

Array = npt.NDArray[np.float64]

HESSEL_W: Final = 2.5
CMMD_SIGMA: Final = 10.0
CMMD_SCALE: Final = 1000.0
DEFINITIONS: Final[dict[DefinitionName, str]] = {
    "cosine": "100 cos(image, text), not clipped",
    "hessel": "2.5 max(cos(image, text), 0), https://arxiv.org/abs/2104.08718 section 3",
    "mlperf": "100 cos(image, text), not clipped, by ViT-B/32 of OpenAI, as MLPerf Inference's text-to-image task",
}


def unit(features: torch.Tensor) -> torch.Tensor:
    """[n, P] -> float32 vectors of length 1, on the CPU. A zero vector stays zero."""
    vectors = features.detach().to("cpu", torch.float32)
    lengths: torch.Tensor = vectors.norm(dim=-1, keepdim=True)
    return vectors / lengths.clamp_min(torch.finfo(torch.float32).tiny)


def clip_score(images: torch.Tensor, texts: torch.Tensor, definition: DefinitionName = "cosine") -> torch.Tensor:
    """Of pairs: [n, P] and [n, P] -> [n], float32. `DEFINITIONS` says what each is.

    Raises ValueError where the two are not of one model.
    """
    if images.shape != texts.shape:
        raise ValueError(f"features of pictures {list(images.shape)} and texts {list(texts.shape)} cannot be paired")
    cosines = (unit(images) * unit(texts)).sum(-1)
    return HESSEL_W * cosines.clamp_min(0) if definition == "hessel" else 100 * cosines


def retrieval_hits(images: torch.Tensor, texts: torch.Tensor, own: Sequence[int]) -> torch.Tensor:
    """Whether each picture is nearest to its own text: [n, P], [m, P], own[n] of m -> [n], 1 or 0. Of equal ones the
    first counts."""
    nearest = (unit(images) @ unit(texts).T).argmax(1)
    return (nearest == torch.tensor(list(own))).float()


def diversity(images: torch.Tensor) -> float:
    """Of the seeds of one prompt, [k, P], k >= 2: 100 (1 - mean cosine of two of them), 0 for equal pictures."""
    vectors = unit(images).double()
    k = len(vectors)
    total = (vectors @ vectors.T).sum() - vectors.square().sum()
    return 100 * (1 - float(total) / (k * (k - 1)))


def similarity(images: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """[n, P] to all of a set [m, P] -> [n], 100 times the mean cosine."""
    return 100 * (unit(images) @ unit(reference).T).mean(1)


def cmmd(
    images: torch.Tensor,
    reference: torch.Tensor,
    image_counts: npt.ArrayLike | None = None,
    reference_counts: npt.ArrayLike | None = None,
) -> float:
    """Distance of two sets [n, P] and [m, P]: 1000 times the squared maximum mean discrepancy under a Gaussian kernel
    of sigma 10 on unit vectors, unbiased, so that it may be slightly below 0 (Jayasumana et al. 2024,
    https://arxiv.org/abs/2401.09603, equations 3 and 4; there by ViT-L/14 at 336 px).

    `*_counts`: how often each is taken, for resampling; a picture is never paired with itself.
    """
    first, second = unit(images).double(), unit(reference).double()
    x, y = _counts(image_counts, len(first)), _counts(reference_counts, len(second))
    within = [_mean_apart(_kernel(a, a), counts) for a, counts in ((first, x), (second, y))]
    between = float((x[:, None] * y[None] * _kernel(first, second)).sum() / (x.sum() * y.sum()))
    return CMMD_SCALE * (within[0] + within[1] - 2 * between)


def cmmd_interval(
    images: torch.Tensor,
    prompt: Sequence[int],
    reference: torch.Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """Of `cmmd`, by resampling prompts (prompt[n]: which one each picture is of) and reference pictures; quantiles.

    Where chance draws a single picture, over and over, there is no distance, and the draw is left out.
    """
    generator = np.random.default_rng([seed, 2])
    index = np.unique(np.asarray(prompt), return_inverse=True)[1]
    prompts = int(index.max()) + 1
    first, second = unit(images).double(), unit(reference).double()
    kernels = _kernel(first, first), _kernel(second, second), _kernel(first, second)
    values = []
    for _ in range(resamples):
        drawn = np.bincount(generator.integers(0, prompts, prompts), minlength=prompts)
        x = torch.from_numpy(drawn[index].astype(np.float64))
        y = torch.from_numpy(
            np.bincount(generator.integers(0, len(second), len(second)), minlength=len(second)).astype(np.float64)
        )
        between = float(x @ kernels[2] @ y / (x.sum() * y.sum()))
        values.append(CMMD_SCALE * (_mean_apart(kernels[0], x) + _mean_apart(kernels[1], y) - 2 * between))
    low, high = np.nanquantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _kernel(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    squared = (first.square().sum(1)[:, None] + second.square().sum(1)[None] - 2 * first @ second.T).clamp_min(0)
    return torch.exp(-squared / (2 * CMMD_SIGMA**2))


def _mean_apart(kernel: torch.Tensor, counts: torch.Tensor) -> float:
    """Mean of the kernel over pairs of different members, each as often as it is counted."""
    pairs = counts.sum() ** 2 - counts.square().sum()
    if pairs <= 0:
        return math.nan
    return float((counts @ kernel @ counts - (counts.square() * kernel.diagonal()).sum()) / pairs)


def _counts(given: npt.ArrayLike | None, length: int) -> torch.Tensor:
    if given is None:
        return torch.ones(length, dtype=torch.float64)
    return torch.from_numpy(np.asarray(given, dtype=np.float64))
