"""The linears of the UNet's transformers as products of 8-bit floats: half the time of each on GPUs that have them.

Weights and inputs are float8_e4m3fn with one scale for a whole tensor; the inputs' scales are found once, before
anything is compiled, from a few images that the unquantised UNet draws. Adapters see the inputs as they were and add in
the base's own type. Images change a little: `loadtests/fp8_change.py` says how much.

The bank wraps first, this comes second, and is undone first.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.serve.engine.job import Job
from lorafleet.serve.engine.prompts import PromptCache
from lorafleet.serve.engine.sampler import Sampler
from lorafleet.serve.engine.slots import SlotLinear

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(E4M3).max  # 448
LEAST_AMAX: Final = 1e-6  # of a tensor of zeros, whose scale must not be one
CAPABILITY: Final = (8, 9)
GRID: Final = 16  # features of such a product come in multiples of it

# The text's keys and values, and the embeddings of time and size, have too few tokens to gain.
_LINEARS: Final = re.compile(
    r"(.+\.)?attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn1\.to_[qkv]|attn2\.to_q|attn[12]\.to_out\.0|ff\.net\.(0\.proj|2)))"
)
_SAME_INPUT: Final = re.compile(r"attn1\.to_[qkv]$")

PROMPTS: Final = (
    "red apple on a blue background",
    "a photograph of an old fisherman mending his nets in the harbour, soft morning light",
    "a watercolour of a city street in the rain, umbrellas, neon signs, reflections",
    "a poster with the words GRAND OPENING in bold letters, flat colours",
    "a snowy mountain range under a starry sky, wide angle",
    "smiling robot on a yellow background",
)
STEPS: Final = 8
GUIDANCE: Final = 5.0
MARGIN: Final = 2.0
"""Room above the largest input seen, for adapters that enlarge it. It costs next to nothing in floating point: only
what is below 1/14336 of the largest loses digits."""

_emulates = False


@contextmanager
def emulated() -> Iterator[None]:
    """Lets devices without 8-bit products compute the same numbers, slower than without: for tests and measurements."""
    global _emulates
    before, _emulates = _emulates, True
    try:
        yield
    finally:
        _emulates = before


def is_possible(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None
    return is_nvidia and torch.cuda.get_device_capability(device) >= CAPABILITY


def require(base: Base) -> None:
    """Raises ConfigError, naming the setting and the fix, unless this base can be quantised on its device."""
    device = base.device
    if not is_possible(device) and not _emulates:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        _refuse(f"needs an NVIDIA GPU of compute capability 8.9 or more, the device is {name}: set engine.fp8=false")
    if device.type == "cuda" and base.dtype == torch.float32:
        _refuse("has no products that end in float32: set base.dtype=bfloat16, or engine.fp8=false")
    if device.type == "cuda" and base.config.low_memory:
        _refuse("needs the weights in place, base.low_memory moves them about: set one of the two to false")
    linears = _linears(base)
    if not linears:
        _refuse("finds no linear in this base whose features are multiples of 16: set engine.fp8=false")
    if any(getattr(linear, "product", None) is not None for linear in linears.values()):
        _refuse("is in use on this base already: close the other engine first")


def calibrate(base: Base, size: tuple[int, int]) -> dict[str, float]:
    """The largest absolute input of each linear that can be quantised, over `STEPS` steps of `PROMPTS` in `size`,
    (width, height) in pixels; by path in the UNet. The UNet is as yet uncompiled, and no row has adapters."""
    unet: Any = base.pipeline.unet
    seen: dict[str, torch.Tensor] = {}

    def observe(path: str, x: torch.Tensor) -> None:
        largest = x.abs().amax().float()
        seen[path] = torch.maximum(seen[path], largest) if path in seen else largest

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, path=path: observe(path, inputs[0]))
        for path, linear in _linears(base).items()
    ]
    try:
        with torch.inference_mode():
            for seed, prompt in enumerate(PROMPTS):
                request = GenerationRequest(prompt=prompt, steps=STEPS, guidance_scale=GUIDANCE, scheduler="euler")
                texts = PromptCache(base, 0).pair(prompt, "")
                sampler = Sampler(base, Job(request, seed=seed), size, *texts)
                while not sampler.is_done:
                    output = unet(
                        sampler.model_input(),
                        sampler.timestep_rows(),
                        encoder_hidden_states=sampler.hidden,
                        timestep_cond=sampler.guidance_embedding,
                        added_cond_kwargs={"text_embeds": sampler.pooled, "time_ids": sampler.time_ids},
                        return_dict=False,
                    )[0]
                    sampler.advance(output)
    finally:
        for hook in hooks:
            hook.remove()
    amax = {path: float(largest) for path, largest in seen.items()}
    for path, largest in amax.items():
        if not largest < float("inf"):
            _refuse(f"cannot be calibrated, inputs of {path} are not finite: set base.dtype=bfloat16")
    return amax


class Fp8Product(nn.Module):
    """What a linear computes, from 8-bit floats. x: [..., in] in the bias's type, which is the result's too.

    Nothing of it is a Python number, so that all blocks of a kind share what is compiled for one.
    """

    def __init__(self, weight: torch.Tensor, x_scale: torch.Tensor, *, emulates: bool = False) -> None:
        """`weight`: [out, in]. `x_scale`: scalar, float32; where linears have the same x and scale, a compiler
        quantises x once. An `x` is represented by x / x_scale, up to 448."""
        super().__init__()
        scale = weight.abs().amax().float().clamp(min=LEAST_AMAX) / LARGEST
        self._emulates = emulates
        # buffers, because compilers and CUDA graphs take those for addresses that stay
        self.register_buffer("weight8", _quantise(weight.float(), scale), persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("x_scale", x_scale, persistent=False)

    weight8: torch.Tensor  # [out, in]
    weight_scale: torch.Tensor
    x_scale: torch.Tensor

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x8 = _quantise(x.reshape(-1, x.shape[-1]), self.x_scale)
        if self._emulates:
            y = functional.linear(x8.float(), self.weight8.float()) * (self.x_scale * self.weight_scale)
            y = (y if bias is None else y + bias).to(x.dtype)
        else:
            y = torch._scaled_mm(
                x8,
                self.weight8.t(),
                scale_a=self.x_scale,
                scale_b=self.weight_scale,
                bias=bias,
                out_dtype=x.dtype,
                use_fast_accum=True,
            )
        return y.view(*x.shape[:-1], -1)


class Fp8Linear(nn.Linear):
    """A linear that takes its product from elsewhere; a SlotLinear does so by itself."""

    def __init__(self, linear: nn.Linear, product: Fp8Product) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.training = linear.training
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.product(x, self.bias)
        return y


class Fp8Weights:
    """The UNet's linears, quantised from here to `close`. Meanwhile their own weights are kept in the CPU's memory:
    the device has one byte in place of two for each, 2.1 GB less with SDXL."""

    def __init__(self, base: Base, amax: Mapping[str, float]) -> None:
        """`amax`: as `calibrate` gives it."""
        self._unet: nn.Module = base.pipeline.unet
        self._device = base.device
        self._plain: dict[str, nn.Linear] = {}  # those that are replaced as a whole, by path
        self._linears: list[nn.Linear] = []
        x_scales: dict[str, torch.Tensor] = {}
        emulates = not is_possible(base.device)
        # else nothing of it could be used outside of inference mode again
        with torch.inference_mode(False), torch.no_grad():
            for path, linear in _linears(base).items():
                x = _SAME_INPUT.sub("attn1", path)
                if x not in x_scales:
                    x_scales[x] = torch.tensor(max(amax[path], LEAST_AMAX) * MARGIN / LARGEST, device=base.device)
                product = Fp8Product(linear.weight, x_scales[x], emulates=emulates)
                if isinstance(linear, SlotLinear):
                    linear.product = product
                else:
                    self._plain[path] = linear
                    self._put(path, Fp8Linear(linear, product))
                self._linears.append(linear)
                # in place: whoever else holds the parameter, as the bank does, is to get it back too
                linear.weight.data = linear.weight.data.cpu()

    def close(self) -> None:
        """Puts back what was there, bit for bit. May be called twice."""
        with torch.inference_mode(False):
            for linear in self._linears:
                linear.weight.data = linear.weight.data.to(self._device)
                if isinstance(linear, SlotLinear):
                    linear.product = None
        for path, linear in self._plain.items():
            self._put(path, linear)
        self._linears, self._plain = [], {}

    def _put(self, path: str, linear: nn.Linear) -> None:
        parent, _, last = path.rpartition(".")
        setattr(self._unet.get_submodule(parent), last, linear)


def _linears(base: Base) -> dict[str, nn.Linear]:
    """Those that are worth it, by path in the UNet."""
    return {
        path: module
        for path, module in base.pipeline.unet.named_modules()
        if isinstance(module, nn.Linear)
        and _LINEARS.fullmatch(path)
        and module.in_features % GRID == 0
        and module.out_features % GRID == 0
    }


def _quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # What is not a number stays so; without the clamp everything above 448 would become that.
    return (x * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(E4M3)


def _refuse(why: str) -> None:
    raise ConfigError(f"engine.fp8 {why}", param="engine.fp8")
