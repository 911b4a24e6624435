"""`make train-demo`: trains both sample styles and says whether they were learnt.

For each style, pictures of the same prompts and seeds are made with and without the adapter, at its full weight (as
`NAME` in a request), of subjects that training did not show. Two figures, both by the base's own scorer:
    style   mean cosine between a picture and the style's held-out pictures, times 100
    CLIP    how well a picture fits its prompt
Each change is a mean over prompts with a 95 % interval by bootstrap over prompts. A grid (above without, below with the
adapter) and `results.json` go to OUT; each run's `report.html` has such a grid of six of the prompts. Ends with 1
unless each style is nearer, its interval above zero, and the prompts' CLIP score has not fallen by more than 3.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorafleet.core.generation import GenerationRequest
from lorafleet.core.registry import open_registry
from lorafleet.core.registry_config import RegistryConfig
from lorafleet.models import SAMPLE_REGISTRY
from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.clip_score import ClipScorer, clip_scores, scorer_of
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.serve.config import BankConfig, EngineSettings
from lorafleet.serve.engine import Engine, Job, JobAdapter

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"noto-sticker": 900, "noto-spotlight": 400}
"""Of training: an edge around a drawing is finer work than a glow behind it."""
STYLES = tuple(STEPS)
WEIGHT = 1.0
DRAWING = EngineSettings(exact=False, max_batch=8, bank=BankConfig(slots=2))
SHOWN = 8
REPORTED = 6
RESAMPLES = 10_000
MAX_CLIP_FALL = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "train-demo")
    parser.add_argument("--steps", type=int, help="of training, for each style")
    parser.add_argument("--styles", nargs="+", default=STYLES, choices=STYLES)
    parser.add_argument("--ship", action="store_true", help="put what was learnt into models/registry")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    trainings = {style: start_training(style, given.steps) for style in given.styles}
    base = load_base(BaseConfig())
    scorer = scorer_of(base.folder.root, base.device)
    assert scorer is not None
    results = {}
    try:
        with Engine(base, DRAWING) as engine:
            for style in sorted(trainings, key=lambda style: given.steps or STEPS[style]):  # as they get ready
                if trainings[style].wait():
                    sys.exit(f"training {style} failed")
                trained_s = time.perf_counter() - started
                results[style] = judged(style, engine, scorer, given.out)
    finally:
        for process in trainings.values():
            process.terminate()
    seconds = time.perf_counter() - started
    (given.out / "results.json").write_text(
        json.dumps({"seconds": round(seconds, 1), "training_seconds": round(trained_s, 1), **results}, indent=1)
    )
    print(f"{'adapter':<22}{'style score':>34}{'CLIP score of the prompts':>34}{'of real pictures':>20}")
    for style, found in results.items():
        print(f"{style:<22}{spelled(found['style']):>34}{spelled(found['clip']):>34}{found['real_clip']:>20.1f}")
    print(f"{seconds:.0f} s, of which training {trained_s:.0f} s; {given.out}")
    failed = [style for style, found in results.items() if not was_learnt(found)]
    if failed:
        sys.exit(f"not learnt: {', '.join(failed)}")
    if given.ship:
        ship(given.styles)


def start_training(style: str, steps: int | None) -> "subprocess.Popen[bytes]":
    """One thread each, all styles at once: two cores do more so than two threads of one process."""
    command = [str(Path(sys.executable).with_name("lorafleet")), "train", str(ROOT / "samples" / style / "train")]
    command += ["--name", style, "--config", str(ROOT / "samples" / "train.yaml")]
    prompts = held_out(ROOT / "samples" / style / "held_out")[0][:REPORTED]
    command += ["--set", f"validation.prompts={json.dumps(prompts)}"]
    command += ["--set", f"loop.steps={steps or STEPS[style]}"]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def was_learnt(found: dict[str, Any]) -> bool:
    return bool(found["style"]["low"] > 0 and found["clip"]["change"] >= -MAX_CLIP_FALL)


def judged(style: str, engine: Engine, scorer: ClipScorer, out: Path) -> dict[str, Any]:
    """The figures of one style, and its grid."""
    registry = open_registry(RegistryConfig())
    manifest = registry.resolve(f"{style}@latest").manifest
    assert engine.bank is not None
    adapter = JobAdapter(style, WEIGHT, partial(read_adapter, registry.pull(manifest), engine.bank.targets))
    prompts, wanted = held_out(ROOT / "samples" / style / "held_out")
    before, after = pictures(engine, prompts), pictures(engine, prompts, adapter)
    grid([before[:SHOWN], after[:SHOWN]]).save(out / f"{style}.png")
    texts, real, seen_before, seen_after = scorer.texts(prompts), *map(scorer.images, (wanted, before, after))
    style_before, style_after = (100 * (seen @ real.T).mean(1) for seen in (seen_before, seen_after))
    return {
        "weight": WEIGHT,
        "prompts": len(prompts),
        "style": change(style_before, style_after),
        "clip": change(clip_scores(seen_before, texts), clip_scores(seen_after, texts)),
        "real_clip": clip_scores(real, texts).mean().item(),
    }


def ship(styles: Sequence[str]) -> None:
    """Makes the newest adapters of these styles the ones that a new registry begins with."""
    own = open_registry(RegistryConfig())
    for style in styles:
        version = own.resolve(f"{style}@latest").manifest.version
        source, target = (Path(root) / "adapters" / style for root in (own.url, SAMPLE_REGISTRY))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source / version, target / version)
        shutil.copytree(source / "aliases", target / "aliases", ignore=lambda _, names: {*names} - {"latest"})


def held_out(folder: Path) -> tuple[list[str], list[Image.Image]]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    prompts = [row["text"] if isinstance(row["text"], str) else row["text"][0] for row in rows]
    return prompts, [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]


def pictures(engine: Engine, prompts: Sequence[str], *adapters: JobAdapter) -> list[Image.Image]:
    requests = [GenerationRequest(prompt=prompt, steps=20) for prompt in prompts]
    handles = [engine.submit(Job(request, seed=i, adapters=adapters)) for i, request in enumerate(requests)]
    return [handle.result().image for handle in handles]


def change(before: torch.Tensor, after: torch.Tensor) -> dict[str, float]:
    """Paired, with the 95 % percentile interval of the mean over resampled prompts."""
    differences = after - before
    drawn = torch.randint(len(differences), (RESAMPLES, len(differences)), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(differences[drawn].mean(1), torch.tensor([0.025, 0.975])).tolist()
    return {
        "before": before.mean().item(),
        "after": after.mean().item(),
        "change": differences.mean().item(),
        "low": low,
        "high": high,
    }


def spelled(found: dict[str, float]) -> str:
    return (
        f"{found['before']:.1f} -> {found['after']:.1f}  {found['change']:+.1f} [{found['low']:+.1f}, "
        f"{found['high']:+.1f}]"
    )


def grid(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    side = rows[0][0].width
    whole = Image.new("RGB", (side * len(rows[0]), side * len(rows)))
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            whole.paste(image, (column * side, row * side))
    return whole


if __name__ == "__main__":
    main()
