import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image

from lorafleet.core.errors import GenerationFailed, InvalidRequest
from lorafleet.core.generation import SCHEDULERS, GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.reference import generate
from lorafleet.sdxl.schedulers import make_scheduler
from lorafleet.sdxl.vae import decode


def pixels(image: Image.Image) -> np.ndarray:  # type: ignore[type-arg]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_scheduler_repeats_itself_from_one_step_on(tiny: Base, scheduler: str, steps: int) -> None:
    request = GenerationRequest(prompt="red apple", scheduler=scheduler, steps=steps, seed=3)  # type: ignore[arg-type]
    first, second = generate(tiny, request)[0], generate(tiny, request)[0]
    assert first.size == (64, 64)
    assert (pixels(first) == pixels(second)).all()
    assert pixels(first).std() > 1


def test_schedulers_keep_the_bases_noise_schedule_and_share_no_state(emojixl: Base) -> None:
    for name in SCHEDULERS:
        scheduler = make_scheduler(emojixl, name)  # type: ignore[arg-type]
        assert scheduler is not make_scheduler(emojixl, name)  # type: ignore[arg-type]
        for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type"):
            assert scheduler.config[key] == emojixl.scheduler_config[key]


def test_karras_is_set_by_name_only(emojixl: Base) -> None:
    assert make_scheduler(emojixl, "dpmpp_2m_karras").config.use_karras_sigmas
    assert not make_scheduler(emojixl, "dpmpp_2m").config.use_karras_sigmas


def test_each_image_of_several_is_the_one_made_alone_by_its_seed(tiny: Base) -> None:
    three = generate(tiny, GenerationRequest(prompt="a", steps=2, seed=2**32 - 2, num_images=3, scheduler="euler_a"))
    for seed, image in zip((2**32 - 2, 2**32 - 1, 0), three, strict=True):
        alone = generate(tiny, GenerationRequest(prompt="a", steps=2, seed=seed, scheduler="euler_a"))[0]
        assert (pixels(image) == pixels(alone)).all()


def test_the_bases_own_scheduler_and_guidance_stay_as_they_are(tiny: Base) -> None:
    before = tiny.pipeline.scheduler
    generate(tiny, GenerationRequest(prompt="a", steps=1, seed=0, scheduler="heun"))
    assert tiny.pipeline.scheduler is before


def test_on_step_sees_every_evaluation_and_may_stop_it(tiny: Base) -> None:
    seen: list[tuple[int, int]] = []
    generate(tiny, GenerationRequest(prompt="a", steps=3, seed=0), on_step=lambda *at: seen.append(at))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(tiny, GenerationRequest(prompt="a", steps=3, seed=0), on_step=stop)


def test_the_oracle_needs_a_seed(tiny: Base) -> None:
    with pytest.raises(InvalidRequest, match="seed"):
        generate(tiny, GenerationRequest(prompt="a"))


@pytest.mark.parametrize("with_mean", [False, True])
def test_decode_equals_diffusers(tiny: Base, with_mean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = tiny.pipeline
    if with_mean:
        statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.1, 0.9, 1.0, 1.2]}
        monkeypatch.setattr(pipeline.vae, "_internal_dict", FrozenDict({**pipeline.vae.config, **statistics}))
    options = {"prompt": "red apple", "num_inference_steps": 2, "width": 64, "height": 64}
    latents = pipeline(**options, output_type="latent", generator=torch.Generator().manual_seed(0)).images
    expected = pipeline(**options, output_type="pil", generator=torch.Generator().manual_seed(0)).images[0]
    assert (decode(tiny, latents)[0] == np.asarray(expected)).all()


def test_latents_that_are_no_numbers_fail(tiny: Base) -> None:
    with pytest.raises(GenerationFailed, match="NaN or infinity"):
        decode(tiny, torch.full((1, 4, 16, 16), float("nan")))
