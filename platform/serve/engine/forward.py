"""One evaluation of the UNet for several jobs. What fails for a batch is tried again in halves, down to one job."""

import traceback
from collections.abc import Sequence

import torch

from lorafleet.serve.engine.bank import AdapterBank
from lorafleet.serve.engine.sampler import Sampler
from lorafleet.serve.engine.unet_inputs import UNetInputs
from lorafleet.serve.engine.unet_runner import UNetRunner

Outcome = torch.Tensor | Exception


def predict(
    unet: UNetRunner, samplers: Sequence[Sampler], row_buckets: Sequence[int] = (), bank: AdapterBank | None = None
) -> list[Outcome]:
    """The model output [rows, 4, h, w] of each sampler, or the error that it fails with when it runs alone.

    All latents have one size, and either all of them take a shallow step next or none. The batch is filled up to the
    next of `row_buckets` with copies of its last row; one larger than all of them runs as it is. With a `bank` each row
    gets its sampler's adapters, a copy none. Raises torch.AcceleratorError: after it the device is of no use.
    """
    try:
        return list(_forward(unet, samplers, row_buckets, bank))
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
    return [part for side in (samplers[:half], samplers[half:]) for part in predict(unet, side, row_buckets, bank)]


def filled_up(rows: int, row_buckets: Sequence[int]) -> int:
    """How many rows a batch of `rows` is run with."""
    return min((bucket for bucket in row_buckets if bucket >= rows), default=rows)


def _forward(
    unet: UNetRunner, samplers: Sequence[Sampler], row_buckets: Sequence[int], bank: AdapterBank | None
) -> tuple[torch.Tensor, ...]:
    if bank is not None:
        bank.set_rows([sampler.adapters for sampler in samplers for _ in range(sampler.rows)])
    if unet.cross_attention is not None:
        texts = [sampler.key_values for sampler in samplers if sampler.key_values is not None]
        assert len(texts) == len(samplers)
        unet.cross_attention.set_rows(texts)
    rows = [sampler.rows for sampler in samplers]
    padding = filled_up(sum(rows), row_buckets) - sum(rows)

    def filled(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [*parts, *[parts[-1][-1:]] * padding]

    def batch(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(filled(parts))

    guidance = [sampler.guidance_embedding for sampler in samplers if sampler.guidance_embedding is not None]
    inputs = UNetInputs(
        sample=batch([sampler.model_input() for sampler in samplers]),
        timesteps=batch([sampler.timestep_rows() for sampler in samplers]),
        hidden=batch([sampler.hidden for sampler in samplers]),
        pooled=batch([sampler.pooled for sampler in samplers]),
        time_ids=batch([sampler.time_ids for sampler in samplers]),
        guidance=batch(guidance) if guidance else None,
    )
    has_adapters = any(weight != 0.0 for sampler in samplers for _, weight in sampler.adapters)
    if samplers[0].is_shallow:
        deep = [sampler.deep for sampler in samplers if sampler.deep is not None]
        output = unet.outer(inputs, filled(deep), has_adapters=has_adapters)
    elif any(sampler.will_reuse for sampler in samplers):
        output, whole_deep = unet.whole(inputs, has_adapters=has_adapters)
        for sampler, part in zip(samplers, torch.split(whole_deep[: sum(rows)], rows), strict=True):
            sampler.keep(part)
    else:
        output = unet(inputs, has_adapters=has_adapters)
    return torch.split(output[: sum(rows)], rows)
