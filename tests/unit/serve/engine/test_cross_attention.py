"""Keys and values that are computed once: the same images, nothing stale, nothing recompiled, nothing left behind."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_targets import targets_of
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Engine, Job, JobAdapter
from lorafleet.serve.engine.cross_attention import CrossAttention, KeyValues, is_possible

MakeEngine = Callable[..., Engine]
Oracle = Callable[[Job], Any]
Pixels = Callable[[Image.Image], Any]
PROJECTIONS = r"unet\..+\.attn2\.to_[kv]"


def job(
    *adapters: JobAdapter, seed: int = 0, on_event: Any = None, deadline: float | None = None, **options: Any
) -> Job:
    request = GenerationRequest(**{"width": 64, "height": 64, "prompt": "yellow star", "steps": 3, **options})
    return Job(request, seed, adapters=adapters, on_event=on_event, deadline=deadline)


def adapter(base: Base, number: int, weight: float = 1.0, modules: str = PROJECTIONS) -> JobAdapter:
    def load() -> Any:
        return random_adapter(targets_of(base), number, ranks=(3,), alphas=(6.0,), modules=modules)

    return JobAdapter(f"{number} of {modules}", weight, load)


def text(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 40, 256, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def unet(base: Base, hidden: torch.Tensor) -> torch.Tensor:
    rows = len(hidden)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(rows, -1, -1, -1)
    conditions = {"text_embeds": torch.zeros(rows, 128), "time_ids": torch.zeros(rows, 6)}
    output: torch.Tensor = base.pipeline.unet(
        noise, 500, encoder_hidden_states=hidden, added_cond_kwargs=conditions, return_dict=False
    )[0]
    return output


@pytest.fixture
def cross(emojixl: Base) -> Iterator[CrossAttention]:
    assert is_possible(emojixl)
    cross = CrossAttention(emojixl, rows=6)
    yield cross
    cross.close()


@pytest.fixture
def jobs(cross: CrossAttention) -> list[KeyValues]:
    with torch.inference_mode():
        return [cross.compute(text(seed, rows)) for seed, rows in enumerate((2, 2, 1))]


def hidden_of(*jobs: KeyValues) -> torch.Tensor:
    return torch.cat([job.hidden for job in jobs])


def test_the_unet_cannot_tell_them_from_the_text(emojixl: Base, cross: CrossAttention, jobs: list[KeyValues]) -> None:
    """Bit for bit on a CPU for as many rows; and with a text it still does as it did."""
    cross.set_rows(jobs[:1])
    assert torch.equal(unet(emojixl, jobs[0].hidden), unet(emojixl, text(0)))
    with_text = unet(emojixl, text(1))
    cross.close()
    assert torch.equal(unet(emojixl, text(1)), with_text)


def test_each_batch_attends_to_its_own_texts(emojixl: Base, cross: CrossAttention, jobs: list[KeyValues]) -> None:
    """Jobs that join, leave and change places; rows are shifted by half a job too."""
    texts = {job.serial: text(seed, len(job.rows)) for seed, job in enumerate(jobs)}
    a, b, c = jobs
    for batch in ([a], [a, b], [b, a], [b], [c, b], [b, c], [a, c, b], [c], [c, a], [a, b]):
        cross.set_rows(batch)
        expected = unet(emojixl, torch.cat([texts[job.serial] for job in batch]))
        assert (unet(emojixl, hidden_of(*batch)) - expected).abs().max() < 1e-5


def test_what_is_in_place_is_not_copied(cross: CrossAttention, jobs: list[KeyValues]) -> None:
    a, b, c = jobs
    cross.set_rows([a, b])
    cross._storage.zero_()
    cross.set_rows([a, b])
    cross.set_rows([a])
    assert not cross._storage.any()
    cross.set_rows([a, c])
    assert cross._storage.any(dim=1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("background", [True, False])
def test_images_with_adapters_on_the_projections_of_the_text(
    emojixl: Base, make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, background: bool
) -> None:
    both = r"unet\..+\.attn[12]\.to_[qkv]"
    jobs = [
        job(adapter(emojixl, 0), negative_prompt="green"),
        job(adapter(emojixl, 1, -0.7), adapter(emojixl, 2, 0.5, both), seed=1, steps=5),
        job(adapter(emojixl, 1), guidance_scale=1.0, prompt="red apple"),
        job(scheduler="heun", width=96),
        job(adapter(emojixl, 3, 0.8, r"unet\..+\.attn2\.to_v"), steps=2),
    ]
    with make_engine(exact=False, background=background, bank={"slots": 5}, max_batch=3, row_buckets=(4, 6)) as engine:
        handles = [engine.submit(one) for one in jobs]
        for one, handle in zip(jobs, handles, strict=True):
            assert abs(pixels(handle.result(60).image) - oracle(one)).max() < 2
    for one in jobs:
        plain = dataclasses.replace(one, adapters=())
        assert not one.adapters or abs(oracle(one) - oracle(plain)).mean() > 1


def test_exact_images_are_diffusers_own(make_engine: MakeEngine, oracle: Oracle, pixels: Pixels) -> None:
    engine = make_engine()
    assert engine._cross_attention is not None
    for one in (job(), job(guidance_scale=1.0, seed=1), job(negative_prompt="blue", seed=2)):
        handle = engine.submit(one)
        engine.run_until_idle()
        assert (pixels(handle.result().image) == oracle(one)).all()


def test_other_attention_backends_do_without(own: Base, oracle: Oracle, pixels: Pixels, emojixl: Base) -> None:
    own.pipeline.enable_attention_slicing()
    try:
        one = job(adapter(emojixl, 0))
        with Engine(own, EngineSettings.model_validate({"bank": {"slots": 1}})) as engine:
            assert engine._cross_attention is None
            assert abs(pixels(engine.submit(one).result(60).image) - oracle(one)).max() < 2
    finally:
        own.pipeline.unet.set_attn_processor(AttnProcessor2_0())


def test_the_first_engine_of_a_base_has_it_and_gives_it_back(emojixl: Base, make_engine: MakeEngine) -> None:
    before, modules = dict(emojixl.pipeline.unet.attn_processors), len(list(emojixl.pipeline.unet.modules()))
    first, second = make_engine(), make_engine()
    assert first._cross_attention is not None
    assert second._cross_attention is None
    second.close()
    first.close()
    first.close()
    after = emojixl.pipeline.unet.attn_processors
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert len(list(emojixl.pipeline.unet.modules())) == modules


def test_nothing_recompiles_and_blocks_share_their_code(
    emojixl: Base, cross: CrossAttention, jobs: list[KeyValues]
) -> None:
    blocks = [module for module in emojixl.pipeline.unet.modules() if type(module).__name__ == "BasicTransformerBlock"]
    same = [block for block in blocks if block.attn1.to_q.in_features == blocks[-1].attn1.to_q.in_features]
    assert len(same) > 1
    torch._dynamo.reset()
    compiled = [torch.compile(block.forward, backend="aot_eager", fullgraph=True, dynamic=False) for block in same]
    x = torch.randn(4, 16, same[0].attn1.to_q.in_features)
    a, b, c = jobs

    def run(function: Any, batch: list[KeyValues]) -> Any:
        cross.set_rows(batch)
        hidden = hidden_of(*batch)
        padded = torch.cat([hidden, *[hidden[-1:]] * (4 - len(hidden))])
        with torch.inference_mode():
            return function(x, encoder_hidden_states=padded)

    run(compiled[0], [a, b])
    with torch._dynamo.config.patch(error_on_recompile=True):
        for function, block in zip(compiled, same, strict=True):
            for batch in ([a, b], [b, a], [c, a], [b]):
                assert torch.allclose(run(function, batch), run(block, batch), atol=1e-5)


# ---- memory ----


def test_only_so_many_are_prepared_ahead(make_engine: MakeEngine, oracle: Oracle, pixels: Pixels) -> None:
    prepared: list[int] = []

    def count(_: object) -> None:
        prepared.append(sum(run.sampler is not None and not run.is_denoised for run in list(engine._runs)))

    engine = make_engine(background=True, exact=False, max_batch=2).start()
    jobs = [job(seed=seed, on_event=count) for seed in range(14)]
    handles = [engine.submit(one) for one in jobs]
    for one, handle in zip(jobs, handles, strict=True):
        assert abs(pixels(handle.result(60).image) - oracle(one)).max() < 2
    assert 2 <= max(prepared) <= 4


def test_who_is_urgent_is_prepared_although_others_are(make_engine: MakeEngine) -> None:
    engine = make_engine(background=True, exact=False, max_batch=1)
    patient = [engine.submit(job(steps=40, seed=seed)) for seed in range(6)]
    engine.start()
    next(patient[0].events(timeout_s=30))
    urgent = engine.submit(job(steps=2, deadline=1e12))
    urgent.result(60)
    assert not any(handle.is_done for handle in patient[1:])
    for handle in patient:
        handle.cancel()


def test_done_jobs_hold_none(make_engine: MakeEngine) -> None:
    """Not even while they wait to be decoded."""
    engine = make_engine()
    engine.submit(job())
    (run,) = engine._runs
    engine.run_until_idle()
    assert run.sampler is not None
    assert run.sampler.key_values is None
