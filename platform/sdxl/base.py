"""Loads an SDXL base model onto a device."""

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from lorafleet.core.errors import BaseUnreadable, ConfigError
from lorafleet.sdxl.config import BaseConfig
from lorafleet.sdxl.fingerprint import fingerprint
from lorafleet.sdxl.folder import BaseFolder, find_base, read_json
from lorafleet.sdxl.limits import BaseLimits

logger = logging.getLogger(__name__)

DTYPES: Final = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class Base:
    """A loaded base. Its weights are shared by every request; only `tokenizer_lock` guards anything.

    `pipeline` is diffusers' own with all parts in eval mode; take a shallow copy before setting a scheduler on it.
    The VAE is float32 where float16 would overflow, so `vae.dtype` may differ from `dtype`.
    """

    config: BaseConfig
    folder: BaseFolder
    pipeline: StableDiffusionXLPipeline
    device: torch.device
    dtype: torch.dtype
    fingerprint: str
    limits: BaseLimits
    scheduler_config: dict[str, Any]
    tokenizer_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def id(self) -> str:
        """The name others see: a folder's last part, so that no path of this machine ends up in an image."""
        is_folder = self.config.id != "emojixl" and Path(self.config.id).expanduser().is_dir()
        return self.folder.root.name if is_folder else self.config.id

    def check_size(self, width: int, height: int) -> None:
        """Raises InvalidRequest, naming the field, its grid and range, unless the base can draw this size."""
        self.limits.check_size(width, height)


def load_base(config: BaseConfig) -> Base:
    """Loads the base that `config` names: milliseconds for emojixl, half a minute for SDXL.

    Raises BaseNotFound, BaseUnreadable or ConfigError, each one sentence.
    """
    folder = find_base(config)
    device = resolve_device(config.device)
    dtype = _resolve_dtype(config, device)
    pipeline = _read_pipeline(config, folder, dtype)
    window = min(pipeline.tokenizer.model_max_length, pipeline.tokenizer_2.model_max_length)
    limits = BaseLimits.of_configs(pipeline.unet.config, pipeline.vae.config, window)
    _set_memory_profile(pipeline, config, device)
    _set_attention(pipeline, config, device)
    return Base(
        config=config,
        folder=folder,
        pipeline=pipeline,
        device=device,
        dtype=dtype,
        fingerprint=fingerprint(folder),
        limits=limits,
        scheduler_config=dict(pipeline.scheduler.config),
    )


def resolve_device(name: str) -> torch.device:
    """The device that a setting names. Raises ConfigError when this machine or this torch does not have it."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"base.device is {name}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA GPUs: "
            "set base.device=cpu, or install a CUDA build of torch",
            param="base.device",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("base.device is mps, but this machine has none: set base.device=cpu", param="base.device")
    return device


def _resolve_dtype(config: BaseConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.dtype == "float16" and device.type != "cuda":
        raise ConfigError(
            f"base.dtype=float16 does not work on {device.type}: set base.dtype=float32", param="base.dtype"
        )
    return DTYPES[config.dtype]


def _read_pipeline(config: BaseConfig, folder: BaseFolder, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """All parts in eval mode on the CPU, in `dtype` from the start: casting later makes diffusers warn and, for
    modules kept in float32, is wrong."""
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()  # what matters to a caller is said by our own errors and warnings
    vae_dtype = dtype
    if dtype == torch.float16 and read_json(folder.parts["vae"] / "config.json").get("force_upcast", True):
        vae_dtype = torch.float32
        logger.warning(
            "the VAE of %s overflows in float16 and runs in float32: set base.vae=madebyollin/sdxl-vae-fp16-fix",
            config.id,
        )
    try:
        vae = read_vae(config, folder, vae_dtype)
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            folder.root,
            vae=vae,
            dtype=dtype,
            variant=config.variant,
            use_safetensors=True,
            local_files_only=True,
            add_watermarker=False,
        )
    except Exception as error:  # whatever a damaged folder makes diffusers, transformers or safetensors raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseUnreadable(f"the base in {folder.root} does not load: {reason[0]}", param="base.id") from error
    pipeline.set_progress_bar_config(disable=True)
    for tokenizer, encoder in (
        (pipeline.tokenizer, pipeline.text_encoder),
        (pipeline.tokenizer_2, pipeline.text_encoder_2),
    ):
        tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return pipeline


def read_vae(config: BaseConfig, folder: BaseFolder, dtype: torch.dtype) -> AutoencoderKL:
    """The base's VAE alone, in eval mode on the CPU. Raises whatever a damaged folder makes diffusers raise."""
    return AutoencoderKL.from_pretrained(
        folder.parts["vae"],
        dtype=dtype,
        variant=None if config.vae else config.variant,
        use_safetensors=True,
        local_files_only=True,
    )


def _set_memory_profile(pipeline: StableDiffusionXLPipeline, config: BaseConfig, device: torch.device) -> None:
    if config.vae_is_sliced:
        pipeline.vae.enable_slicing()
    if config.vae_is_tiled:
        pipeline.vae.enable_tiling()
    if config.low_memory and device.type == "cuda":
        pipeline.enable_model_cpu_offload(gpu_id=device.index or 0)
    else:
        pipeline.to(device)


def _set_attention(pipeline: StableDiffusionXLPipeline, config: BaseConfig, device: torch.device) -> None:
    """PyTorch's SDPA is what diffusers starts with."""
    if config.attention == "sliced":
        pipeline.enable_attention_slicing()
    if config.attention == "xformers":
        try:
            if device.type != "cuda":
                raise ValueError(f"it needs a CUDA GPU, the device is {device.type}")
            pipeline.enable_xformers_memory_efficient_attention()
        except Exception as error:  # not installed, or kernels built for another torch: every kind occurs
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("base.attention=xformers is not usable here, sdpa runs instead: %s", reason)
