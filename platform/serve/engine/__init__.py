"""Continuous batching, step by step: images of different prompts, steps, samplers and guidance share UNet batches.

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

`loop` is the algorithm; `job` the words of its callers; `order` who goes next; `sampler` one image's way through
its steps (`init_image`: from a picture); `forward` the batch; `prompts` the embedding cache; `preview` small pictures.
"""

from lorafleet.serve.engine.job import (
    Cancelled,
    Event,
    Failed,
    Finished,
    Handle,
    ImageResult,
    Job,
    Started,
    Step,
)
from lorafleet.serve.engine.loop import Engine

__all__ = ["Cancelled", "Engine", "Event", "Failed", "Finished", "Handle", "ImageResult", "Job", "Started", "Step"]
