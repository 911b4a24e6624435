"""One evaluation of the UNet for several jobs. What fails for a batch is tried again in halves, down to one job."""

import traceback
from collections.abc import Sequence

import torch

from lorafleet.sdxl.base import Base
from lorafleet.serve.engine.bank import AdapterBank
from lorafleet.serve.engine.sampler import Sampler

Outcome = torch.Tensor | Exception


def predict(
    base: Base, samplers: Sequence[Sampler], row_buckets: Sequence[int] = (), bank: AdapterBank | None = None
) -> list[Outcome]:
    """The model output [rows, 4, h, w] of each sampler, or the error that it fails with when it runs alone.

    All latents have one size. The batch is filled up to the next of `row_buckets` with copies of its last row; one
    larger than all of them runs as it is. With a `bank` each row gets its sampler's adapters, a copy none. Raises
    torch.AcceleratorError: after it the device is of no use.
    """
    try:
        return list(_forward(base, samplers, row_buckets, bank))
    except torch.AcceleratorError:
        raise
    except Exception as error:  # whose fault it is shows when each half runs alone
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        failure = error
    if isinstance(failure, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    if len(samplers) == 1:
        return [failure]
    half = len(samplers) // 2
    return [part for side in (samplers[:half], samplers[half:]) for part in predict(base, side, row_buckets, bank)]


def _forward(
    base: Base, samplers: Sequence[Sampler], row_buckets: Sequence[int], bank: AdapterBank | None
) -> tuple[torch.Tensor, ...]:
    if bank is not None:
        bank.set_rows([sampler.adapters for sampler in samplers for _ in range(sampler.rows)])
    rows = [sampler.rows for sampler in samplers]
    padding = min((bucket for bucket in row_buckets if bucket >= sum(rows)), default=sum(rows)) - sum(rows)

    def batch(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([*parts, *[parts[-1][-1:]] * padding])

    # Timesteps of every sampler become float32, which the UNet's sinusoidal embedding would make of them anyway.
    timesteps = [sampler.timestep.float().reshape(1).expand(sampler.rows) for sampler in samplers]
    guidance = [sampler.guidance_embedding for sampler in samplers if sampler.guidance_embedding is not None]
    conditions = {
        "text_embeds": batch([sampler.pooled for sampler in samplers]),
        "time_ids": batch([sampler.time_ids for sampler in samplers]),
    }
    output: torch.Tensor = base.pipeline.unet(
        batch([sampler.model_input() for sampler in samplers]),
        batch(timesteps).to(base.device),
        encoder_hidden_states=batch([sampler.hidden for sampler in samplers]),
        timestep_cond=batch(guidance) if guidance else None,
        added_cond_kwargs=conditions,
        return_dict=False,
    )[0]
    return torch.split(output[: sum(rows)], rows)
