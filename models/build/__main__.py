"""Command line of the build: each stage alone, or several in a row.

    python -m lorafleet.models.build data        # from the font; needs fontTools and Debian's fonts-noto-color-emoji
    python -m lorafleet.models.build text scorer vae latents unet decoder assemble
    python -m lorafleet.models.build evaluate    # the model card's figures, on any machine

A stage goes on where it was stopped. One that has no checkpoint is read from the assembled folder, so that the UNet
alone can be trained again: `latents unet assemble`.
"""

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from lorafleet.models import EMOJIXL
from lorafleet.models.build import assemble, captions, clip, config, data, loop, render, tokenizer, unet, vae
from lorafleet.models.build.config import Stage

M = TypeVar("M", bound=nn.Module)


@dataclass
class Build:
    """The state that the stages share: where things lie and how to run."""

    work: Path
    out: Path
    font: Path
    device: torch.device
    compile: bool
    tiny: bool
    deadline_s: float | None
    fit: bool

    # --- what stages read ---

    @cached_property
    def data(self) -> data.Data:
        path = self.work / "data.npz"
        return data.load(path) if path.exists() else data.prepare(self.font, path)

    @cached_property
    def renderer(self) -> render.Renderer:
        return render.Renderer(self.data, self.device)

    @cached_property
    def words(self) -> dict[str, list[int]]:
        from transformers import CLIPTokenizer

        return tokenizer.word_ids(CLIPTokenizer.from_pretrained(self.work / "tokenizer"), self.data)

    def captions(self, seed: int, pair_share: float = config.PAIR_SHARE) -> captions.Captions:
        count = 5_000 if self.tiny else config.CAPTIONS
        return captions.pool(self.data, self.words, count, config.SEED + seed, pair_share)

    def stage(self, name: str) -> Stage:
        """The numbers of a training stage, or of a stand-in for it."""
        stage: Stage = getattr(config, name.upper())
        return replace(stage, steps=12, batch=32, warmup=4) if self.tiny else stage

    @property
    def autocast(self) -> torch.dtype:
        return torch.bfloat16

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=False) if self.compile else function

    def read(self, name: str, module: M) -> M:
        """A finished part: from its checkpoint, else from the folder that was assembled before."""
        path = self.work / f"{name}.pt"
        if not path.exists():
            assemble.take(name, module, self.out)
            return module.to(self.device).eval().requires_grad_(False)
        state = torch.load(path, map_location="cpu")
        if state["step"] < state["steps"]:
            raise SystemExit(f"stage {name} stands at step {state['step']} of {state['steps']}: run it again first")
        module.load_state_dict(state["module"])
        if state["average"]:
            for parameter, value in zip(module.parameters(), state["average"], strict=True):
                parameter.data.copy_(value)
        return module.to(self.device).eval().requires_grad_(False)

    def scaling_factor(self) -> float:
        """What the UNet's latents were multiplied with: says the cache, else the folder that was assembled before."""
        if (cache := self.work / "latents.pt").exists():
            return float(torch.load(cache, map_location="cpu", mmap=True)["scaling_factor"])
        return float(json.loads((self.out / "vae" / "config.json").read_text())["scaling_factor"])

    def train(self, name: str, module: nn.Module, loss_of: loop.StepLoss) -> bool:
        return loop.train(name, self.stage(name), module, loss_of, self.work, self.deadline_s, self.fit)

    # --- the stages ---

    def run_data(self) -> bool:
        learned = tokenizer.learn(self.data)
        tokenizer.save(learned, self.work / "tokenizer")
        tokenizer.save(learned, self.work / "tokenizer_2", pad_token="!")
        print(f"{len(self.data.emoji)} emoji, {int(self.data.held_out.sum())} held-out pairs, {len(learned)} tokens")
        return True

    def run_text(self) -> bool:
        torch.manual_seed(config.SEED + 1)
        model, pool = clip.TextEncoders().to(self.device), self.captions(1)
        batch = self.stage("text").batch
        return self.train("text", model, clip.loss_of(model, self.renderer, pool, batch, self.autocast))

    def run_scorer(self) -> bool:
        torch.manual_seed(config.SEED + 2)
        model, pool = clip.Scorer().to(self.device), self.captions(2)
        batch = self.stage("scorer").batch
        loss_of = clip.loss_of(model, self.renderer, pool, batch, self.autocast, for_scoring=True)
        return self.train("scorer", model, loss_of)

    def run_vae(self) -> bool:
        torch.manual_seed(config.SEED + 3)
        model = channels_last(vae.build().to(self.device))
        forward, pool = self.compiled(vae.Whole(model)), self.captions(3)
        batch = self.stage("vae").batch
        return self.train("vae", model, vae.loss_of(forward, self.renderer, pool, batch, self.autocast))

    def run_decoder(self) -> bool:
        whole = channels_last(self.read("vae", vae.build()))
        encode = self.compiled(vae.Whole(whole).encode)
        model = vae.Decoder(whole).train().requires_grad_(True)
        decode, pool = self.compiled(model), self.captions(5)

        def forward(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                z, kl = encode(x, noise)
                z = z + config.DECODER_NOISE * z.std() * noise.roll(1, 0)  # what the UNet makes is never exact
            return decode(z), kl

        batch = self.stage("decoder").batch
        return self.train("decoder", model, vae.loss_of(forward, self.renderer, pool, batch, self.autocast))

    def run_latents(self) -> bool:
        model, pool = channels_last(self.read("vae", vae.build())), self.captions(4, config.UNET_PAIR_SHARE)
        counts = {config.SQUARE: config.LATENTS, **dict.fromkeys(config.BUCKETS, config.BUCKET_LATENTS)}
        parts = []
        for size, count in counts.items():
            g = loop.generator(self.device, "latents", size)
            latents, rows = vae.encode_pool(
                model, self.renderer, pool, 256 if self.tiny else count, size, self.autocast, g
            )
            parts.append((size, latents.cpu(), torch.from_numpy(pool.tokens)[rows.cpu()]))
        factor = round(1 / parts[0][1].float().std().item(), 5)
        torch.save(dict(parts=parts, scaling_factor=factor), self.work / "latents.pt")
        print(f"scaling factor {factor:.4f}")
        return True

    def run_unet(self) -> bool:
        torch.manual_seed(config.SEED + 4)
        text = self.read("text", clip.TextEncoders())
        cache = torch.load(self.work / "latents.pt", map_location=self.device)
        square, *others = [
            unet.Sizes(latents * cache["scaling_factor"], tokens, size) for size, latents, tokens in cache["parts"]
        ]
        model = unet.build().to(self.device)
        empty = torch.tensor(captions.pad([]), device=self.device)
        batch = self.stage("unet").batch
        loss_of = unet.loss_of(model, self.compiled(model), text, square, others, empty, batch, self.autocast)
        return self.train("unet", model, loss_of)

    def run_assemble(self) -> bool:
        autoencoder = self.read("vae", vae.build())
        self.read("decoder", vae.Decoder(autoencoder))
        autoencoder.register_to_config(scaling_factor=self.scaling_factor())
        assemble.assemble(
            self.out,
            self.work,
            self.read("text", clip.TextEncoders()),
            autoencoder,
            self.read("unet", unet.build()),
            self.read("scorer", clip.Scorer()),
        )
        size = sum(f.stat().st_size for f in self.out.rglob("*") if f.is_file())
        print(f"{self.out}: {size / 2**20:.2f} MiB")
        return True

    def run_evaluate(self) -> bool:
        from lorafleet.models.build import evaluate

        evaluate.evaluate(self.out, self.data, self.device, few=self.tiny)
        return True


def channels_last(module: M) -> M:
    """The layout that convolutions in bf16 want."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return module


STAGES = ("data", "text", "scorer", "vae", "latents", "unet", "decoder", "assemble", "evaluate")


def main() -> int:
    parser = argparse.ArgumentParser("python -m lorafleet.models.build", description=__doc__.split("\n\n")[0])
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work", help="checkpoints lie here")
    parser.add_argument("--out", type=Path, default=EMOJIXL, help="the diffusers folder to write or to measure")
    parser.add_argument("--font", type=Path, default=data.FONT)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a dozen steps of each stage: does it run at all?")
    parser.add_argument("--minutes", type=float, help="save and stop after so long; run again to go on")
    parser.add_argument("--fit", action="store_true", help="with --minutes: stretch or cut the steps to end there")
    args = parser.parse_args()
    random.seed(config.SEED)
    np.random.seed(config.SEED)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device = torch.device(args.device)
    deadline_s = time.monotonic() + args.minutes * 60 if args.minutes else None
    use_compile = device.type == "cuda" and not args.no_compile
    build = Build(args.work, args.out, args.font, device, use_compile, args.tiny, deadline_s, args.fit)
    for stage in args.stages:
        start = time.monotonic()
        done = getattr(build, f"run_{stage}")()
        print(
            f"{stage}: {'done' if done else 'stopped, run again to go on'} in {time.monotonic() - start:.0f} s",
            flush=True,
        )
        if not done:
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
