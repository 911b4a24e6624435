"""One task of a plan to the bytes that the cache keeps: the same ones in every process on one kind of machine."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from lorafleet.core.errors import DataUnreadable
from lorafleet.core.pictures import BadPicture, decode, on_white
from lorafleet.sdxl.base import Base, read_vae
from lorafleet.sdxl.text import encode_negative, encode_prompt, tokenize
from lorafleet.sdxl.vae import encode_posterior
from lorafleet.train.data.buckets import cut
from lorafleet.train.data.config import DataConfig
from lorafleet.train.data.layout import ALIGNMENT, TextLayout
from lorafleet.train.data.plan import BaseFacts, Entry, Plan, unreadable


class Encoder:
    """A base's VAE and text encoders. Pictures go in one at a time, so that no neighbour changes a bit.

    Safe for several threads.
    """

    def __init__(self, base: Base) -> None:
        """A VAE that was loaded in bfloat16, whose 8 bits of precision blur latents, is loaded again in float32."""
        self._base = base
        self._vae: Any = base.pipeline.vae
        if self._vae.dtype == torch.bfloat16:
            self._vae = read_vae(base.config, base.folder, torch.float32).to(base.device)

    @property
    def facts(self) -> BaseFacts:
        pipeline = self._base.pipeline
        encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
        return BaseFacts(
            fingerprint=self._base.fingerprint,
            limits=self._base.limits,
            vae_dtype=_name(self._vae.dtype),
            vae_factor=pipeline.vae_scale_factor,
            latent_channels=self._vae.config.latent_channels,
            text=TextLayout(
                window=pipeline.tokenizer.model_max_length,
                hidden=sum(encoder.config.hidden_size for encoder in encoders),
                pooled=pipeline.text_encoder_2.config.projection_dim,
                dtype=_name(pipeline.text_encoder_2.dtype),  # type: ignore[arg-type] # checked by pydantic
            ),
        )

    def run(self, plan: Plan, task: int, config: DataConfig) -> bytes:
        """The bytes of a task. Raises DataUnreadable or StorageUnavailable."""
        if task < len(plan.texts):
            return self._text(plan.texts[task])
        return self._latents(plan.entries[task - len(plan.texts)], plan.flips, config)

    def _text(self, text: str) -> bytes:
        """A row of `layout.TextLayout`."""
        ids_1, ids_2, _ = tokenize(self._base, text)
        features = encode_prompt(self._base, text)
        if not text:
            features = encode_negative(self._base, text, features)
        for tensor in (features.hidden, features.pooled):
            if not torch.isfinite(tensor).all():
                raise DataUnreadable(
                    f"the text encoders give NaN or infinity for the caption {text[:80]!r}: set base.dtype=float32.",
                    param="base.dtype",
                )
        row = b"".join(map(_bytes, (ids_1, ids_2, features.hidden, features.pooled)))
        return row + bytes(-len(row) % ALIGNMENT)

    def _latents(self, entry: Entry, flips: tuple[bool, ...], config: DataConfig) -> bytes:
        """Mean and deviation, [2, 4, h, w] float32, of each crop and of its mirror image."""
        data = entry.item.read()
        entry.check(data)
        try:
            image = on_white(decode(data, config.max_pixels))
        except BadPicture as error:
            raise unreadable(entry.item.key, error) from error
        parts = []
        for crop in entry.crops:
            for flip in flips:
                pixels = _pixels(cut(image, crop, entry.bucket, flip=flip))
                for tensor in encode_posterior(self._vae, pixels):
                    if not torch.isfinite(tensor).all():
                        raise DataUnreadable(
                            f"the VAE gives NaN or infinity for {entry.item.key}: set "
                            "base.vae=madebyollin/sdxl-vae-fp16-fix, or base.dtype=float32.",
                            param="base.vae",
                        )
                    parts.append(_bytes(tensor))
        return b"".join(parts)


def _pixels(image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W], float32 in [-1, 1]."""
    rows = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return rows / 127.5 - 1


def _bytes(tensor: torch.Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
