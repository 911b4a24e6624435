"""Continuous batching, step by step: images of different adapters, prompts, samplers and steps share UNet batches.

A `Job` is one image. Jobs join and leave between steps; each is advanced by a scheduler and a generator of its own,
so that its image is the one diffusers' pipeline makes of it alone. Plain Python and torch, usable without a service:

>>> from lorafleet.core.generation import GenerationRequest
>>> from lorafleet.sdxl.base import load_base
>>> from lorafleet.sdxl.config import BaseConfig
>>> from lorafleet.serve.engine import Engine, Job
>>> with Engine(load_base(BaseConfig(device="cpu"))) as engine:
...     request = GenerationRequest(prompt="a red apple on a blue background", steps=4)
...     handles = [engine.submit(Job(request, seed=seed)) for seed in range(3)]
...     images = [handle.result().image for handle in handles]
>>> [image.size for image in images]
[(128, 128), (128, 128), (128, 128)]

Each image may combine adapters of its own. They are loaded beside the steps, into slots that jobs take turns in:

>>> from lorafleet.sdxl.lora_random import random_adapter
>>> from lorafleet.sdxl.lora_targets import targets_of
>>> from lorafleet.serve.config import BankConfig, EngineSettings
>>> from lorafleet.serve.engine import JobAdapter
>>> base = load_base(BaseConfig(device="cpu"))
>>> targets = targets_of(base)  # in place of random_adapter: read_adapter(path, targets)
>>> styles = [JobAdapter(f"style-{i}", 0.8, lambda i=i: random_adapter(targets, i)) for i in range(3)]
>>> with Engine(base, EngineSettings(bank=BankConfig(slots=2))) as engine:
...     handles = [engine.submit(Job(request, seed=1, adapters=(style,))) for style in styles]
...     len({handle.result().image.tobytes() for handle in handles})
3

`loop` is the algorithm; `job` the words of its callers; `order` who goes next; `sampler` one image's way through its
steps (`init_image`: from a picture); `forward` the batch; `step_reuse` the UNet in two parts; `prompts` the embedding
cache; `preview` small pictures.
`bank` is who has which adapter slot, from files (`adapter_pack`) through CPU memory (`adapter_host`); `slots` the
linears that look into these.
"""

from lorafleet.serve.engine.job import (
    Cancelled,
    Event,
    Failed,
    Finished,
    Handle,
    ImageResult,
    Job,
    JobAdapter,
    Started,
    Step,
)
from lorafleet.serve.engine.loop import Engine
from lorafleet.serve.engine.observer import Observer

__all__ = [
    "Cancelled",
    "Engine",
    "Event",
    "Failed",
    "Finished",
    "Handle",
    "ImageResult",
    "Job",
    "JobAdapter",
    "Observer",
    "Started",
    "Step",
]
