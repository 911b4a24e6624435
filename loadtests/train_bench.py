"""Images a second and peak memory of LoRA training, ours beside a loop as in diffusers' training script.

The base has SDXL's architecture and random weights; latents and text features are random and cached, as they are in a
real run after the first epoch. A step is everything: batches, forward, backward, clipping, AdamW. Rank 8 on the
attention linears unless a variant says otherwise. `--base tiny-random` runs on a CPU in seconds.

    python loadtests/train_bench.py --json out/train.json --budget-s 400
    python loadtests/train_bench.py --base tiny-random --variant "ours: batch=2" --variant "diffusers: batch=2"
"""

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from random_sdxl import random_base

from lorafleet.sdxl.base import Base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.adapter import attach, parameter_table
from lorafleet.train.config import TrainConfig
from lorafleet.train.data import EncodedItem, EncodedSet, LatentStats, TextFeatures
from lorafleet.train.group import Group
from lorafleet.train.loop import Trainer

VARIANTS = (
    "diffusers: batch=4",
    "diffusers: batch=8",
    "ours: batch=8 compile=regional",
    "ours: batch=16 compile=regional",
    "low memory: batch=1 checkpointing=true",
    "low memory, 8-bit base: batch=1 checkpointing=true quantise=true",
    "ours: batch=8 compile=full",
    "ours: batch=16 compile=full",
)
WARM_STEPS = 4
MIN_STEPS = 6
MIN_SECONDS = 4.0


class RandomSet(EncodedSet):
    """A cache of random numbers, in memory."""

    def __init__(self, base: Base, images: int) -> None:
        side = base.pipeline.unet.config.sample_size
        width = base.pipeline.unet.config.cross_attention_dim
        pooled = base.pipeline.text_encoder_2.config.projection_dim
        generator = torch.Generator().manual_seed(0)
        pixels = side * base.pipeline.vae_scale_factor
        self.path = Path()
        self.fingerprint = "random"
        self.items = tuple(
            EncodedItem(i, str(i), f"{i:064x}", (pixels, pixels), captions=1, crops=1, held_out=False)
            for i in range(images)
        )
        self._mean = torch.randn(images, 4, side, side, generator=generator)
        self._std = torch.full_like(self._mean[0], 0.01)
        self._text = TextFeatures(
            torch.randn(77, width, generator=generator).to(base.dtype),
            torch.randn(pooled, generator=generator).to(base.dtype),
        )
        self._ids = torch.ones(77, dtype=torch.int64)
        self._micro = (pixels, pixels, 0, 0, pixels, pixels)

    def latents(self, index: int, crop: int = 0, flip: bool = False) -> LatentStats:
        return LatentStats(self._mean[index], self._std)

    def micro(self, index: int, crop: int = 0, flip: bool = False) -> tuple[int, int, int, int, int, int]:
        return self._micro

    def text(self, index: int, caption: int = 0) -> TextFeatures:
        return self._text

    @property
    def null_text(self) -> TextFeatures:
        return self._text

    def tokens(self, index: int, caption: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        return self._ids, self._ids

    @property
    def null_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._ids, self._ids


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default="sdxl-random", choices=("sdxl-random", "tiny-random"))
    parser.add_argument("--variant", action="append", help='such as "ours: batch=8 compile=regional"')
    parser.add_argument("--budget-s", type=float, default=600.0, help="no variant is begun after this")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    started = time.perf_counter()
    rows: list[dict[str, Any]] = []
    torch.backends.cuda.matmul.allow_tf32 = True
    for variant in given.variant or VARIANTS:
        if time.perf_counter() - started > given.budget_s:
            print(f"[{variant}] left out: the budget is spent", flush=True)
            continue
        try:
            row = {"variant": variant, **run(given.base, variant)}
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            print(f"[{variant}] failed: {str(error).splitlines()[0]}", flush=True)
            continue
        rows.append(row)
        print(f"[{variant}] {json.dumps({k: v for k, v in row.items() if k != 'variant'})}", flush=True)
        if given.json:
            given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(machine())
    print(table(rows))


