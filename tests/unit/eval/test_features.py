"""Scorers by path: CLIP and SigLIP, warnings where one would mislead, FID with a network of one's own."""

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from lorafleet.core.errors import BaseNotFound, BaseUnreadable, ConfigError
from lorafleet.eval.captioned import read_captioned
from lorafleet.eval.config import EvalConfig
from lorafleet.eval.features import FeatureModel
from lorafleet.eval.run import Picture
from lorafleet.eval.scorers import Context, Fid, Samples
from lorafleet.eval.suites import load_suite
from lorafleet.models import EMOJIXL


def config(**scorer: object) -> EvalConfig:
    return EvalConfig.model_validate({"base": {"device": "cpu"}, "scorer": scorer})


def test_the_bases_own_text_encoder_as_a_scorer_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = CLIPModel.from_pretrained(EMOJIXL / "scorer", dtype=torch.float32)
    theirs = CLIPTextModel.from_pretrained(EMOJIXL / "text_encoder", dtype=torch.float32)
    width = theirs.config.hidden_size
    embedding = next(v for k, v in theirs.state_dict().items() if k.endswith("token_embedding.weight"))
    model.text_model.embeddings.token_embedding.weight = torch.nn.Parameter(
        torch.nn.functional.pad(embedding, (0, model.config.text_config.hidden_size - width))
    )
    model.save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(EMOJIXL / "scorer").save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert not FeatureModel.load(config(model="base")).about["is_own_text_encoder"]
        assert not FeatureModel.load(config(model=str(tmp_path))).about["is_own_text_encoder"]  # another width
        assert not caplog.records
        circular = FeatureModel.load(
            EvalConfig.model_validate(
                {
                    "base": {"device": "cpu", "id": str(_base_with(tmp_path / "base", model))},
                    "scorer": {"model": str(tmp_path)},
                }
            )
        )
    assert circular.about["is_own_text_encoder"]
    assert "scores pictures by what drew them" in caplog.text


def _base_with(folder: Path, model: CLIPModel) -> Path:
    """emojixl, its first text encoder another one in half precision."""
    from transformers import CLIPTextConfig

    folder.mkdir()
    for part in EMOJIXL.iterdir():
        if part.name != "text_encoder":
            (folder / part.name).symlink_to(part)
    text = CLIPTextModel(CLIPTextConfig(**model.config.text_config.to_dict()))
    text.load_state_dict(model.text_model.state_dict(), strict=False)
    for name, tensor in text.state_dict().items():
        if name.endswith("token_embedding.weight"):
            tensor.copy_(model.text_model.embeddings.token_embedding.weight.detach())
    text.half().save_pretrained(folder / "text_encoder")
    return folder


def test_siglip_scores_too(tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tiny, "vocab_size": 2048, "max_position_embeddings": 40, "projection_size": 16}
    torch.manual_seed(0)
    SiglipModel(
        SiglipConfig(text_config=text, vision_config={**tiny, "image_size": 32, "patch_size": 16})
    ).save_pretrained(tmp_path)
    tokenizer = CLIPProcessor.from_pretrained(EMOJIXL / "scorer").tokenizer
    images = SiglipImageProcessor(size={"height": 32, "width": 32})
    SiglipProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(tmp_path)
    model = FeatureModel.load(config(model=str(tmp_path)))
    assert model.images([Image.new("RGB", (64, 64), "red")]).shape == model.texts(["a cat"]).shape == (1, 16)
    assert model.about["image_px"] == 32
    assert model.about["window_tokens"] == 40


def test_mlperfs_name_with_another_model_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    FeatureModel.load(config(definition="mlperf"))
    assert "no ViT-B/32: the numbers do not compare with MLPerf's" in caplog.text


def test_odd_pictures_are_told() -> None:
    model = FeatureModel.load(config())
    assert model.size_warnings([(128, 128)]) == []
    assert model.size_warnings([(64, 64), (256, 128)]) == [
        "1 of 2 pictures (64x64) are enlarged to 128 px",
        "1 of 2 pictures (256x128) are cut to a square or squeezed",
    ]


def test_scorers_that_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(BaseNotFound, match="there is no scorer folder"):
        FeatureModel.load(config(model="/nowhere"))
    with pytest.raises(BaseNotFound, match="the scorer openai/nothing does not load"):
        FeatureModel.load(config(model="openai/nothing"))
    with pytest.raises(BaseUnreadable, match="does not load"):
        FeatureModel.load(config(model=str(tmp_path)))
    with pytest.raises(BaseUnreadable, match="embeds no pictures and texts"):
        FeatureModel.load(config(model=str(EMOJIXL / "text_encoder")))
    with pytest.raises(ConfigError, match="leave its revision out"):
        FeatureModel.load(config(model=str(tmp_path), revision="main"))


class Mean(torch.nn.Module):
    """In place of Inception: three features, the mean of each colour."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().mean(dim=(2, 3))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_fid_is_the_frechet_distance_of_the_given_networks_features(repo: Path, tmp_path: Path) -> None:
    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    real = repo / "samples" / "noto-sticker" / "held_out"
    drawn = [each.file for each in read_captioned(repo / "samples" / "noto-spotlight" / "held_out")]
    settings = EvalConfig.model_validate(
        {"base": {"device": "cpu"}, "reference": str(real), "fid_weights": str(tmp_path / "mean.pt")}
    )
    context = Context(settings, load_suite("classic5"), FeatureModel.load(settings))
    measured = Fid(context).measure(Samples(context, tuple(Picture(0, i, None, f) for i, f in enumerate(drawn))))
    assert measured is not None
    a, b = (_colours(files) for files in ([each.file for each in read_captioned(real)], drawn))
    spread = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).sqrt().real.sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * spread
    assert measured.value == pytest.approx(float(wanted), rel=1e-3)
    assert not measured.higher_is_better


def _colours(files: list[Path]) -> torch.Tensor:
    import numpy as np

    pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return torch.stack([torch.tensor(each.reshape(-1, 3).mean(0)) for each in pixels])
