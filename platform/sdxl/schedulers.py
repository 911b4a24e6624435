"""Samplers by name, each a fresh object for one image: multistep samplers keep history between steps."""

from collections.abc import Mapping
from typing import Any, Final

from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from lorafleet.core.generation import SchedulerName
from lorafleet.sdxl.base import Base

_DPMPP: Final = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": False}

# Turbo and Lightning were distilled for timesteps that begin at the noisiest one: "trailing" (Lin et al. 2023,
# section 3.3). A base that was distilled itself says so in its own schedule, which every name keeps.
# `dpmpp_sde` is DPM++ 2M SDE: diffusers' DPMSolverSDEScheduler needs torchsde and draws its noise from a Brownian
# tree of its own, this one takes it from the image's generator.
_RECIPES: Final[Mapping[str, tuple[Any, dict[str, Any]]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "euler_a": (EulerAncestralDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, _DPMPP),
    "dpmpp_2m_karras": (DPMSolverMultistepScheduler, {**_DPMPP, "use_karras_sigmas": True}),
    "dpmpp_sde": (DPMSolverMultistepScheduler, {**_DPMPP, "algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "euler_trailing": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
}


def make_scheduler(base: Base, name: SchedulerName) -> SchedulerMixin:
    """A scheduler with the base's noise schedule and prediction type, not yet given its timesteps."""
    scheduler_class, changes = _RECIPES[name]
    return scheduler_class.from_config(base.scheduler_config, **changes)
