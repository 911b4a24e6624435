import copy
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lorafleet.sdxl import reference
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import PARTS
from lorafleet.sdxl.lora_oracle import with_adapters
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Engine, Job

Pixels = npt.NDArray[np.int64]


def pixels_of(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(np.int64)


@pytest.fixture(scope="session")
def pixels() -> Callable[[Image.Image], Pixels]:
    return pixels_of


@pytest.fixture(scope="session")
def own(emojixl: Base) -> Base:
    """A copy that a bank may be attached to, while others use the original."""
    pipeline = copy.copy(emojixl.pipeline)
    for part in PARTS:
        pipeline.register_modules(**{part: copy.deepcopy(getattr(emojixl.pipeline, part))})
    return dataclasses.replace(emojixl, pipeline=pipeline)


@pytest.fixture
def make_engine(emojixl: Base, own: Base) -> Iterator[Callable[..., Engine]]:
    """An engine that is not started, by settings; with a bank it runs on a base of its own."""
    made: list[Engine] = []

    def make(**settings: object) -> Engine:
        made.append(Engine(own if settings.get("bank") else emojixl, EngineSettings.model_validate(settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def oracle(emojixl: Base) -> Callable[[Job], Pixels]:
    """diffusers' own image of a job, with PEFT's adapters, remembered."""
    known: dict[tuple[str, tuple[tuple[str, float], ...]], Pixels] = {}
    bases: dict[tuple[tuple[str, float], ...], Base] = {(): emojixl}

    def image(job: Job) -> Pixels:
        request = job.request.model_copy(update={"seed": job.seed, "num_images": 1})
        adapters = tuple((adapter.key, adapter.weight) for adapter in job.adapters)
        if adapters not in bases:
            if len(bases) > 60:  # 50 MB each
                del bases[list(bases)[1]]
            bases[adapters] = with_adapters(emojixl, [(adapter.load(), adapter.weight) for adapter in job.adapters])
        words = request.model_dump_json()
        if (words, adapters) not in known:
            known[words, adapters] = pixels_of(reference.generate(bases[adapters], request)[0])
        return known[words, adapters]

    return image
