"""One forward pass of the base with its adapter, from a batch to each sample's loss."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers import DDPMScheduler

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.text import run_encoder
from lorafleet.train import objective
from lorafleet.train.adapter import TrainedAdapter
from lorafleet.train.batch import Batch
from lorafleet.train.config import ObjectiveConfig


@dataclass(frozen=True, eq=False)
class Denoiser:
    """The UNet, the text encoders where they are trained, and the base's noise schedule. `alphas_cumprod`: [T],
    float32."""

    unet: Any
    text_encoders: tuple[Any, Any] | None
    adapter: TrainedAdapter
    alphas_cumprod: torch.Tensor
    prediction: str
    zeros_for_no_text: bool

    @classmethod
    def of(cls, base: Base, adapter: TrainedAdapter, config: ObjectiveConfig) -> Self:
        """Raises ConfigError for a base that predicts something else than noise or v."""
        prediction = config.prediction
        if prediction == "auto":
            prediction = base.scheduler_config.get("prediction_type", "epsilon")
        if prediction not in objective.PREDICTIONS:
            raise ConfigError(
                f"the base predicts {prediction}, training knows {' and '.join(objective.PREDICTIONS)}: set base.id to "
                "another one",
                param="base.id",
            )
        schedule = DDPMScheduler.from_config(base.scheduler_config)
        pipeline = base.pipeline
        return cls(
            unet=pipeline.unet,
            text_encoders=(pipeline.text_encoder, pipeline.text_encoder_2) if adapter.trains_text else None,
            adapter=adapter,
            alphas_cumprod=schedule.alphas_cumprod.float().to(base.device),
            prediction=prediction,
            zeros_for_no_text=bool(pipeline.config.force_zeros_for_empty_prompt),
        )

    def losses(self, batch: Batch, *, min_snr_gamma: float | None) -> torch.Tensor:
        """Each sample's loss, [B], float32. The base computes in its own type, everything else is float32."""
        self.adapter.sample_keys.rows = batch.dropout_keys
        noisy = objective.add_noise(batch.latents, batch.noise, batch.timesteps, self.alphas_cumprod)
        prompt, pooled = self._text(batch)
        dtype = self.unet.dtype
        predicted = self.unet(
            noisy.to(dtype),
            batch.timesteps,
            encoder_hidden_states=prompt.to(dtype),
            added_cond_kwargs={"text_embeds": pooled.to(dtype), "time_ids": batch.time_ids},
            return_dict=False,
        )[0]
        wanted = objective.target(self.prediction, batch.latents, batch.noise, batch.timesteps, self.alphas_cumprod)
        weights = None
        if min_snr_gamma is not None:
            ratio = objective.snr(batch.timesteps, self.alphas_cumprod)
            weights = objective.min_snr_weights(ratio, min_snr_gamma, self.prediction)
        return objective.sample_losses(predicted, wanted, weights)

    def _text(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, L, D] and pooled [B, P]: the cached ones, unless the encoders are in training."""
        if self.text_encoders is None:
            return batch.prompt, batch.pooled
        first, _ = run_encoder(self.text_encoders[0], batch.ids_1)
        second, pooled = run_encoder(self.text_encoders[1], batch.ids_2)
        hidden = torch.concat([first, second], dim=-1)
        if self.zeros_for_no_text:
            return hidden * batch.has_text.view(-1, 1, 1).to(hidden), pooled * batch.has_text.view(-1, 1).to(pooled)
        return hidden, pooled
