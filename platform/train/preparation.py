"""How a base is made ready for the steps: what is kept, exchanged, compiled, or sent away. All in place."""

from typing import Any

import torch

from lorafleet.sdxl.base import Base
from lorafleet.train.adapter import TrainedAdapter
from lorafleet.train.blocks import fuse_blocks
from lorafleet.train.config import LoopConfig
from lorafleet.train.fused import fuse
from lorafleet.train.parking import park
from lorafleet.train.quantise import quantise_linears
from lorafleet.train.regions import compile_regions


def prepare(base: Base, adapter: TrainedAdapter, config: LoopConfig) -> None:
    """In this order: linears are quantised before what computes with them is exchanged, and that before it is
    compiled."""
    unet: Any = base.pipeline.unet
    if config.gradient_checkpointing:
        _checkpoint_gradients(base, adapter.parts)
    if config.quantise_base:
        quantise_linears(unet)
    is_fused = config.fused and fuse(unet) > 0
    if config.compile != "none":
        if is_fused:
            fuse_blocks(unet)
        unet.to(memory_format=torch.channels_last)
        if config.compile == "full":
            unet.compile(fullgraph=True)
        else:
            compile_regions(unet)
    park(base, adapter.parts)


def _checkpoint_gradients(base: Base, parts: tuple[str, ...]) -> None:
    for part in parts:
        model = getattr(base.pipeline, part)
        if part == "unet":
            model.enable_gradient_checkpointing()
        else:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
