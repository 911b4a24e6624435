"""The denoiser: SDXL's UNet, small, trained on cached latents with min-SNR weighting."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from lorafleet.models.build import config
from lorafleet.models.build.clip import TextEncoders, pad_second
from lorafleet.models.build.loop import StepLoss


def build() -> UNet2DConditionModel:
    c = config.UNET_CHANNELS
    return UNet2DConditionModel(
        sample_size=config.CANVAS_PX // 8,
        in_channels=4,
        out_channels=4,
        block_out_channels=c,
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=[max(1, width // 32) for width in c],  # the number of heads, by diffusers' old name
        transformer_layers_per_block=[1, 1, 1],
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + config.TEXT_PROJECTION,
        cross_attention_dim=2 * config.TEXT_ENCODER["hidden_size"],
        use_linear_projection=True,
    )


def schedule() -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=config.NUM_TRAIN_TIMESTEPS,
        beta_start=config.BETA_START,
        beta_end=config.BETA_END,
        beta_schedule="scaled_linear",
    )


@torch.no_grad()
def condition(text: TextEncoders, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [B, L] -> (penultimate states of both encoders [B, L, D1+D2], pooled output of the second [B, P])."""
    first = text.one(input_ids=tokens, output_hidden_states=True)
    second = text.two(input_ids=pad_second(tokens), output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second.text_embeds


class Sizes:
    """Cached latents of one size with their captions' token ids."""

    def __init__(self, latents: Tensor, tokens: Tensor, size: tuple[int, int]) -> None:
        self.latents, self.tokens = latents, tokens
        self.time_ids = torch.tensor([*size, 0, 0, *size], dtype=torch.float32, device=latents.device)

    def draw(self, batch: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.latents), (batch,), device=self.latents.device, generator=g)
        return self.latents[rows].float(), self.tokens[rows].long()


def loss_of(
    unet: nn.Module,
    compiled: Callable[..., Any],
    text: TextEncoders,
    square: Sizes,
    others: list[Sizes],
    empty: Tensor,
    batch: int,
    autocast: torch.dtype,
) -> StepLoss:
    """Noise-prediction error (Ho et al. 2020) with min-SNR-gamma weights (Hang et al. 2023, eq. 5).

    `compiled` runs the square steps, `unet` itself the others (so that only one shape is compiled); both are the same
    weights. `empty`: token ids [L] of the empty caption, in place of CAPTION_DROPOUT of the captions.
    """
    device = empty.device
    alphas = schedule().alphas_cumprod.to(device)

    def step_loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        is_square = step % config.BUCKET_EVERY != 0
        sizes = square if is_square else others[(step // config.BUCKET_EVERY) % len(others)]
        z, tokens = sizes.draw(batch if is_square else batch // 2, g)
        dropped = torch.rand(len(z), 1, device=device, generator=g) < config.CAPTION_DROPOUT
        with torch.autocast(device.type, autocast):
            hidden, pooled = condition(text, torch.where(dropped, empty, tokens))
        noise = torch.randn(z.shape, device=device, generator=g)
        t = torch.randint(config.NUM_TRAIN_TIMESTEPS, (len(z),), device=device, generator=g)
        alpha = alphas[t]
        noisy = alpha.sqrt()[:, None, None, None] * z + (1 - alpha).sqrt()[:, None, None, None] * noise
        added = dict(text_embeds=pooled, time_ids=sizes.time_ids.expand(len(z), 6))
        with torch.autocast(device.type, autocast):
            predicted = (compiled if is_square else unet)(noisy, t, hidden, added_cond_kwargs=added).sample
        snr = alpha / (1 - alpha)
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (error * snr.clamp(max=config.MIN_SNR_GAMMA) / snr).mean()
        return dict(loss=loss, error=error.mean().detach())

    return step_loss
