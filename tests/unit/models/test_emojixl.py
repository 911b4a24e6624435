"""The folder that travels with the repository, opened as anybody would, and measured with the recipe's own figures."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors import safe_open

from lorafleet.models import EMOJIXL
from lorafleet.models.build import data, evaluate
from lorafleet.models.build.captions import COLOUR_NAMES, canonical
from lorafleet.models.build.render import Renderer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def noto(require: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> data.Data:
    """The real bitmaps, read from the font."""
    path = tmp_path_factory.mktemp("noto") / "data.npz"
    prepared = data.prepare(Path(require("font")), path)
    loaded = data.load(path)
    assert loaded.emoji == prepared.emoji
    assert np.array_equal(loaded.bitmaps, prepared.bitmaps)
    return loaded


def test_it_is_small_and_fp16_safetensors_only() -> None:
    files = [f for f in EMOJIXL.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 36 * 2**20
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    for file in EMOJIXL.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(k).get_dtype() for k in weights.keys()} == {"F16"}, file  # noqa: SIM118


def test_plain_diffusers_opens_it_and_draws() -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(EMOJIXL)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red apple on a blue background", num_inference_steps=2).images[0]
    assert image.size == (128, 128)
    assert pipeline.tokenizer.pad_token_id != pipeline.tokenizer_2.pad_token_id, "as SDXL's two differ"


def test_the_scorer_is_another_model_than_the_base_s_encoders() -> None:
    scorer, *encoders = (
        json.loads((EMOJIXL / part / "config.json").read_text())
        for part in ("scorer", "text_encoder", "text_encoder_2")
    )
    for encoder in encoders:
        assert scorer["text_config"]["hidden_size"] != encoder["hidden_size"]


def test_the_card_says_the_figures_that_were_measured() -> None:
    figures = json.loads((EMOJIXL / "figures.json").read_text())
    card = (EMOJIXL / "README.md").read_text("utf-8")
    assert card == evaluate.with_figures(card, figures), "run: python -m lorafleet.models.build evaluate"


def test_the_scorer_knows_real_pictures_from_wrong_ones(noto: data.Data) -> None:
    score = evaluate.Score(EMOJIXL / "scorer", CPU)
    pairs = np.random.default_rng(0).permutation(np.argwhere(noto.held_out))[:64]
    captions = [canonical(noto.emoji[e].name, COLOUR_NAMES[c]) for e, c in pairs]
    images = evaluate.render(Renderer(noto, CPU), pairs[:, 0], np.full(64, -1), pairs[:, 1])
    similarity = 100 * score.images(images) @ score.texts(captions).T
    assert len(noto.emoji) > 1300
    assert similarity.diag().mean() >= 88
    assert (similarity.sum() - similarity.trace()) / (64 * 63) <= 25
    assert (similarity.argmax(1) == torch.arange(64)).float().mean() >= 0.95


@pytest.mark.nightly
def test_the_autoencoder_keeps_what_it_encodes(noto: data.Data) -> None:
    vae = AutoencoderKL.from_pretrained(EMOJIXL, subfolder="vae", dtype=torch.float32).eval()
    assert evaluate.autoencoder(vae, Renderer(noto, CPU), noto, 32)["vae_psnr_db"] >= 27
