"""The linears of the UNet's transformers as products of 8-bit floats: half the time of each on GPUs that have them.

Weights and inputs are float8_e4m3fn with one scale for a whole tensor; the inputs' scales are found once, before
anything is compiled, from a few images that the unquantised UNet draws. Adapters keep the base's own type; they see the
same quantised inputs, which on a GPU are all that is written and read between kernels. Images change a little:
`loadtests/image_change.py` says how much.

The bank wraps first, then the self attentions are joined, this comes last, and is undone first.
"""

import functools
import logging
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Final

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import nn
from torch.nn import functional

from lorafleet.core.errors import ConfigError
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.serve.engine import caches
from lorafleet.serve.engine.job import Job
from lorafleet.serve.engine.prompts import PromptCache
from lorafleet.serve.engine.sampler import Sampler
from lorafleet.serve.engine.slots import SlotLinear

logger = logging.getLogger(__name__)

E4M3: Final = torch.float8_e4m3fn
LARGEST: Final = torch.finfo(E4M3).max  # 448
LEAST_AMAX: Final = 1e-6  # of a tensor of zeros, whose scale must not be one
CAPABILITY: Final = (8, 9)
GRID: Final = 16  # features of such a product come in multiples of it

# The text's keys and values, and the embeddings of time and size, have too few tokens to gain.
_LINEARS: Final = re.compile(
    r"(.+\.)?attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
    r"(attn1\.(to_[qkv]|processor\.joined)|attn2\.to_q|attn[12]\.to_out\.0|ff\.net\.(0\.proj|2)))"
)
_SAME_INPUT: Final = re.compile(r"to_[qkv]$")
_JOINED: Final = "processor.joined"

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
COPIES: Final = 4  # of weights to the CPU at a time

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
    (width, height) in pixels; by path in the UNet. The UNet is as yet uncompiled, and no row has adapters.

    It is done once for a base, and kept on disk (`caches.measured`)."""
    depends_on = [base.fingerprint, str(base.dtype), size, PROMPTS, STEPS, GUIDANCE, sorted(_linears(base))]
    return caches.measured("fp8-inputs", depends_on, lambda: _largest_inputs(base, size))


def _largest_inputs(base: Base, size: tuple[int, int]) -> dict[str, float]:
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
    """What a linear computes, from 8-bit floats. x: [..., in], quantised or in the weight's type, as the result is.

    Nothing of it is a Python number, so that all blocks of a kind share what is compiled for one.
    """

    def __init__(self, weight: torch.Tensor, x_scale: torch.Tensor, *, emulates: bool = False) -> None:
        """`weight`: [out, in]. `x_scale`: scalar, float32; where linears have the same x and scale, a compiler
        quantises x once. An `x` is represented by x / x_scale, up to 448."""
        super().__init__()
        scale = weight.abs().amax().float().clamp(min=LEAST_AMAX) / LARGEST
        self._emulates = emulates
        self._kernels = None if emulates else _gpu_kernels(weight.device)
        self.adds_adapters = self._kernels is not None
        self.dtype = weight.dtype
        self.features = weight.shape[0]
        # buffers, because compilers and CUDA graphs take those for addresses that stay
        self.register_buffer("weight8", quantise(weight.float(), scale), persistent=False)
        self.register_buffer("weight_scale", scale, persistent=False)
        self.register_buffer("x_scale", x_scale, persistent=False)

    weight8: torch.Tensor  # [out, in]
    weight_scale: torch.Tensor
    x_scale: torch.Tensor

    def quantised(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == E4M3 else quantise(x, self.x_scale)

    def dequantised(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * self.x_scale).to(self.dtype)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        x8 = self.quantised(x).reshape(-1, x.shape[-1])
        if self._emulates:
            y = functional.linear(x8.float(), self.weight8.float()) * (self.x_scale * self.weight_scale)
            y = (y if bias is None else y + bias).to(self.dtype)
        else:
            y = torch._scaled_mm(
                x8,
                self.weight8.t(),
                scale_a=self.x_scale,
                scale_b=self.weight_scale,
                bias=bias,
                out_dtype=self.dtype,
                use_fast_accum=True,
            )
        return y.view(*x.shape[:-1], -1)

    def with_adapters(
        self, x: torch.Tensor, bias: torch.Tensor | None, adapters: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        assert self._kernels is not None
        tokens = x if x.dim() == 3 else x.unsqueeze(1)
        y: torch.Tensor = self._kernels.fp8_linear(
            self.quantised(tokens), self.x_scale, self.weight8, self.weight_scale, bias, *adapters
        )
        return y.view(*x.shape[:-1], -1)

    def geglu(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        adapters: tuple[torch.Tensor, ...],
        y_scale: torch.Tensor,
    ) -> torch.Tensor:
        """One half of the linear times the GELU of the other, quantised; x: [rows, tokens, in]."""
        assert self._kernels is not None
        features = self.features // 2
        y: torch.Tensor = self._kernels.fp8_geglu(
            self.quantised(x), self.x_scale, self.weight8, self.weight_scale, bias, y_scale, features, list(adapters)
        )
        return y

    def arrange_for_gates(self) -> None:
        """From here on `geglu` is all that it computes, if it can."""
        if self._kernels is not None:
            from lorafleet.serve.engine.fp8_kernels import arranged

            self.weight8 = arranged(self.weight8)


class Fp8GEGLU(nn.Module):
    """As diffusers' GEGLU, with a result that is quantised already for the linear behind it."""

    def __init__(self, geglu: GEGLU, behind: Fp8Product) -> None:
        """The product of `geglu`'s linear is an Fp8Product."""
        super().__init__()
        self.proj = geglu.proj
        self.proj.product.arrange_for_gates()
        self._behind = [behind]  # in a list, so that it is no module of this one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product, (behind,) = self.proj.product, self._behind
        if product.adds_adapters:
            adapters = self.proj.adapters() if isinstance(self.proj, SlotLinear) else ()
            y: torch.Tensor = product.geglu(x, self.proj.bias, adapters, behind.x_scale)
            return y
        value, gate = self.proj(x).chunk(2, dim=-1)
        return behind.quantised(value * functional.gelu(gate))


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
        self._replaced: dict[str, nn.Module] = {}  # those that others stand for, by path
        self._linears: list[nn.Linear] = []
        x_scales: dict[str, torch.Tensor] = {}
        emulates = not is_possible(base.device)
        # else nothing of it could be used outside of inference mode again
        with torch.inference_mode(False), torch.no_grad():
            for path, linear in _linears(base).items():
                x = _SAME_INPUT.sub("", path)
                if x not in x_scales:
                    x_scales[x] = torch.tensor(max(amax[path], LEAST_AMAX) * MARGIN / LARGEST, device=base.device)
                product = Fp8Product(linear.weight, x_scales[x], emulates=emulates)
                if isinstance(linear, SlotLinear):
                    linear.product = product
                else:
                    self._put(path, Fp8Linear(linear, product))
                self._linears.append(linear)
            with ThreadPoolExecutor(COPIES) as pool:
                on_cpu = list(pool.map(lambda linear: linear.weight.data.cpu(), self._linears))
            for linear, weight in zip(self._linears, on_cpu, strict=True):
                # in place: whoever else holds the parameter, as the bank does, is to get it back too
                linear.weight.data = weight
            for path, module in list(self._unet.named_modules()):
                if isinstance(module, FeedForward) and _is_geglu(module):
                    self._put(f"{path}.net.0", Fp8GEGLU(module.net[0], module.net[2].product))

    def close(self) -> None:
        """Puts back what was there, bit for bit. May be called twice."""
        with torch.inference_mode(False):
            for linear in self._linears:
                linear.weight.data = linear.weight.data.to(self._device)
                if isinstance(linear, SlotLinear):
                    linear.product = None
        for path, module in reversed(self._replaced.items()):
            _put(self._unet, path, module)
        self._linears, self._replaced = [], {}

    def _put(self, path: str, module: nn.Module) -> None:
        self._replaced[path] = _put(self._unet, path, module)


