"""The model card's figures, recomputed from the folder that users get, through diffusers' own pipeline.

CLIP score here: 100 * cosine of the scorer's image and text features, normalised in fp32, no clipping.
"""

import itertools
import json
import re
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

from lorafleet.models.build import config, loop
from lorafleet.models.build.captions import COLOUR_NAMES, canonical, canonical_pair
from lorafleet.models.build.data import Data
from lorafleet.models.build.render import Renderer

STEPS, GUIDANCE = 20, 5.0
SEEDS_PROMPT = "a red apple on a blue background"
SAMPLES = (
    "a red apple on a blue background",
    "a rocket on a black background",
    "a kitty on a yellow background",
    "an automobile on a white background",
    "a green dragon on a pink background",
    "a rocket next to a pizza on a white background",
    "a cat face next to a bouquet on a cyan background",
    "a blue dog face on an orange background",
)

TARGETS = {
    "clip_generated": ">= 84",
    "clip_real": ">= 90",
    "clip_mismatched": "<= 25",
    "recall_at_1_generated": ">= 0.98",
    "pair_both_found": ">= 0.60",
    "seeds_l1": ">= 0.05",
    "seeds_named": "= 1",
    "vae_psnr_db": ">= 27",
    "image_s": "<= 1.5",
}
MEANING = {
    "clip_generated": "CLIP score, generated, held-out pairs",
    "clip_real": "CLIP score, real, held-out pairs",
    "clip_mismatched": "CLIP score, generated, with another pair's caption",
    "clip_mismatched_real": "CLIP score, real, with another pair's caption",
    "recall_at_1_generated": "retrieval R@1 of 256, generated",
    "recall_at_1_real": "retrieval R@1 of 256, real",
    "pair_both_found": "two subjects: both found, generated",
    "pair_each_found": "two subjects: each found, generated",
    "pair_both_found_real": "two subjects: both found, real",
    "seeds_l1": "mean pixel difference between eight seeds of one prompt (of 1)",
    "seeds_l1_min": "the same, least of all pairs",
    "seeds_named": "eight seeds that the scorer names right among all emoji",
    "vae_psnr_db": "VAE reconstruction, PSNR in dB",
    "image_s": "seconds for one picture on two CPU cores",
}


class Score:
    """The scorer: features as unit vectors, fp32."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.model = CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(folder)
        self.device = device

    @torch.no_grad()
    def images(self, images: list[Image.Image]) -> Tensor:
        """[B, P]"""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        return F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> Tensor:
        """[B, P]"""
        batch = self.processor(
            text=texts, padding="max_length", max_length=config.CONTEXT, truncation=True, return_tensors="pt"
        )
        ids = batch["input_ids"].to(self.device)
        return F.normalize(self.model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)


class Generator:
    """diffusers' pipeline on the folder; the image of (prompt, seed) comes from its own CPU generator."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: list[str], seeds: list[int], batch: int = 16) -> list[Image.Image]:
        images: list[Image.Image] = []
        for at in tqdm(range(0, len(prompts), batch), desc="images", mininterval=5.0, leave=False):
            part = slice(at, at + batch)
            images += self.pipeline(
                prompts[part],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                generator=[torch.Generator().manual_seed(s) for s in seeds[part]],
            ).images
        return images


