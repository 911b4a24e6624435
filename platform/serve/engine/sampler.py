"""One image's way from noise to latents, one UNet evaluation at a time.

The arithmetic is that of diffusers' StableDiffusionXLPipeline for one image: the same calls in the same order, so
that the results agree bit for bit where the UNet's do.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Final

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor

from lorafleet.core.errors import GenerationFailed
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.schedulers import make_scheduler
from lorafleet.sdxl.text import PromptEmbedding
from lorafleet.serve.engine.cross_attention import KeyValues
from lorafleet.serve.engine.init_image import InitImage, first_step
from lorafleet.serve.engine.job import Job

CPU: Final = torch.device("cpu")


class Sampler:
    """State of one job between two evaluations; for one thread at a time.

    With guidance it takes part in a batch as two rows, negative prompt first, else as one. What its rows are told
    does not change between steps: `hidden` [rows, L, D], `pooled` [rows, P], `time_ids` [rows, 6] in the base's dtype,
    and `adapters`, (slot, weight) pairs that are those of each row. With `key_values` the text is in these, not in
    `hidden`. With the request's `step_reuse` of n, evaluations 0, n, 2n, ... are whole and those between are shallow.
    """

    def __init__(
        self,
        base: Base,
        job: Job,
        size: tuple[int, int],
        positive: PromptEmbedding,
        negative: PromptEmbedding,
        adapters: Sequence[tuple[int, float]] = (),
    ) -> None:
        """`size`: (width, height) in pixels."""
        self.adapters = adapters
        width, height = size
        pipeline = base.pipeline
        self._guidance_scale = job.request.guidance_scale
        self._guidance_rescale = job.guidance_rescale
        # A base distilled for guidance is told the scale in place of being run twice.
        embeds_guidance = pipeline.unet.config.time_cond_proj_dim is not None
        self.is_guided = self._guidance_scale > 1 and not embeds_guidance
        sides = [negative, positive] if self.is_guided else [positive]
        self.hidden = torch.cat([side.hidden for side in sides])
        self.pooled = torch.cat([side.pooled for side in sides])
        self.key_values: KeyValues | None = None
        # (original size, crop's corner, target size), heights first: SDXL paper, section 2.2.
        conditions = [height, width, 0, 0, height, width]
        self.time_ids = torch.tensor([conditions] * self.rows, dtype=self.hidden.dtype).to(base.device)
        self.guidance_embedding: torch.Tensor | None = None
        if embeds_guidance:
            self.guidance_embedding = pipeline.get_guidance_scale_embedding(
                torch.tensor([self._guidance_scale - 1]), embedding_dim=pipeline.unet.config.time_cond_proj_dim
            ).to(device=base.device, dtype=self.hidden.dtype)

        self._generator = torch.Generator(CPU).manual_seed(job.seed)
        scheduler: Any = make_scheduler(base, job.request.scheduler)
        scheduler.set_timesteps(job.request.steps, device=CPU)  # on a GPU each look at one would wait for the GPU
        skipped = first_step(job.request.steps, job.strength) * scheduler.order if job.init_image else 0
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(skipped)  # or else it searches the timestep in its list: another wait
        self._scheduler = scheduler
        self._timesteps = list(scheduler.timesteps[skipped:])
        # float32, which the UNet's sinusoidal embedding would make of them anyway; all at once, for one copy
        self._device_timesteps: torch.Tensor = scheduler.timesteps[skipped:].float().to(base.device)
        accepted = inspect.signature(scheduler.step).parameters
        options = {"generator": self._generator, "eta": 0.0}
        self._step_options = {name: value for name, value in options.items() if name in accepted}
        self._init_image: InitImage | None = None
        if job.init_image is not None:
            self._init_image = InitImage(base, job.init_image, job.mask, self._generator, size, self.hidden.dtype)
            from_noise = job.mask is not None and job.strength == 1.0
            latents = self._init_image.start(scheduler, self._timesteps[0], from_noise=from_noise)
        else:
            factor = pipeline.vae_scale_factor
            shape = (1, pipeline.unet.config.in_channels, height // factor, width // factor)
            noise = randn_tensor(shape, generator=self._generator, device=base.device, dtype=self.hidden.dtype)
            latents = noise * scheduler.init_noise_sigma
        self.latents: torch.Tensor = latents
        """[1, 4, h, w] as the VAE's decoder wants them once `is_done`."""
        self.done = 0
        self._step_reuse = job.request.step_reuse
        self.deep: torch.Tensor | None = None
        """[rows, C, h, w]: what shallow evaluations reuse of the last whole one."""

    def tensors(self) -> list[torch.Tensor]:
        """On the device, made for the job and read at every step."""
        text = [self.key_values.rows] if self.key_values is not None else []
        return [self.hidden, self.pooled, self.time_ids, self.latents, *text]

    def replace_text(self, key_values: KeyValues) -> None:
        self.key_values, self.hidden = key_values, key_values.hidden

    @property
    def rows(self) -> int:
        return 2 if self.is_guided else 1

    @property
    def total(self) -> int:
        """Evaluations of the UNet, more than the request's steps with a second-order sampler."""
        return len(self._timesteps)

    @property
    def is_done(self) -> bool:
        return self.done == self.total

    @property
    def is_shallow(self) -> bool:
        """Whether the next evaluation is."""
        return self.done % self._step_reuse > 0

    @property
    def will_reuse(self) -> bool:
        """Whether the one after the next reuses what the next one gives."""
        return not self.is_shallow and (self.done + 1) % self._step_reuse > 0 and self.done + 1 < self.total

    def keep(self, deep: torch.Tensor) -> None:
        """Copies what the whole evaluation of its rows gave, if it will be reused."""
        if self.will_reuse:
            self.deep = deep.clone() if self.deep is None else self.deep.copy_(deep)

    def release(self) -> None:
        """Lets go of what is large and not needed for decoding."""
        self.key_values = self.deep = None

    @property
    def timestep(self) -> torch.Tensor:
        """Scalar on the CPU."""
        timestep: torch.Tensor = self._timesteps[self.done]
        return timestep

    def timestep_rows(self) -> torch.Tensor:
        """[rows], float32, on the base's device, for the next evaluation."""
        return self._device_timesteps[self.done : self.done + 1].expand(self.rows)

    def model_input(self) -> torch.Tensor:
        """[rows, 4, h, w] for the next evaluation."""
        latents = torch.cat([self.latents] * self.rows)
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def advance(self, model_output: torch.Tensor) -> None:
        """Takes the step for which `model_output` [rows, 4, h, w] was predicted.

        On a CPU raises GenerationFailed when that ends in NaN or infinity; elsewhere looking would stop the device at
        every step, and decoding finds it.
        """
        prediction = model_output
        if self.is_guided:
            negative, positive = model_output.chunk(2)
            prediction = negative + self._guidance_scale * (positive - negative)
            if self._guidance_rescale > 0.0:
                prediction = rescale_noise_cfg(prediction, positive, guidance_rescale=self._guidance_rescale)
        self.latents = self._scheduler.step(
            prediction, self.timestep, self.latents, **self._step_options, return_dict=False
        )[0]
        self.done += 1
        if self._init_image is not None:
            next_timestep = None if self.is_done else self.timestep
            self.latents = self._init_image.keep(self.latents, self._scheduler, next_timestep)
        if self.latents.device.type == "cpu":
            self._require_finite()

    def _require_finite(self) -> None:
        if not bool(torch.isfinite(self.latents).all()):
            raise GenerationFailed(
                f"the latents hold NaN or infinity after step {self.done} of {self.total}: lower guidance_scale or the "
                "weights of adapters, or set base.dtype=float32"
            )
