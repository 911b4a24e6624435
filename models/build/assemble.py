"""The trained parts as the folder that `StableDiffusionXLPipeline.from_pretrained` opens, with the scorer beside."""

import json
from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer

from lorafleet.models.build import config
from lorafleet.models.build.clip import Scorer, TextEncoders

PT = {"format": "pt"}


def assemble(
    out: Path, tokenizers: Path, text: TextEncoders, vae: AutoencoderKL, unet: UNet2DConditionModel, scorer: Scorer
) -> None:
    """Write `out` in fp16 safetensors. The modules are cast in place."""
    first = CLIPTextModel(text.one.config)
    weights = {k: v for k, v in text.one.state_dict().items() if not k.startswith("text_projection")}
    own = {k.removeprefix("text_model.") if k not in first.state_dict() else k: v for k, v in weights.items()}
    first.load_state_dict(own)
    one, two = (CLIPTokenizer.from_pretrained(tokenizers / name) for name in ("tokenizer", "tokenizer_2"))
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=config.NUM_TRAIN_TIMESTEPS,
        beta_start=config.BETA_START,
        beta_end=config.BETA_END,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
        steps_offset=1,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae.half(),
        text_encoder=first.half(),
        text_encoder_2=text.two.half(),
        tokenizer=one,
        tokenizer_2=two,
        unet=unet.half(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,  # dropped captions were the empty caption, not zeros
        add_watermarker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)
    # As published SDXL checkpoints name them; transformers 5 reads both, version 4 only these.
    path = out / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}, path, PT)
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            (out / name / file).write_bytes((tokenizers / name / file).read_bytes())
    scorer.clip.half().save_pretrained(out / "scorer", safe_serialization=True)
    one.save_pretrained(out / "scorer")
    side = dict(height=config.CANVAS_PX, width=config.CANVAS_PX)
    CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "scorer")
    for part in ("text_encoder", "text_encoder_2", "scorer"):
        _compute_in_float32(out / part / "config.json")


def _compute_in_float32(path: Path) -> None:
    """transformers computes in the dtype that the config names, diffusers' models in float32: unless both agree, a
    pipeline opened without `dtype` cannot run."""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def take(name: str, module: nn.Module, folder: Path) -> None:
    """Fill a stage's module from an assembled folder, as far as it went in: vision towers of the text stage did not."""
    read = lambda part, file="model.safetensors": load_file(folder / part / file)  # noqa: E731
    match name:
        case "text":
            weights = {f"two.{k}": v for k, v in read("text_encoder_2").items()}
            weights |= {f"one.{k}": v for k, v in read("text_encoder").items()}
        case "scorer":
            weights = {f"clip.{k}": v for k, v in read("scorer").items()}
        case "decoder":
            return  # is the autoencoder's own decoder, already in place
        case _:
            weights = read(name, "diffusion_pytorch_model.safetensors")
    known = set(module.state_dict())
    unknown = set(weights) - known
    if unknown:
        raise ValueError(f"{folder}: {name} has unknown weights, {min(unknown)} for one")
    module.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
