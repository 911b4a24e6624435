"""Contrastive training: the two text encoders against one shared vision tower, and apart from them the scorer."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from lorafleet.models.build import config
from lorafleet.models.build.captions import Captions
from lorafleet.models.build.loop import StepLoss
from lorafleet.models.build.render import Renderer

ALIGNMENT = 0.5
UNIFORMITY = 0.25  # for the scorer
NOISE = 0.05
GROUP = 8  # captions that differ in one subject only, beside each other in a batch


def special_ids(pad: int) -> dict[str, int]:
    return dict(bos_token_id=config.VOCAB - 2, eos_token_id=config.VOCAB - 1, pad_token_id=pad)


def text_config(pad: int, projection: int, size: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=config.VOCAB,
        max_position_embeddings=config.CONTEXT,
        projection_dim=projection,
        hidden_act="gelu",
        **special_ids(pad),
        **size,
    )


def vision_config(projection: int, size: dict[str, int]) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        image_size=config.CANVAS_PX, patch_size=config.PATCH_PX, projection_dim=projection, hidden_act="gelu", **size
    )


class TextEncoders(nn.Module):
    """SDXL's pair of text encoders (the second pads with "!", id 0), trained against one vision tower."""

    def __init__(self) -> None:
        super().__init__()
        end = config.VOCAB - 1
        projection, size = config.TEXT_PROJECTION, config.TEXT_ENCODER
        self.one = CLIPTextModelWithProjection(text_config(end, projection, size))
        self.two = CLIPTextModelWithProjection(text_config(0, projection, size))
        self.vision = CLIPVisionModelWithProjection(vision_config(projection, config.TEXT_VISION))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def features(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        texts = [self.one(input_ids=tokens).text_embeds, self.two(input_ids=pad_second(tokens)).text_embeds]
        return self.vision(pixel_values=pixels).image_embeds, texts


class Scorer(nn.Module):
    """The evaluation CLIP: other seed, widths and vision tower; no part of the base ever sees it."""

    def __init__(self) -> None:
        super().__init__()
        projection = config.SCORER_PROJECTION
        text = text_config(config.VOCAB - 1, projection, config.SCORER_TEXT)
        vision = vision_config(projection, config.SCORER_VISION)
        self.clip = CLIPModel(
            CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=projection)
        )

    @property
    def logit_scale(self) -> Tensor:
        return self.clip.logit_scale

    def features(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = self.clip(input_ids=tokens, pixel_values=pixels)
        return out.image_embeds, [out.text_embeds]


def pad_second(tokens: Tensor) -> Tensor:
    """Token ids [B, CONTEXT] padded with the end marker -> the same padded with 0 after the first end marker."""
    end = tokens == config.VOCAB - 1
    return torch.where(end & (end.cumsum(1) > 1), 0, tokens)


def pair_orders(captions: Captions) -> tuple[np.ndarray, np.ndarray]:
    """The rows with two subjects, int64 [M2], sorted by (first subject, background) and by (second, background)."""
    pairs = np.flatnonzero(captions.second >= 0)
    by = lambda subject: pairs[np.lexsort((captions.background[pairs], subject[pairs]))]  # noqa: E731
    return by(captions.subject), by(captions.second)


def loss_of(
    model: TextEncoders | Scorer,
    renderer: Renderer,
    captions: Captions,
    batch: int,
    autocast: torch.dtype,
    for_scoring: bool = False,
) -> StepLoss:
    """InfoNCE in both directions (Radford et al. 2021) plus alignment of the pairs (Wang and Isola 2020, eq. 2).

    Alignment pulls matching pairs towards cosine 1, which InfoNCE alone has no reason to; rows that show the same
    thing are no negatives of each other. `for_scoring` asks more of the features: half of each batch are groups of
    two-subject captions that share background and one subject, so that the other subject must be seen to tell them
    apart; unrelated rows are spread over the sphere (uniformity, same paper, eq. 3), so that a score near 0 means
    "something else"; and pictures may be soft.
    """
    device = renderer.device
    groups = [torch.from_numpy(order).to(device) for order in pair_orders(captions)] if for_scoring else []
    grouped = len(groups) * (batch // 4 // GROUP) * GROUP
    tokens = torch.from_numpy(captions.tokens).to(device)
    content = torch.from_numpy(captions.subject).to(device).long()
    for column in (captions.second, captions.tint, captions.background):
        content = content * 4096 + torch.from_numpy(column).to(device).long() + 1

    def step_loss(step: int, g: torch.Generator) -> dict[str, Tensor]:
        rows = torch.randint(len(captions), (batch,), device=device, generator=g)
        for at, order in enumerate(groups):
            start = torch.randint(len(order) - GROUP + 1, (batch // 4 // GROUP, 1), device=device, generator=g)
            neighbours = order[start + torch.arange(GROUP, device=device)].flatten()
            rows[at * len(neighbours) : (at + 1) * len(neighbours)] = neighbours
        pixels = renderer.draw(captions, rows, config.SQUARE, g)
        if for_scoring:
            soft = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
            pixels = pixels.lerp(soft, torch.rand(batch, 1, 1, 1, device=device, generator=g))
        pixels = pixels + NOISE * torch.randn(pixels.shape, device=device, generator=g)
        with torch.autocast(device.type, autocast):
            image, texts = model.features(pixels, tokens[rows].long())
        image = F.normalize(image.float(), dim=-1)
        key = content[rows]
        same = (key[:, None] == key[None]) & ~torch.eye(batch, dtype=torch.bool, device=device)
        target = torch.arange(batch, device=device)
        nce, aligned, spread = pixels.new_zeros(()), pixels.new_zeros(()), pixels.new_zeros(())
        for text in texts:
            text = F.normalize(text.float(), dim=-1)
            logits = (model.logit_scale.clamp(max=4.6).exp() * image @ text.T).masked_fill(same, -1e4)
            nce = nce + (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2 / len(texts)
            aligned = aligned + (1 - (image * text).sum(-1)).mean() / len(texts)
            if for_scoring:
                spread = spread + sum(uniformity(x[grouped:]) for x in (image, text)) / 2 / len(texts)
        loss = nce + ALIGNMENT * aligned + UNIFORMITY * spread
        return dict(loss=loss, nce=nce.detach(), cosine=1 - aligned.detach())

    return step_loss


def uniformity(features: Tensor) -> Tensor:
    """Log of the mean Gaussian potential of unit vectors [B, P] (Wang and Isola 2020, eq. 3, t = 2)."""
    return torch.pdist(features).square().mul(-2).exp().mean().log()
