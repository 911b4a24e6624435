from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl import reference
from lorafleet.sdxl.base import Base
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Engine, Job

Pixels = npt.NDArray[np.int64]


def pixels_of(image: Image.Image) -> Pixels:
    return np.asarray(image).astype(np.int64)


@pytest.fixture(scope="session")
def pixels() -> Callable[[Image.Image], Pixels]:
    return pixels_of


@pytest.fixture
def make_engine(emojixl: Base) -> Iterator[Callable[..., Engine]]:
    """An engine that is not started, by settings."""
    made: list[Engine] = []

    def make(**settings: object) -> Engine:
        made.append(Engine(emojixl, EngineSettings.model_validate(settings)))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def oracle(emojixl: Base) -> Callable[[Job], Pixels]:
    """diffusers' own image of a job, remembered."""
    known: dict[GenerationRequest, Pixels] = {}

    def image(job: Job) -> Pixels:
        request = job.request.model_copy(update={"seed": job.seed, "num_images": 1})
        if request not in known:
            known[request] = pixels_of(reference.generate(emojixl, request)[0])
        return known[request]

    return image
