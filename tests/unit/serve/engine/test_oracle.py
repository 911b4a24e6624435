"""Random mixes of jobs that join, leave and share batches, each with adapters of its own or none: every image is the
one diffusers, with PEFT, makes of it alone."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lorafleet.core.generation import SCHEDULERS, GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import Adapter
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve.config import BankConfig, EngineSettings
from lorafleet.serve.engine import Cancelled, Engine, Event, Handle, Job, JobAdapter, Step

# (ranks, alphas, modules), taken in turn by the modules of an adapter
POOL = [
    ((1,), (1,), r"unet\..+\.attn[12]\..+|text_encoder(_2)?\..+self_attn.+"),
    ((64,), (3.5,), r"unet\..+\.to_(q|v)"),
    ((4, 8, 16), (16, 1, 0.3), r"unet\..+\.(ff|proj_in|proj_out)\b.*"),
    ((8,), (-5,), r"unet\.up.+attn2.+"),
    ((3,), (2,), r"text_encoder\..+"),
    ((32, 7), (7, 32), r"unet\.(mid|down).+attn1.+|text_encoder_2\..+fc[12]"),
    ((13,), (13,), r"unet\..+\.attentions\..+"),
]


def load(base: Base, number: int) -> Adapter:
    ranks, alphas, modules = POOL[number]
    return random_adapter(targets_of(base), number, ranks=ranks, alphas=alphas, modules=modules, strength=0.15)


ADAPTERS = st.lists(
    st.tuples(st.integers(0, len(POOL) - 1), st.sampled_from([-0.7, 0.0, 0.4, 1.0, 1.6])), max_size=4
).map(tuple)
JOBS = st.builds(
    Job,
    request=st.builds(
        GenerationRequest,
        prompt=st.sampled_from(["a red apple on a blue background", "yellow star", "cat"]),
        negative_prompt=st.sampled_from(["", "green", "dog"]),
        width=st.sampled_from([64, 96]),
        height=st.sampled_from([64, 96, 128]),
        steps=st.integers(1, 5),
        guidance_scale=st.sampled_from([0.0, 1.0, 1.5, 7.0]),
        scheduler=st.sampled_from(SCHEDULERS),
        step_reuse=st.sampled_from([1, 1, 2, 3, 5]),
    ),
    seed=st.sampled_from([0, 1, 2**32 - 1]),
)


@dataclass(frozen=True)
class Guest:
    """A job that joins once `joins_after` steps were done by all together, and may be called off after its own."""

    job: Job
    joins_after: int
    leaves_after: int | None
    adapters: tuple[tuple[int, float], ...]  # numbers in the pool, weights


GUESTS = st.builds(
    Guest, JOBS, adapters=ADAPTERS, joins_after=st.integers(0, 12), leaves_after=st.none() | st.integers(1, 3)
)
BATCHING = st.builds(
    EngineSettings,
    exact=st.booleans(),
    exact_jobs=st.integers(1, 3),
    max_batch=st.integers(1, 8),
    max_skipped_turns=st.integers(0, 5),
    row_buckets=st.sampled_from([(), (2, 4, 8, 16)]),
    bank=st.builds(BankConfig, slots=st.integers(4, 6), host_bytes=st.sampled_from([0, 4 << 30])),
)
FIXTURES = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class Party:
    """Runs guests on an engine in this thread."""

    def __init__(self, engine: Engine, guests: list[Guest]) -> None:
        self.engine = engine
        self.outside = sorted(guests, key=lambda guest: guest.joins_after)
        self.inside: list[tuple[Guest, Handle]] = []
        self.steps = 0

    def run(self) -> None:
        self.let_in()
        while self.outside or not all(handle.is_done for _, handle in self.inside):
            self.engine.run_until_idle()
            self.steps = max([self.steps, *(guest.joins_after for guest in self.outside[:1])])
            self.let_in()

    def let_in(self) -> None:
        while self.outside and self.outside[0].joins_after <= self.steps:
            guest = self.outside.pop(0)
            own = 0

            def listen(event: Event, guest: Guest = guest) -> None:
                nonlocal own
                if isinstance(event, Step):
                    self.steps += 1
                    self.let_in()
                    if event.done == guest.leaves_after:
                        next(handle for other, handle in self.inside if other is guest).cancel()

            self.inside.append((guest, self.engine.submit(replace(guest.job, on_event=listen))))


def with_adapters(guest: Guest, base: Base) -> Guest:
    """A new guest, so that equal ones are told apart, whose job has its adapters."""
    adapters = tuple(JobAdapter(str(i), weight, partial(load, base, i)) for i, weight in guest.adapters)
    return replace(guest, job=replace(guest.job, adapters=adapters))


def check(
    base: Base, oracle: Callable[..., object], pixels: Callable[..., object], batching: EngineSettings, mix: list[Guest]
) -> None:
    with closing(Engine(base, batching)) as engine:
        check_with(engine, oracle, pixels, [with_adapters(guest, base) for guest in mix])


def check_with(engine: Engine, oracle: Callable[..., object], pixels: Callable[..., object], mix: list[Guest]) -> None:
    party = Party(engine, mix)
    party.run()
    assert len(party.inside) == len(mix)
    assert engine.bank is not None
    assert engine.bank.stats().leased == 0
    for guest, handle in party.inside:
        steps = [event for event in handle.events() if isinstance(event, Step)]
        if guest.leaves_after is not None and guest.leaves_after <= steps[-1].total:
            assert len(steps) == guest.leaves_after
            with pytest.raises(Cancelled):
                handle.result()
        else:
            difference = abs(pixels(handle.result().image) - oracle(guest.job))  # type: ignore[operator]
            assert difference.max() < 2, guest
            if engine.settings.exact and engine.settings.exact_jobs == 1 and not guest.adapters:
                assert difference.max() == 0, guest
            if engine.settings.exact:
                alone = engine.submit(replace(guest.job, on_event=None))
                engine.run_until_idle()
                assert alone.result().image.tobytes() == handle.result().image.tobytes(), guest


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=FIXTURES)
@given(batching=BATCHING, mix=st.lists(GUESTS, min_size=1, max_size=4))
def test_every_image_of_a_mix_is_the_one_made_alone(
    own: Base,
    oracle: Callable[..., object],
    pixels: Callable[..., object],
    batching: EngineSettings,
    mix: list[Guest],
) -> None:
    check(own, oracle, pixels, batching, mix)


@pytest.mark.nightly
@settings(max_examples=200, deadline=None, suppress_health_check=FIXTURES)
@given(batching=BATCHING, mix=st.lists(GUESTS, min_size=1, max_size=8))
def test_every_image_of_many_mixes_is_the_one_made_alone(
    own: Base,
    oracle: Callable[..., object],
    pixels: Callable[..., object],
    batching: EngineSettings,
    mix: list[Guest],
) -> None:
    check(own, oracle, pixels, batching, mix)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, which torch's own compiler imports
@pytest.mark.parametrize("mode", ["regional", "full"])
def test_compiled_images_are_the_ones_made_alone(
    own: Base, oracle: Callable[..., object], pixels: Callable[..., object], mode: str
) -> None:
    """By torch's compiler for CPUs, at the size that is warmed up; tests/gpu has the same with CUDA graphs."""
    settings = EngineSettings.model_validate(
        {
            "compile": mode,
            "exact": False,
            "max_batch": 4,
            "row_buckets": (2, 8),
            "step_reuse": True,
            "bank": {"slots": 4},
        }
    )
    mix = [
        Guest(
            Job(
                GenerationRequest(
                    prompt="yellow star",
                    steps=3 + i % 3,
                    scheduler=scheduler,
                    guidance_scale=[1.0, 4.0, 7.0][i % 3],
                    step_reuse=1 + i % 3,
                ),
                seed=i,
            ),
            joins_after=2 * i,
            leaves_after=None,
            adapters=((i % len(POOL), 0.7), ((i + 3) % len(POOL), -0.5))[: i % 3],
        )
        for i, scheduler in enumerate(SCHEDULERS)
    ]
    with closing(Engine(own, settings)) as engine:
        engine.warm_up()
        check_with(engine, oracle, pixels, [with_adapters(guest, own) for guest in mix])


def test_guidance_rescale_is_diffusers_own(
    emojixl: Base, make_engine: Callable[..., Engine], pixels: Callable[[Image.Image], object]
) -> None:
    import torch

    request = GenerationRequest(prompt="yellow star", steps=3, guidance_scale=7.0, width=64, height=64)
    engine = make_engine()
    handle = engine.submit(Job(request, seed=1, guidance_rescale=0.7))
    engine.run_until_idle()
    (expected,) = emojixl.pipeline(
        prompt=request.prompt,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=7.0,
        guidance_rescale=0.7,
        generator=torch.Generator("cpu").manual_seed(1),
    ).images
    assert (pixels(handle.result().image) == pixels(expected)).all()  # type: ignore[attr-defined]