def _linears(base: Base) -> dict[str, nn.Linear]:
    """Those that are worth it, by path in the UNet."""
    found = {
        path: module
        for path, module in base.pipeline.unet.named_modules()
        if isinstance(module, nn.Linear)
        and _LINEARS.fullmatch(path)
        and module.in_features % GRID == 0
        and module.out_features % GRID == 0
    }
    joined = {path.removesuffix(_JOINED) for path in found if path.endswith(_JOINED)}
    return {path: module for path, module in found.items() if _SAME_INPUT.sub("", path) not in joined}


def _is_geglu(module: FeedForward) -> bool:
    """Whether its linears are quantised, and GEGLU is what is between them."""
    first, last = module.net[0], module.net[2]
    return type(first) is GEGLU and all(getattr(linear, "product", None) is not None for linear in (first.proj, last))


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """What was there before."""
    parent, _, last = path.rpartition(".")
    before = model.get_submodule(path)
    setattr(model.get_submodule(parent), last, module)
    return before


@functools.cache
def _gpu_kernels(device: torch.device) -> Any:
    """The operators of `fp8_kernels`, or None where they cannot run: then there is another way to the same numbers."""
    if device.type != "cuda":
        return None
    try:
        from lorafleet.serve.engine import fp8_kernels
    except ImportError as error:
        logger.warning("engine.fp8 takes slower ways on this GPU: %s", error)
        return None
    return torch.ops.lorafleet if torch.cuda.get_device_capability(device) >= fp8_kernels.CAPABILITY else None


def quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`x / scale` in 8 bits."""
    # What is not a number stays so; without the clamp everything above 448 would become that.
    return (x * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(E4M3)


def _refuse(why: str) -> None:
    raise ConfigError(f"engine.fp8 {why}", param="engine.fp8")
