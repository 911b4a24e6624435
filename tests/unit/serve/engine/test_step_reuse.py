"""Steps that reuse what the inner blocks gave: who shares which, and what it costs those who do not.

That each image is the reference's, whatever its neighbours, is for `test_oracle`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from lorafleet.core.errors import ConfigError, InvalidRequest
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.serve.engine import Engine, Job

MakeEngine = Callable[..., Engine]


def job(step_reuse: int = 1, steps: int = 4, **options: Any) -> Job:
    request = {"prompt": "yellow star", "width": 64, "height": 64, "steps": steps, "step_reuse": step_reuse, **options}
    return Job(GenerationRequest(**request), seed=step_reuse)


@contextmanager
def rows_of(*modules: nn.Module) -> Iterator[list[list[int]]]:
    """How many rows each evaluation of each module had."""
    seen: list[list[int]] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, rows=rows: rows.append(len(output)))
        for module, rows in zip(modules, seen, strict=True)
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def test_whole_steps_are_shared_with_those_who_take_no_others(emojixl: Base, make_engine: MakeEngine) -> None:
    engine = make_engine(exact=False, max_batch=8)
    for one in (job(), job(2), job(3, guidance_scale=1.0)):
        engine.submit(one)
    unet = emojixl.pipeline.unet
    with rows_of(unet.conv_out, unet.mid_block) as (all_rows, whole_rows):
        engine.run_until_idle()
    assert whole_rows == [5, 5, 2, 2]  # all; all again, once each has done its shallow ones; then the first alone
    assert all_rows == [5, 3, 1, 5, 2, 2, 2]
    assert not any(run.sampler and run.sampler.deep is not None for run in engine._runs)


@pytest.mark.parametrize("scheduler", ["euler", "heun", "lcm"])
def test_reuse_changes_the_image_and_that_of_others_by_no_bit(
    make_engine: MakeEngine, pixels: Callable[[Image.Image], Any], scheduler: str
) -> None:
    def images(engine: Engine, *jobs: Job) -> list[Any]:
        handles = [engine.submit(one) for one in jobs]
        engine.run_until_idle()
        return [pixels(handle.result().image) for handle in handles]

    whole = job(scheduler=scheduler)
    reusing = Job(job(2, scheduler=scheduler).request, seed=whole.seed)
    (expected,) = images(make_engine(exact=True, step_reuse=False), whole)
    for exact_jobs in (1, 3):
        engine = make_engine(exact=True, exact_jobs=exact_jobs)
        (alone,) = images(engine, reusing)
        _, together, plain = images(engine, job(3), reusing, whole)
        assert (together == alone).all()
        assert (abs(plain - expected) <= (exact_jobs > 1)).all()
        assert (together != plain).any()


def test_who_does_not_serve_it_says_so(emojixl: Base, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"step_reuse": False}, {"compile": "regional"}):
        engine = make_engine(**settings)
        engine.submit(job())
        with pytest.raises(InvalidRequest, match=r"step_reuse must be 1, .*: set engine.step_reuse=true") as caught:
            engine.submit(job(2))
        assert caught.value.param == "step_reuse"
    monkeypatch.setattr(emojixl.pipeline.unet, "class_embedding", nn.Identity())  # it is told more than SDXL's
    assert not make_engine()._unet.reuses_steps
    with pytest.raises(ConfigError, match=r"engine.step_reuse needs .*: leave it out"):
        make_engine(step_reuse=True)


@pytest.mark.nightly
def test_after_the_start_nothing_compiles_whoever_reuses_what(
    make_engine: MakeEngine, oracle: Callable[[Job], Any], pixels: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    settings = {"exact": False, "row_buckets": (2, 4), "warm_sizes": ((64, 64),)}
    engine = make_engine(**settings, compile="full", step_reuse=True)
    engine.warm_up()
    counters = torch._dynamo.utils.counters["stats"]
    compiled = dict(counters)
    assert compiled["unique_graphs"] >= 4
    for jobs in ([job()], [job(2)], [job(), job(3)], [job(2), job(5)]):
        handles = [engine.submit(one) for one in jobs]
        engine.run_until_idle()
        for handle in handles:
            assert abs(pixels(handle.result().image) - oracle(handle.job)).max() < 2
    assert dict(counters) == compiled
