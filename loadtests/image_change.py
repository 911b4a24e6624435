"""How much a setting that changes images changes those of a base: the same prompts and seeds, with and without.

python loadtests/image_change.py                                        engine.fp8 on emojixl, in float32 on a CPU
python loadtests/image_change.py --change request.step_reuse=2          a field of the request in place of a setting
python loadtests/image_change.py --base stabilityai/stable-diffusion-xl-base-1.0 --images 16 --out images/
python loadtests/image_change.py --prompts mine.txt --set compile=full

Prints the mean absolute difference of the pixels (of 255) and the PSNR, for emojixl the CLIP score of both, 100 times
the cosine of its scorer's features, and images a second, all asked for at once; on a CPU of CPU time, so that other
programs do not count. A device without 8-bit products gives the numbers of one with them, more slowly.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from lorafleet.core.config import load_settings
from lorafleet.core.errors import LorafleetError
from lorafleet.core.generation import GenerationRequest
from lorafleet.models import EMOJIXL
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Engine, Job, fp8

SUBJECTS: Final = ("red apple", "rocket", "kitty", "automobile", "green dragon", "pizza", "cat face", "bouquet")
FIELD: Final = "request."
COLOURS: Final = ("blue", "black", "yellow", "white", "pink", "green", "orange", "cyan")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    try:
        config = load_settings(BaseConfig, overrides=[f"id={options.base}", f"device={options.device}"], environ={})
        base = load_base(config)
        prompts = options.prompts.read_text().splitlines() if options.prompts else emoji_prompts(options.images)
        changes = options.change or ["fp8=true"]
        fields = [change.removeprefix(FIELD) for change in changes if change.startswith(FIELD)]
        settings = [change for change in changes if not change.startswith(FIELD)]
        plain = [job(prompts[i % len(prompts)], i, options.steps) for i in range(options.images)]
        changed = [job(prompts[i % len(prompts)], i, options.steps, fields) for i in range(options.images)]
        before, before_s = draw(base, options.set, plain)
        after, after_s = draw(base, [*options.set, *settings], changed)
    except LorafleetError as error:
        print(f"image_change: {error}", file=sys.stderr)
        return 2
    if options.out:
        save(options.out, before, after)
    print(f"{options.base} on {base.device.type} in {base.dtype}, {len(plain)} images of {options.steps} steps")
    print(f"changed by                {' '.join(changes)}")
    pairs = list(zip(before, after, strict=True))
    differences, ratios = [mean_difference(*pair) for pair in pairs], [psnr_db(*pair) for pair in pairs]
    print(f"mean absolute difference  {np.mean(differences):.2f} of 255 (largest of an image {max(differences):.2f})")
    print(f"PSNR                      {np.mean(ratios):.1f} dB (least {min(ratios):.1f})")
    if options.base == "emojixl":
        texts = [job.request.prompt for job in plain]
        without, with_it = clip_scores(before, texts), clip_scores(after, texts)
        change = with_it - without
        error = change.std() / len(texts) ** 0.5
        print(f"CLIP score                {without.mean():.2f} without, {with_it.mean():.2f} with", end="")
        print(f" (change {change.mean():+.2f}, standard error {error:.2f})")
    print(f"img/s                     {len(before) / before_s:.2f} without, {len(after) / after_s:.2f} with")
    return 0


def emoji_prompts(count: int) -> list[str]:
    """All subjects in a first colour, then in the next."""
    pairs = [
        (subject, (i + shift) % len(COLOURS)) for shift in range(len(COLOURS)) for i, subject in enumerate(SUBJECTS)
    ]
    return [f"a {subject} on a {COLOURS[colour]} background" for subject, colour in pairs[:count]]


def job(prompt: str, seed: int, steps: int, fields: Sequence[str] = ()) -> Job:
    """`fields`: others of the request, KEY=VALUE each. Raises LorafleetError."""
    given = load_settings(GenerationRequest, overrides=["prompt=any", f"steps={steps}", *fields], environ={})
    return Job(given.model_copy(update={"prompt": prompt}), seed=seed)


def draw(base: Base, overrides: Sequence[str], jobs: Sequence[Job]) -> tuple[list[Image.Image], float]:
    """The images and the seconds they took, on a CPU the seconds of CPU time. Raises LorafleetError."""
    clock = time.process_time if base.device.type == "cpu" else time.perf_counter
    settings = load_settings(EngineSettings, overrides=overrides, environ={})
    with contextlib.nullcontext() if fp8.is_possible(base.device) else fp8.emulated(), Engine(base, settings) as engine:
        start = clock()
        images = [handle.result().image for handle in [engine.submit(job) for job in jobs]]
        return images, clock() - start


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(_pixels(one) - _pixels(other)).mean())


def psnr_db(one: Image.Image, other: Image.Image) -> float:
    error = np.square(_pixels(one) - _pixels(other)).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


@torch.inference_mode()
def clip_scores(images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
    """emojixl's own scorer, in float32."""
    model = CLIPModel.from_pretrained(EMOJIXL / "scorer", dtype=torch.float32).eval()
    processor = CLIPProcessor.from_pretrained(EMOJIXL / "scorer")
    length = model.config.text_config.max_position_embeddings
    pixels = processor(images=list(images), return_tensors="pt")["pixel_values"]
    ids = processor(text=list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    shown = functional.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    said = functional.normalize(model.get_text_features(input_ids=ids["input_ids"]).pooler_output, dim=-1)
    return 100 * (shown * said).sum(-1).numpy()


def save(folder: Path, before: Sequence[Image.Image], after: Sequence[Image.Image]) -> None:
    """Side by side, without on the left."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, (left, right) in enumerate(zip(before, after, strict=True)):
        Image.fromarray(np.hstack([np.asarray(left), np.asarray(right)])).save(folder / f"{i:03}.png")


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="emojixl", help="id or folder of the base")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=Path, help="a file with one on each line; left out: 64 of emojixl's kind")
    parser.add_argument("--change", action="append", metavar="KEY=VALUE", help="left out: fp8=true")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an engine setting of both")
    parser.add_argument("--out", type=Path, help="folder for the images, side by side")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
