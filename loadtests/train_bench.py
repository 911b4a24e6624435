"""Images a second and peak memory of LoRA training, ours beside a loop as in diffusers' training script.

The base has SDXL's architecture and random weights; latents and text features are random and cached, as they are in a
real run after the first epoch. A step is everything: batches, forward, backward, clipping, AdamW. Rank 8 on the
attention linears, dropout 0.1, unless a variant says otherwise. `--base tiny-random` runs on a CPU in seconds.

Each variant is a process of its own. Several may start and compile at once (`--jobs`), but only one at a time takes
its timed steps. Under torchrun every process takes part in one variant, given by `--one`.

    python loadtests/train_bench.py --json out/train.json --jobs 3
    python loadtests/train_bench.py --base tiny-random --variant "ours: batch=2" --variant "diffusers: batch=2"
    torchrun --nproc-per-node 2 loadtests/train_bench.py --one "ours: batch=32 micro=16 compile=regional"
"""

import argparse
import fcntl
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
from lorafleet.train.group import Group, joined, own_device
from lorafleet.train.loop import Launched, Trainer

VARIANTS = (
    "ours: batch=16 compile=regional",
    "ours: batch=8 compile=regional",
    "diffusers: batch=8",
    "diffusers: batch=4",
    "low memory: batch=1 checkpointing=true",
    "low memory, 8-bit base: batch=1 checkpointing=true quantise=true",
)
WARM_STEPS = 4
STEPS = 10


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
    parser.add_argument("--jobs", type=int, default=1, help="variants that are started at once; their memory adds up")
    parser.add_argument("--limit-s", type=float, default=600.0, help="seconds that a variant may take")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help="measure this variant here and print its row")
    parser.add_argument("--lock", type=Path, help="a file that is locked while steps are timed")
    parser.add_argument("--profile", type=Path, help="with --one: write where a step's time goes")
    given = parser.parse_args()
    if given.one:
        row = run(given.base, given.one, given.lock, given.profile)
        if row is not None:
            print(json.dumps(row), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as pool:
        own = [sys.executable, __file__, "--base", given.base, "--lock", str(Path(folder) / "lock"), "--one"]
        variants = given.variant or VARIANTS
        rows = list(pool.map(lambda variant: in_process([*own, variant], variant, given.limit_s), variants))
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    print(machine())
    print(table(rows))


def in_process(command: list[str], variant: str, limit_s: float) -> dict[str, Any]:
    """The variant's row, or why there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        row: dict[str, Any] = {"variant": variant, "failed": f"not ready in {limit_s:.0f} s"}
    else:
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        row = json.loads(last) if done.returncode == 0 else {"variant": variant, "failed": last[:300]}
        if done.returncode != 0:
            print(done.stderr[-3000:], file=sys.stderr, flush=True)
    print(json.dumps(row), flush=True)
    return row


def run(architecture: str, variant: str, lock: Path | None, profile: Path | None) -> dict[str, Any] | None:
    """One variant on a fresh base. None for all but the first of several workers."""
    loop, options = parsed(variant)
    torch.backends.cuda.matmul.allow_tf32 = True
    began = time.perf_counter()
    base = random_base(BaseConfig(id=architecture, device=own_device("auto")))
    with joined(base.device, 600.0) as group:
        for part in ("vae", "text_encoder", "text_encoder_2"):
            getattr(base.pipeline, part).to("cpu")  # nobody needs them: latents and texts are cached
        _forget()
        make = diffusers_steps if loop == "diffusers" else our_steps
        steps, about, alone = make(base, group, options)
        for _ in range(WARM_STEPS):
            next(steps)
        _wait()
        first_s = time.perf_counter() - began
        with locked(lock):
            next(steps)
            _wait()
            if torch.cuda.is_available() and "compile" not in options:
                torch.cuda.reset_peak_memory_stats()  # a recorded graph's memory is seen while it is recorded only
            seconds = timed(steps)
            if profile is not None:
                profile.write_text(profiled(steps))
        steps.close()
        alone_s = None
        if group.size > 1 and alone is not None:
            if group.leads:  # the others wait: the same images by one worker alone
                steps = alone()
                next(steps)
                _wait()
                alone_s = timed(steps)
                steps.close()
            group.agreed(None)
        if not group.leads:
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
        return {
            "variant": variant,
            "workers": group.size,
            **about,
            "img_s": round(int(options["batch"]) / seconds, 2),
            "step_ms": round(seconds * 1e3, 1),
            **({} if alone_s is None else {"alone_step_ms": round(alone_s * 1e3, 1)}),
            **({} if alone_s is None else {"scaling": round(alone_s / seconds / group.size, 4)}),
            "peak_gb": None if peak is None else round(peak, 2),
            "start_s": round(first_s, 1),
        }


def timed(steps: Iterator[None]) -> float:
    """Seconds a step."""
    began = time.perf_counter()
    for _ in range(STEPS):
        next(steps)
    _wait()
    return (time.perf_counter() - began) / STEPS


def profiled(steps: Iterator[None]) -> str:
    """The kernels of two steps, those that take longest first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        next(steps)
        next(steps)
        _wait()
    kernels = [each for each in seen.key_averages() if each.device_type.name == "CUDA" and each.self_device_time_total]
    kernels.sort(key=lambda each: -each.self_device_time_total)
    total = sum(each.self_device_time_total for each in kernels)
    lines = [f"{total / 2e3:.1f} ms a step in kernels"]
    for each in kernels[:120]:
        lines.append(f"{each.self_device_time_total / 2e3:8.2f} ms {each.count / 2:7.1f} x  {each.key[:150]}")
    return "\n".join(lines)


@contextmanager
def locked(path: Path | None) -> Iterator[None]:
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


Steps = tuple[Iterator[None], dict[str, Any], Callable[[], Iterator[None]] | None]
"""Steps, what there is to say about them, and steps of this worker alone."""


def our_steps(base: Base, group: Group, options: dict[str, str]) -> Steps:
    """`lorafleet.train.loop`, as a run has it."""
    batch = int(options["batch"])
    config = TrainConfig.model_validate(
        {
            "adapter": {"dropout": float(options.get("dropout", "0.1"))},
            "loop": {
                "steps": 100_000,
                "batch_size": batch,
                "micro_batch": int(options.get("micro", str(batch))),
                "gradient_checkpointing": options.get("checkpointing") == "true",
                "quantise_base": options.get("quantise") == "true",
                "compile": options.get("compile", "none"),
                "fused": options.get("fused") != "false",
                "cuda_graphs": options.get("graphs") != "false",
            },
        }
    )
    adapter = attach(base, config.adapter, seed=0)
    trainer = Trainer(config, base, RandomSet(base, max(64, 2 * batch)), adapter, group)
    part, linears, trainable, whole = parameter_table(adapter)[0]
    assert part == "unet"

    def steps() -> Iterator[None]:
        batches = trainer.batches()
        waiting: deque[Launched] = deque()
        try:
            while True:
                waiting.append(trainer.launch(batches, wants_stop=False))
                if len(waiting) > trainer.lag:
                    trainer.settle(waiting.popleft())
                yield
        finally:
            while waiting:
                trainer.settle(waiting.popleft())

    def alone() -> Iterator[None]:
        trainer.group = Group(0, 1, base.device)
        return steps()

    return steps(), {"linears": linears, "trainable": trainable, "share": round(trainable / whole, 5)}, alone


def diffusers_steps(base: Base, _: Group, options: dict[str, str]) -> Steps:
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

    return steps(), {"trainable": sum(parameter.numel() for parameter in parameters)}, None


def parsed(variant: str) -> tuple[str, dict[str, str]]:
    name, _, rest = variant.partition(":")
    options = dict(word.split("=", 1) for word in rest.split())
    return ("diffusers" if name.strip() == "diffusers" else "ours"), {"batch": "1", **options}


def table(rows: list[dict[str, Any]]) -> str:
    columns = ("workers", "img_s", "step_ms", "peak_gb", "start_s")
    lines = ["| variant | workers | img/s | ms a step | peak GB | start s |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [str(row.get(key, "")) for key in columns]
        lines.append(f"| {row['variant']}{': ' + row['failed'] if 'failed' in row else ''} | {' | '.join(cells)} |")
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
