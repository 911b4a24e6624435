"""The trained parts as the folder that `StableDiffusionXLPipeline.from_pretrained` opens, with the scorer beside."""

from pathlib import Path

from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPImageProcessorPil, CLIPTextModel, CLIPTokenizer

from lorafleet.models.build import config
from lorafleet.models.build.clip import Scorer, TextEncoders


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
    for name in ("tokenizer", "tokenizer_2"):
        for file in ("vocab.json", "merges.txt"):
            (out / name / file).write_bytes((tokenizers / name / file).read_bytes())
    scorer.clip.half().save_pretrained(out / "scorer", safe_serialization=True)
    one.save_pretrained(out / "scorer")
    side = dict(height=config.CANVAS_PX, width=config.CANVAS_PX)
    CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(out / "scorer")