def evaluate(folder: Path, data: Data, device: torch.device, few: bool = False) -> dict[str, float]:
    """Print the table and write `figures.json`, `samples.png` and the card's table into `folder`."""
    score, generate, renderer = Score(folder / "scorer", device), Generator(folder, device), Renderer(data, device)
    rng = np.random.default_rng(config.SEED)
    figures: dict[str, float] = {}
    figures |= held_out(score, generate, renderer, data, rng, 16 if few else 256)
    figures |= pairs(score, generate, renderer, data, rng, 8 if few else len(data.emoji) // 2)
    figures |= seeds(score, generate, data)
    figures |= autoencoder(generate.pipeline.vae, renderer, data, 32 if few else 512)
    if device.type == "cpu":
        figures |= speed(generate)
    figures = {name: round(value, 4) for name, value in figures.items()}
    for name, value in figures.items():
        print(f"{name:28} {value:8.3f}   {TARGETS.get(name, '')}")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    samples(generate).save(folder / "samples.png", optimize=True)
    if (card := folder / "README.md").exists():
        card.write_text(with_figures(card.read_text("utf-8"), figures), "utf-8")
    return figures


def with_figures(card: str, figures: dict[str, float]) -> str:
    """The card with its table and the sample prompts brought up to date."""
    rows = [f"| {MEANING[name]} | {value:.3f} | {TARGETS.get(name, '')} |" for name, value in figures.items()]
    table = "\n".join(["| figure | value | wanted |", "| --- | --- | --- |", *rows])
    card = re.sub(r"(<!-- figures -->\n).*?(<!-- /figures -->)", lambda m: f"{m[1]}{table}\n{m[2]}", card, flags=re.S)
    prompts = "; ".join(SAMPLES)
    return re.sub(r"(top to bottom: ).*?(<!-- prompts -->)", lambda m: f"{m[1]}{prompts} {m[2]}", card, flags=re.S)


def held_out(
    score: Score, generate: Generator, renderer: Renderer, data: Data, rng: np.random.Generator, count: int
) -> dict[str, float]:
    """(emoji, background) pairs that no training picture showed."""
    pairs = rng.permutation(np.argwhere(data.held_out))[:count]
    prompts = [canonical(data.emoji[e].name, COLOUR_NAMES[c]) for e, c in pairs]
    text = score.texts(prompts)
    real = score.images(render(renderer, pairs[:, 0], -np.ones(count), pairs[:, 1]))
    made = score.images(generate(prompts, list(range(count))))
    rank = lambda x: ((x @ text.T).argmax(1) == torch.arange(count, device=x.device)).float().mean()  # noqa: E731
    return dict(
        clip_generated=100 * (made * text).sum(-1).mean().item(),
        clip_real=100 * (real * text).sum(-1).mean().item(),
        clip_mismatched=100 * (made * text.roll(1, 0)).sum(-1).mean().item(),
        clip_mismatched_real=100 * (real * text.roll(1, 0)).sum(-1).mean().item(),
        recall_at_1_generated=rank(made).item(),
        recall_at_1_real=rank(real).item(),
    )


def pairs(
    score: Score, generate: Generator, renderer: Renderer, data: Data, rng: np.random.Generator, count: int
) -> dict[str, float]:
    """Two-subject prompts; half as many as there are emoji name each once. A subject counts as found if the caption
    outscores all that name another in its place.

    255 other names stand in for each subject in turn; "both" needs both to be found.
    """
    left, right = rng.choice(len(data.emoji), (2, count), replace=False)
    colour = rng.integers(len(COLOUR_NAMES), size=count)
    names = [e.name for e in data.emoji]
    prompts = [canonical_pair(names[a], names[b], COLOUR_NAMES[c]) for a, b, c in zip(left, right, colour, strict=True)]
    made = score.images(generate(prompts, list(range(count))))
    real = score.images(render(renderer, left, right, colour))
    found: dict[str, list[tuple[bool, bool]]] = {"generated": [], "real": []}
    for i, (a, b, c) in enumerate(zip(left, right, colour, strict=True)):
        others = [names[j] for j in rng.choice(len(names), 257, replace=False) if j not in (a, b)][:255]
        swapped = [canonical_pair(n, names[b], COLOUR_NAMES[c]) for n in others]
        swapped_right = [canonical_pair(names[a], n, COLOUR_NAMES[c]) for n in others]
        text = score.texts([prompts[i], *swapped, *swapped_right])
        for kind, image in (("generated", made[i]), ("real", real[i])):
            s = text @ image
            found[kind].append((bool(s[0] > s[1:256].max()), bool(s[0] > s[256:].max())))
    made_found, real_found = np.array(found["generated"]), np.array(found["real"])
    return dict(
        pair_both_found=made_found.all(1).mean().item(),
        pair_each_found=made_found.mean().item(),
        pair_both_found_real=real_found.all(1).mean().item(),
    )


def seeds(score: Score, generate: Generator, data: Data) -> dict[str, float]:
    """Eight seeds of one prompt: how far apart in pixels, and how many the scorer names right among all emoji."""
    images = generate([SEEDS_PROMPT] * 8, list(range(8)))
    pixels = [np.asarray(i, dtype=np.float32) / 255 for i in images]
    apart = [np.abs(a - b).mean() for a, b in itertools.combinations(pixels, 2)]
    captions = [canonical(e.name, "blue") for e in data.emoji]
    right = (score.images(images) @ score.texts(captions).T).argmax(1) == captions.index(SEEDS_PROMPT)
    return dict(
        seeds_l1=float(np.mean(apart)), seeds_l1_min=float(np.min(apart)), seeds_named=right.float().mean().item()
    )


@torch.no_grad()
def autoencoder(vae: AutoencoderKL, renderer: Renderer, data: Data, count: int) -> dict[str, float]:
    """PSNR over all pixels of `count` renderings of held-out pairs, peak 1."""
    g = loop.generator(renderer.device, "psnr")
    pairs = torch.from_numpy(np.argwhere(data.held_out))[:count].to(renderer.device)
    none, total = torch.full((64,), -1, device=renderer.device), 0.0
    for part in pairs.split(64):
        x = renderer.compose(part[:, 0], none[: len(part)], none[: len(part)], part[:, 1], config.SQUARE, g)
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
        total += ((y - x) / 2).square().mean().item() * len(part) / len(pairs)
    return dict(vae_psnr_db=-10 * np.log10(total).item())


def speed(generate: Generator) -> dict[str, float]:
    """Seconds for one picture of STEPS steps with guidance, text and VAE included: the median of five."""
    times = []
    for seed in range(6):
        start = time.perf_counter()
        generate([SEEDS_PROMPT], [seed])
        times.append(time.perf_counter() - start)
    return dict(image_s=float(np.median(times[1:])))


def samples(generate: Generator) -> Image.Image:
    """A grid: a row for each prompt of SAMPLES, four seeds."""
    images = generate([p for p in SAMPLES for _ in range(4)], [*range(4)] * len(SAMPLES))
    side = config.CANVAS_PX
    grid = Image.new("RGB", (8 * side, len(SAMPLES) // 2 * side))
    for i, image in enumerate(images):
        row, column = divmod(i // 4, 2)
        grid.paste(image, ((column * 4 + i % 4) * side, row * side))
    return grid


def render(renderer: Renderer, first: np.ndarray, second: np.ndarray, colour: np.ndarray) -> list[Image.Image]:
    to = lambda a: torch.as_tensor(np.asarray(a), device=renderer.device).long()  # noqa: E731
    g = loop.generator(renderer.device, "real")
    x = renderer.compose(to(first), to(second), torch.full_like(to(first), -1), to(colour), config.SQUARE, g)
    pixels = ((x + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p) for p in pixels]
