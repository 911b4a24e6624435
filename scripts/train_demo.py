"""`make train-demo`: trains both sample styles and says whether they were learnt.

For each style, pictures of the same prompts and seeds are made with and without the adapter, of subjects that training
did not show. Two figures, both by the base's own scorer:
    style   mean cosine between a picture and the style's held-out pictures, times 100
    CLIP    how well a picture fits its prompt
Each change is a mean over prompts with a 95 % interval by bootstrap over prompts. The scorer knows the base's own style
only: real pictures of the style, whose CLIP score is printed too, fit their captions less well for it than the base's
do. So an adapter is shown at half weight and at full: as `NAME:0.5` and `NAME` in a request. A grid (without, half,
full) and `results.json` go to OUT. Ends with 1 unless at one of the weights each style is nearer, its interval above
zero; for fluent-3d the prompts' CLIP score must not have fallen by more than 3 there.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base, load_base
from lorafleet.sdxl.clip_score import ClipScorer, clip_scores, scorer_of
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.lora_oracle import with_adapters
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.sdxl.reference import generate

ROOT = Path(__file__).resolve().parent.parent
STEPS = {"fluent-3d": 600, "fluent-ink": 1400}
"""Of training: ink is further from the base's own style."""
STYLES = tuple(STEPS)
SHOWN = 8
WEIGHTS = (0.5, 1.0)
RESAMPLES = 10_000
MAX_CLIP_FALL = {"fluent-3d": 3.0, "fluent-ink": float("inf")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "train-demo")
    parser.add_argument("--steps", type=int, help="of training, for each style")
    parser.add_argument("--styles", nargs="+", default=STYLES, choices=STYLES)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    train(given.styles, given.steps)
    trained_s = time.perf_counter() - started
    base = load_base(BaseConfig())
    scorer = scorer_of(base.folder.root, base.device)
    assert scorer is not None
    results = {style: judged(style, base, scorer, given.out) for style in given.styles}
    seconds = time.perf_counter() - started
    (given.out / "results.json").write_text(
        json.dumps({"seconds": round(seconds, 1), "training_seconds": round(trained_s, 1), **results}, indent=1)
    )
    print(f"{'adapter':<16}{'style score':>34}{'CLIP score of the prompts':>38}{'of real pictures':>20}")
    for style, found in results.items():
        for weight in WEIGHTS:
            row = found[str(weight)]
            name = f"{style}:{weight}"
            print(f"{name:<16}{spelled(row['style']):>34}{spelled(row['clip']):>38}{found['real_clip']:>20.1f}")
    print(f"{seconds:.0f} s, of which training {trained_s:.0f} s; {given.out}")
    failed = [style for style, found in results.items() if not was_learnt(found, MAX_CLIP_FALL[style])]
    if failed:
        sys.exit(f"not learnt: {', '.join(failed)}")


def train(styles: Sequence[str], steps: int | None) -> None:
    """All styles at once, each in a process with one thread: two cores do more than two threads of one process."""
    lorafleet = Path(sys.executable).with_name("lorafleet")
    processes = []
    for style in styles:
        command = [str(lorafleet), "train", str(ROOT / "samples" / style / "train"), "--name", style]
        command += ["--config", str(ROOT / "samples" / "train.yaml")]
        command += ["--set", f"loop.steps={steps or STEPS[style]}"]
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit("training failed")


def was_learnt(found: dict[str, Any], max_fall: float) -> bool:
    rows = [found[str(weight)] for weight in WEIGHTS]
    return any(row["style"]["low"] > 0 and row["clip"]["change"] >= -max_fall for row in rows)


def judged(style: str, base: Base, scorer: ClipScorer, out: Path) -> dict[str, Any]:
    """The figures of one style, and its grid."""
    from lorafleet.core.registry import open_registry
    from lorafleet.core.registry_config import RegistryConfig

    registry = open_registry(RegistryConfig())
    adapter = read_adapter(registry.pull(registry.resolve(f"{style}@latest").manifest), targets_of(base))
    prompts, wanted = held_out(ROOT / "samples" / style / "held_out")
    before = pictures(base, prompts)
    texts, real, seen_before = scorer.texts(prompts), scorer.images(wanted), scorer.images(before)
    found: dict[str, Any] = {"real_clip": clip_scores(real, texts).mean().item()}
    rows = [before[:SHOWN]]
    for weight in WEIGHTS:
        after = pictures(with_adapters(base, [(adapter, weight)]), prompts)
        seen_after = scorer.images(after)
        rows.append(after[:SHOWN])
        style_before, style_after = (100 * (seen @ real.T).mean(1) for seen in (seen_before, seen_after))
        found[str(weight)] = {
            "style": change(style_before, style_after),
            "clip": change(clip_scores(seen_before, texts), clip_scores(seen_after, texts)),
        }
    grid(rows).save(out / f"{style}.png")
    return found


def held_out(folder: Path) -> tuple[list[str], list[Image.Image]]:
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    prompts = [row["text"] if isinstance(row["text"], str) else row["text"][0] for row in rows]
    return prompts, [Image.open(folder / row["file_name"]).convert("RGB") for row in rows]


def pictures(base: Base, prompts: Sequence[str]) -> list[Image.Image]:
    requests = [GenerationRequest(prompt=prompt, seed=i, steps=20) for i, prompt in enumerate(prompts)]
    return [generate(base, request)[0] for request in requests]


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
