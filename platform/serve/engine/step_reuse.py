"""The UNet in two parts, so that a step may run the outer one alone and reuse what the inner one gave some steps ago.

DeepCache (Ma et al. 2023, arXiv 2312.00858), whose observation it is that the inner blocks' result, `deep`, changes
little from step to step. The outer part is here the first block down and the last one up: of SDXL's products 7 in 100.
Images change by it, the more the larger the distance between whole steps.
"""

from typing import Any

import torch
from torch import nn

from lorafleet.core.errors import ConfigError
from lorafleet.sdxl.base import Base
from lorafleet.serve.engine.slots import SlotLinear
from lorafleet.serve.engine.unet_inputs import UNetInputs


class TwoPartUNet:
    """Calls the blocks of a base's UNet as diffusers' UNet2DConditionModel does, of which it copies nothing: what is
    compiled, quantised or given adapters in there is so here."""

    def __init__(self, base: Base) -> None:
        """Raises ConfigError for a UNet that is no SDXL's in this respect, or not always where it is computed."""
        self._unet: Any = base.pipeline.unet
        if base.config.low_memory or not _can_be_cut(self._unet):
            why = "base.low_memory moves the UNet to and fro" if base.config.low_memory else "this base's UNet has none"
            raise ConfigError(
                f"engine.step_reuse needs an outer part of the UNet that runs by itself, and {why}: leave it out",
                param="engine.step_reuse",
            )

    @property
    def outer_has_adapters(self) -> bool:
        blocks = (self._unet.down_blocks[0], self._unet.up_blocks[-1])
        return any(isinstance(module, SlotLinear) for block in blocks for module in block.modules())

    def whole(self, inputs: UNetInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The model output [rows, 4, h, w], bit by bit the UNet's own, and `deep` [rows, C, h, w]."""
        unet, time, sample = self._unet, self._time(inputs), self._unet.conv_in(inputs.sample)
        skipped = [sample]
        for block in unet.down_blocks:
            sample, more = block(sample, time, **_text(block, inputs))
            skipped += more
        if unet.mid_block is not None:
            sample = unet.mid_block(sample, time, **_text(unet.mid_block, inputs))
        for block in unet.up_blocks[:-1]:
            count = len(block.resnets)
            sample = block(sample, tuple(skipped[-count:]), time, **_text(block, inputs))
            del skipped[-count:]
        return self._end(inputs, sample, skipped, time), sample

    def outer(self, inputs: UNetInputs, deep: torch.Tensor) -> tuple[torch.Tensor]:
        """The model output [rows, 4, h, w] with another step's `deep`."""
        block, time, sample = self._unet.down_blocks[0], self._time(inputs), self._unet.conv_in(inputs.sample)
        _, more = block(sample, time, **_text(block, inputs))
        return (self._end(inputs, deep, [sample, *more[: len(block.resnets)]], time),)

    def _time(self, inputs: UNetInputs) -> torch.Tensor:
        """[rows, T], with what SDXL is told about sizes."""
        unet = self._unet
        time = unet.time_embedding(unet.get_time_embed(inputs.sample, inputs.timesteps), inputs.guidance)
        added = {"text_embeds": inputs.pooled, "time_ids": inputs.time_ids}
        whole: torch.Tensor = time + unet.get_aug_embed(time, inputs.hidden, added)
        return whole if unet.time_embed_act is None else unet.time_embed_act(whole)

    def _end(
        self, inputs: UNetInputs, deep: torch.Tensor, skipped: list[torch.Tensor], time: torch.Tensor
    ) -> torch.Tensor:
        unet, block = self._unet, self._unet.up_blocks[-1]
        sample = block(deep, tuple(skipped), time, **_text(block, inputs))
        if unet.conv_norm_out is not None:
            sample = unet.conv_act(unet.conv_norm_out(sample))
        output: torch.Tensor = unet.conv_out(sample)
        return output


def is_possible(base: Base) -> bool:
    return not base.config.low_memory and _can_be_cut(base.pipeline.unet)


def _can_be_cut(unet: Any) -> bool:
    """Whether it is told no more than SDXL's, and has blocks within its first and last one."""
    return (
        unet.config.addition_embed_type == "text_time"
        and unet.class_embedding is None
        and unet.encoder_hid_proj is None
        and not unet.config.center_input_sample
        and len(unet.down_blocks) > 1
        and len(unet.up_blocks) > 1
    )


def _text(block: nn.Module, inputs: UNetInputs) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": inputs.hidden} if getattr(block, "has_cross_attention", False) else {}
