"""The autoencoder: 128 x 128 x 3 to 16 x 16 x 4 and back."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from tqdm import tqdm

from lorafleet.models.build import config
from lorafleet.models.build.captions import Captions
from lorafleet.models.build.loop import StepLoss
from lorafleet.models.build.render import Renderer

KL = 2e-6
EDGES = 0.5


def build() -> AutoencoderKL:
    depth = len(config.VAE_CHANNELS)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=config.VAE_CHANNELS,
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        sample_size=config.CANVAS_PX,
        force_upcast=False,
    )


def loss_of(
    forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    renderer: Renderer,
    captions: Captions,
    batch: int,
    autocast: torch.dtype,
) -> StepLoss:
    """L1 + squared error + L1 of differences (edges) + KL. `forward(x, noise)` -> (reconstruction, KL)."""
    device = renderer.device

    def step_loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(captions), (batch,), device=device, generator=g)
        x = vary(renderer.draw(captions, rows, config.SQUARE, g), g)
        x = x.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(batch, 4, x.shape[2] // 8, x.shape[3] // 8, device=device, generator=g)
        with torch.autocast(device.type, autocast):
            y, kl = forward(x, noise)
        difference = y.float() - x
        l1, l2 = difference.abs().mean(), difference.square().mean()
        edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        psnr = 10 * torch.log10(4 / l2.detach())
        return dict(loss=l1 + 2 * l2 + EDGES * edges + KL * kl, l1=l1.detach(), psnr=psnr, kl=kl.detach())

    return step_loss


def vary(x: Tensor, g: torch.Generator) -> Tensor:
    """A quarter of the pictures in other colours and contrasts, so that other styles can be encoded too."""
    b, device = len(x), x.device
    mix = torch.eye(3, device=device) + 0.35 * torch.randn(b, 3, 3, device=device, generator=g)
    offset = 0.3 * torch.randn(b, 3, 1, 1, device=device, generator=g)
    ramp = torch.linspace(-1, 1, x.shape[-2], device=device)[None, None, :, None]
    slope = 0.3 * torch.randn(b, 3, 1, 1, device=device, generator=g)
    other = (torch.einsum("bij,bjhw->bihw", mix, x) * 0.7 + offset + slope * ramp).clamp(-1, 1)
    chosen = torch.rand(b, 1, 1, 1, device=device, generator=g) < 0.25
    return torch.where(chosen, other, x)


class Whole(nn.Module):
    """Encode, sample, decode as one graph, so that it compiles as one."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.vae.quant_conv(self.vae.encoder(x)).float().chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        return mean + noise * (0.5 * logvar).exp(), 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = self.encode(x, noise)
        return self.vae.decoder(self.vae.post_quant_conv(z)), kl


class Decoder(nn.Module):
    """The decoder alone goes on learning while the UNet trains: latents stay what they are."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


@torch.no_grad()
def encode_pool(
    vae: AutoencoderKL,
    renderer: Renderer,
    captions: Captions,
    count: int,
    size: tuple[int, int],
    autocast: torch.dtype,
    g: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """`count` renderings of random captions as latents: (fp16 [count, 4, h, w] not yet scaled, int64 rows [count])."""
    batch, device = min(count, 1024), renderer.device
    latents = torch.empty(count, 4, size[0] // 8, size[1] // 8, dtype=torch.float16, device=device)
    rows = torch.randint(len(captions), (count,), device=device, generator=g)
    for at in tqdm(range(0, count, batch), desc=f"latents {size[1]}x{size[0]}", mininterval=5.0):
        x = renderer.draw(captions, rows[at : at + batch], size, g).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, autocast):
            latents[at : at + batch] = vae.encode(x).latent_dist.mean.half()
    return latents, rows
