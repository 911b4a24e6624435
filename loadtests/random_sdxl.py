"""A base with SDXL's architecture and random weights: times and memory do not depend on what weights hold.

Nothing is read but emojixl's tokenizers, nothing is written, and the weights are made where they are used: a second
on a GPU where reading the published ones takes half a minute. The pictures mean nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lorafleet.models import EMOJIXL
from lorafleet.sdxl.base import DTYPES, Base, _set_attention, _set_memory_profile, resolve_device
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.folder import BaseFolder
from lorafleet.sdxl.limits import BaseLimits

SCHEDULER: Final = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
PIXEL_STD: Final = 0.3
"""Spread of the decoded pixels in [-1, 1]: flat pictures would make the PNG encoder look faster than it is."""


@dataclass(frozen=True)
class Architecture:
    """The configs of all parts, in diffusers' and transformers' words; what is left out is their default."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    text_encoder_2: Mapping[str, Any]


_UNET: Final = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
_VAE: Final = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}
# With eos_token_id 2, as SDXL's configs have it, the encoders take the largest id for the end of the prompt; the end
# token has it in emojixl's tokenizers too.
_TOKENS: Final = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
# https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/tree/462165984030d82259a11f4367a4eed129e94a7b
SDXL: Final = Architecture(
    unet={
        **_UNET,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae={**_VAE, "sample_size": 1024, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    },
    text_encoder_2={
        "vocab_size": 49408,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
    },
)
_TINY_CLIP: Final = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TINY: Final = Architecture(
    unet={
        **_UNET,
        "sample_size": 8,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 1,
        "transformer_layers_per_block": (1, 1, 1),
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    vae={**_VAE, "sample_size": 64, "block_out_channels": (32,) * 4, "layers_per_block": 1},
    text_encoder=_TINY_CLIP,
    text_encoder_2=_TINY_CLIP,
)
"""For tests: the same parts in a millisecond a step, 64 x 64 pixels."""
ARCHITECTURES: Final = {"sdxl-random": SDXL, "tiny-random": TINY}


def random_base(config: BaseConfig) -> Base:
    """The base of the architecture that `config.id` names, the same weights every time. Raises ConfigError."""
    architecture = ARCHITECTURES[config.id]
    device = resolve_device(config.device)
    by_default = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = DTYPES.get(config.dtype, by_default)
    torch.manual_seed(0)
    with made_in(device, dtype):
        models = parts(architecture)
    pipeline = StableDiffusionXLPipeline(
        **models,
        tokenizer=_tokenizer("tokenizer"),
        tokenizer_2=_tokenizer("tokenizer_2"),
        scheduler=EulerDiscreteScheduler(**SCHEDULER),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    _spread_pixels(pipeline.vae)
    _set_memory_profile(pipeline, config, device)
    _set_attention(pipeline, config, device)
    side_px = architecture.vae["sample_size"]
    return Base(
        config=config,
        folder=BaseFolder(EMOJIXL, {}, {}),
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        fingerprint=f"{config.id}-seed-0",
        limits=BaseLimits.of(side_px, side_px, grid_px=32, max_prompt_tokens=pipeline.tokenizer.model_max_length),
        scheduler_config=dict(pipeline.scheduler.config),
    )


def parts(architecture: Architecture) -> dict[str, torch.nn.Module]:
    """The four models in eval mode, on the device and in the type of `made_in`."""
    models = {
        "unet": UNet2DConditionModel(**architecture.unet),
        "vae": AutoencoderKL(**architecture.vae),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**architecture.text_encoder, **_TOKENS)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**architecture.text_encoder_2, **_TOKENS)),
    }
    return {name: model.eval().requires_grad_(False) for name, model in models.items()}


@contextmanager
def made_in(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Tensors are made there, not moved; `meta` makes shapes only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def _tokenizer(name: str) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(EMOJIXL / name, model_max_length=77, local_files_only=True)


@torch.inference_mode()
def _spread_pixels(vae: AutoencoderKL) -> None:
    weight = vae.decoder.conv_out.weight
    latents = torch.randn(1, vae.config.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    pixels = vae.decode(latents.to(weight) / vae.config.scaling_factor).sample
    weight.mul_(PIXEL_STD / pixels.float().std())
