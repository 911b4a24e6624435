"""CLIP score beside other people's, and where they part; distances of sets."""

import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.functional.multimodal import clip_score as their_clip_score
from torchmetrics.multimodal import CLIPScore

from lorafleet.eval.config import EvalConfig
from lorafleet.eval.features import FeatureModel
from lorafleet.eval.scores import clip_score, cmmd, cmmd_interval, diversity, retrieval_hits, similarity
from lorafleet.models import EMOJIXL

PROMPTS = ["a red apple on a blue background", "a rocket on a black background", "a pizza"]


@pytest.fixture(scope="module")
def model() -> FeatureModel:
    return FeatureModel.load(EvalConfig.model_validate({"base": {"device": "cpu"}}))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    sheet = Image.open(EMOJIXL / "samples.png").convert("RGB")  # four seeds each of eight prompts, 128 px
    return [sheet.crop((x * 128, 0, (x + 1) * 128, 128)) for x in (0, 4, 5)]


class _Unwrapped:
    """The scorer as torchmetrics 1.9 wants it: it reads features, transformers 5 gives an output that holds them."""

    def __init__(self, model: Any) -> None:
        self.config, self._model = model.config, model

    def to(self, device: torch.device) -> "_Unwrapped":
        return self

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._model.get_image_features(pixel_values=pixels).pooler_output
        return features.detach()

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output
        return features.detach()


def torchmetrics_score(model: FeatureModel, pictures: list[Image.Image], texts: list[str]) -> float:
    tensors = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]
    scorer = (_Unwrapped(model.scorer.model), model.scorer.processor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return their_clip_score(tensors, texts, lambda: scorer).item()  # type: ignore[arg-type,return-value]


def test_equals_torchmetrics_on_whole_prompts(model: FeatureModel, pictures: list[Image.Image]) -> None:
    ours = clip_score(model.images(pictures), model.texts(PROMPTS)).mean().item()
    assert ours == pytest.approx(torchmetrics_score(model, pictures, PROMPTS), abs=1e-4)
    assert ours > 20  # the prompts are those of two of the pictures


def test_equals_torchmetrics_formula_on_features() -> None:
    """Its own update and compute, the model left out."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randn(50, 64, generator=generator)
    images = texts + torch.randn(50, 64, generator=generator)
    metric = CLIPScore(lambda: (_Features(images, texts), _Passing()))  # type: ignore[arg-type,return-value]
    metric.update(list(torch.zeros(50, 3, 8, 8)), ["x"] * 50)
    assert clip_score(images, texts).mean().item() == pytest.approx(metric.compute().item(), abs=1e-4)


def test_equals_open_clips_way_in_half_precision() -> None:
    """Features normalised by F.normalize and multiplied as a matrix; ours takes half precision to float32 first."""
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.randn(9, 512, generator=generator), torch.randn(9, 512, generator=generator)
    theirs = 100 * (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).diagonal()
    torch.testing.assert_close(clip_score(images, texts), theirs, atol=1e-4, rtol=0)
    halved = clip_score(images.half(), texts.half())
    assert halved.dtype == torch.float32
    exact = clip_score(images.half().double(), texts.half().double())
    torch.testing.assert_close(halved, exact, atol=1e-4, rtol=0)


def test_parts_from_torchmetrics_where_the_mean_is_below_zero() -> None:
    """It clamps the mean, which hides a system that is worse than chance; we do not, nor single pictures."""
    generator = torch.Generator().manual_seed(2)
    texts = torch.randn(20, 64, generator=generator)
    images = -texts
    metric = CLIPScore(lambda: (_Features(images, texts), _Passing()))  # type: ignore[arg-type,return-value]
    metric.update(list(torch.zeros(20, 3, 8, 8)), ["x"] * 20)
    assert metric.compute().item() == 0.0
    assert clip_score(images, texts).mean().item() == pytest.approx(-100, abs=1e-4)
    assert clip_score(images, texts, "hessel").max().item() == 0.0


def test_parts_from_torchmetrics_on_prompts_over_the_window(model: FeatureModel, pictures: list[Image.Image]) -> None:
    """It cuts the end token off with the rest, where CLIP's text tower looks for its output; we cut before it."""
    long = PROMPTS[0] + " and a table" * 20
    ours = clip_score(model.images(pictures[:1]), model.texts([long])).item()
    tokenizer = model.scorer.processor.tokenizer
    kept = tokenizer(long, truncation=True, max_length=model.about["window_tokens"])["input_ids"]
    assert kept[-1] == tokenizer.eos_token_id
    assert model.truncated([long, PROMPTS[0]]) == [True, False]
    theirs = torchmetrics_score(model, pictures[:1], [long])
    assert abs(ours - theirs) > 0.1


def test_hessels_weight_and_clipping() -> None:
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert clip_score(image, text).item() == pytest.approx(60)
    assert clip_score(image, text, "mlperf").item() == pytest.approx(60)
    assert clip_score(image, text, "hessel").item() == pytest.approx(1.5)
    with pytest.raises(ValueError, match="cannot be paired"):
        clip_score(torch.zeros(2, 3), torch.zeros(2, 4))


def test_retrieval_diversity_and_similarity_by_hand() -> None:
    texts = torch.eye(3)
    images = torch.tensor([[1.0, 0.1, 0.0], [0.9, 1.0, 0.0], [1.0, 0.0, 0.1]])
    assert retrieval_hits(images, texts, [0, 1, 2]).tolist() == [1.0, 1.0, 0.0]
    assert diversity(torch.eye(2)) == pytest.approx(100)
    assert diversity(torch.ones(3, 4)) == pytest.approx(0, abs=1e-6)
    assert similarity(torch.tensor([[2.0, 0.0]]), torch.eye(2)).item() == pytest.approx(50)


def test_cmmd_is_none_for_equal_distributions_and_grows_with_a_shift() -> None:
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(300, 16, generator=generator), torch.randn(200, 16, generator=generator)
    assert abs(cmmd(first, second)) < 0.2
    near, far = cmmd(first + 0.3, second), cmmd(first + 1.0, second)
    assert 0.2 < near < far
    low, high = cmmd_interval(first + 1.0, [i // 3 for i in range(300)], second, resamples=200)
    assert low < far < high
    assert low > near


def test_cmmd_by_hand() -> None:
    """Two points each: within pairs of a set, between all four."""
    kernel = lambda squared: np.exp(-squared / 200)  # noqa: E731
    images, reference = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    between = (kernel(0) + kernel(4) + 2 * kernel(2)) / 4
    assert cmmd(images, reference) == pytest.approx(1000 * (kernel(2) + kernel(4) - 2 * between), abs=1e-9)


class _Features:
    """Stands where torchmetrics looks for a model; gives features that are there."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        self.config = SimpleNamespace()
        self._images, self._texts = images, texts

    def to(self, device: torch.device) -> "_Features":
        return self

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._images

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self._texts


class _Passing:
    def __call__(self, **given: Any) -> dict[str, torch.Tensor]:
        ones = torch.ones(1, 1)
        return {"pixel_values": ones, "input_ids": ones, "attention_mask": ones}