def run(architecture: str, variant: str) -> dict[str, Any]:
    """One variant on a fresh base; what fails is said in its row."""
    loop, options = parsed(variant)
    _forget()
    began = time.perf_counter()
    base = random_base(BaseConfig(id=architecture))
    for part in ("vae", "text_encoder", "text_encoder_2"):
        getattr(base.pipeline, part).to("cpu")  # nobody needs them: latents and texts are cached
    _forget()
    try:
        make = diffusers_steps if loop == "diffusers" else our_steps
        steps, about = make(base, options)
        for _ in range(WARM_STEPS):
            next(steps)
        _wait()
        first_s = time.perf_counter() - began
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        times: list[float] = []
        timed = time.perf_counter()
        while len(times) < MIN_STEPS or time.perf_counter() - timed < MIN_SECONDS:
            at = time.perf_counter()
            next(steps)
            _wait()
            times.append(time.perf_counter() - at)
        steps.close()
    except torch.cuda.OutOfMemoryError:
        return {"failed": "out of memory"}
    middle = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    batch = int(options["batch"])
    return {
        **about,
        "img_s": round(batch / middle, 2),
        "step_ms": round(middle * 1e3, 1),
        "steps": len(times),
        "peak_gb": None if peak is None else round(peak, 2),
        "start_s": round(first_s, 1),
    }


def our_steps(base: Base, options: dict[str, str]) -> tuple[Iterator[None], dict[str, Any]]:
    """`lorafleet.train.loop`, as a run has it."""
    batch = int(options["batch"])
    config = TrainConfig.model_validate(
        {
            "adapter": {"dropout": float(options.get("dropout", "0.1"))},
            "loop": {
                "steps": 100_000,
                "batch_size": batch,
                "gradient_checkpointing": options.get("checkpointing") == "true",
                "quantise_base": options.get("quantise") == "true",
                "compile": options.get("compile", "none"),
            },
        }
    )
    torch.compiler.reset()
    adapter = attach(base, config.adapter, seed=0)
    trainer = Trainer(config, base, RandomSet(base, max(64, 2 * batch)), adapter, Group(0, 1, base.device))
    part, linears, trainable, whole = parameter_table(adapter)[0]
    assert part == "unet"

    def steps() -> Iterator[None]:
        batches = trainer.batches()
        while True:
            trainer.step(batches, wants_stop=False)
            yield

    return steps(), {"linears": linears, "trainable": trainable, "share": round(trainable / whole, 5)}


def diffusers_steps(base: Base, options: dict[str, str]) -> tuple[Iterator[None], dict[str, Any]]:
    """The heart of diffusers' examples/text_to_image/train_text_to_image_lora_sdxl.py with cached inputs: PEFT's layers
    as they are, autocast to bfloat16, AdamW."""
    batch = int(options["batch"])
    unet = base.pipeline.unet
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, target_modules=targets))
    unet.train()
    cast_training_params(unet, dtype=torch.float32)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scheduler = DDPMScheduler.from_config(base.scheduler_config)
    data = RandomSet(base, max(64, 2 * batch))
    device = base.device

    def steps() -> Iterator[None]:
        step = 0
        while True:
            chosen = [(step * batch + i) % len(data.items) for i in range(batch)]
            latents = torch.stack([data.latents(i).mean for i in chosen]).to(device)
            text = [data.text(i) for i in chosen]
            prompt = torch.stack([each.prompt_embeds for each in text]).to(device)
            pooled = torch.stack([each.pooled for each in text]).to(device)
            time_ids = torch.tensor([data.micro(i) for i in chosen], device=device).to(base.dtype)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(1000, (batch,), device=device)
            noisy = scheduler.add_noise(latents, noise, timesteps).to(base.dtype)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=base.dtype == torch.bfloat16):
                predicted = unet(
                    noisy,
                    timesteps,
                    prompt,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
                    return_dict=False,
                )[0]
                loss = F.mse_loss(predicted.float(), noise.float())
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # the script logs it
            step += 1
            yield

    return steps(), {"trainable": sum(parameter.numel() for parameter in parameters)}


def parsed(variant: str) -> tuple[str, dict[str, str]]:
    name, _, rest = variant.partition(":")
    options = dict(word.split("=", 1) for word in rest.split())
    return ("diffusers" if name.strip() == "diffusers" else "ours"), {"batch": "1", **options}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| variant | img/s | ms a step | peak GB | start s |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [str(row.get(key, row.get("failed", ""))) for key in ("img_s", "step_ms", "peak_gb", "start_s")]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> str:
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{name}, torch {torch.__version__}"


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
