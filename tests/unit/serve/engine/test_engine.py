import doctest
import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import lorafleet.serve.engine
from lorafleet.core.errors import ConfigError, DeadlineExceeded, GenerationFailed, InvalidRequest, NotReady
from lorafleet.core.generation import SCHEDULERS, GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.serve.engine import Cancelled, Engine, Event, Failed, Finished, Handle, Job, Started, Step

MakeEngine = Callable[..., Engine]
Oracle = Callable[[Job], Any]
Pixels = Callable[[Image.Image], Any]


def job(prompt: str = "yellow star", seed: int = 0, steps: int = 3, **options: Any) -> Job:
    names = ("deadline", "preview_every", "on_event")
    own = {name: options.pop(name) for name in names if name in options}
    request = {"width": 64, "height": 64, "prompt": prompt, "steps": steps, **options}
    return Job(GenerationRequest(**request), seed, **own)


def kinds(handle: Handle) -> list[str]:
    return [type(event).__name__ for event in handle.events(timeout_s=30)]


@contextmanager
def before_forward(base: Base, hook: Callable[[int], None]) -> Iterator[None]:
    """`hook` sees the number of rows of each UNet forward before it runs, and may raise."""
    handle = base.pipeline.unet.register_forward_pre_hook(lambda _, inputs: hook(len(inputs[0])))
    try:
        yield
    finally:
        handle.remove()


def test_the_docstring_s_ten_lines_run() -> None:
    done = doctest.testmod(lorafleet.serve.engine)
    assert done.attempted >= 5
    assert done.failed == 0


# ---- batches ----


def test_jobs_share_forwards_and_leave_when_they_are_done(emojixl: Base, make_engine: MakeEngine) -> None:
    engine = make_engine(exact=False, max_batch=8)
    engine.submit(job(steps=3))
    engine.submit(job(steps=1, scheduler="ddim"))
    engine.submit(job(steps=2, guidance_scale=1.0))
    rows: list[int] = []
    with before_forward(emojixl, rows.append):
        engine.run_until_idle()
    assert rows == [5, 3, 2]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"exact": True}, [2, 2, 2]),
        ({"exact": True, "exact_jobs": 2}, [4, 4]),
        ({"exact": False, "max_batch": 2}, [4, 2]),
        ({"exact": False, "row_buckets": (2, 4, 8)}, [8]),
        ({"exact": False, "row_buckets": (2, 4)}, [6]),
    ],
)
def test_rows_of_a_forward(
    emojixl: Base, make_engine: MakeEngine, settings: dict[str, object], rows: list[int]
) -> None:
    engine = make_engine(**settings)
    for seed in range(3):
        engine.submit(job(seed=seed, steps=1))
    seen: list[int] = []
    with before_forward(emojixl, seen.append):
        engine.run_until_idle()
    assert seen == rows


def mix_of_all() -> list[Job]:
    return [job(seed=i, scheduler=name, guidance_scale=[5.0, 1.0][i % 3 == 2]) for i, name in enumerate(SCHEDULERS)]


@pytest.mark.parametrize("exact_jobs", [1, 3])
def test_exact_images_are_the_same_alone_and_in_any_company(
    make_engine: MakeEngine, pixels: Pixels, exact_jobs: int
) -> None:
    engine = make_engine(exact=True, exact_jobs=exact_jobs)
    together = [engine.submit(one) for one in mix_of_all()]
    engine.run_until_idle()
    for one, handle in zip(mix_of_all(), together, strict=True):
        alone = engine.submit(one)
        engine.run_until_idle()
        assert (pixels(handle.result().image) == pixels(alone.result().image)).all()


def test_neighbours_change_an_image_by_less_than_a_thousandth_of_the_range(
    emojixl: Base, make_engine: MakeEngine
) -> None:
    decoded: list[torch.Tensor] = []  # before they are rounded to 8 bits, range [-1, 1]
    watch = emojixl.pipeline.vae.decoder.register_forward_hook(lambda _, __, image: decoded.append(image))
    try:
        for max_batch in (1, 2, 8):
            engine = make_engine(exact=False, max_batch=max_batch)
            for seed in range(6):
                engine.submit(job(seed=seed, steps=6))
            engine.run_until_idle()
    finally:
        watch.remove()
    alone, *others = torch.cat(decoded).reshape(3, 6, -1)
    assert max(float((alone - other).abs().max()) / 2 for other in others) <= 1e-3


@pytest.mark.parametrize("background", [True, False])
def test_its_own_thread_gives_the_oracle_s_images(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, background: bool
) -> None:
    with make_engine(background=background) as engine, ThreadPoolExecutor(8) as pool:
        jobs = [job(seed=seed % 3, scheduler=["euler", "dpmpp_sde"][seed % 2]) for seed in range(24)]
        handles = list(pool.map(engine.submit, jobs))
        for one, handle in zip(jobs, handles, strict=True):
            assert (pixels(handle.result(30).image) == oracle(one)).all()
            assert kinds(handle) == ["Started", "Step", "Step", "Step", "Finished"]


# ---- events ----


def test_events_come_in_order_and_once(make_engine: MakeEngine) -> None:
    seen: list[Event] = []
    engine = make_engine()
    handle = engine.submit(job(scheduler="heun", steps=2, preview_every=2, on_event=seen.append))
    engine.run_until_idle()
    assert list(handle.events()) == seen
    assert isinstance(seen[0], Started)
    steps = [event for event in seen if isinstance(event, Step)]
    assert [(step.done, step.total) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [step.preview is not None for step in steps] == [False, True, False]
    assert isinstance(seen[-1], Finished)
    assert seen[-1].result is handle.result()
    with pytest.raises(TimeoutError):
        next(handle.events(timeout_s=0.01))


def test_a_preview_looks_like_the_image(make_engine: MakeEngine, pixels: Pixels) -> None:
    engine = make_engine()
    handle = engine.submit(job("a red apple on a blue background", steps=8, preview_every=8, width=128, height=128))
    engine.run_until_idle()
    (preview,) = [event.preview for event in handle.events() if isinstance(event, Step) and event.preview]
    small = handle.result().image.resize((16, 16), Image.Resampling.BOX)
    assert preview.size == (16, 16)
    assert np.corrcoef(pixels(preview).ravel(), pixels(small).ravel())[0, 1] > 0.8


def test_a_listener_that_raises_does_no_harm(make_engine: MakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    def listen(event: Event) -> None:
        raise RuntimeError("a listener")

    engine = make_engine()
    handle = engine.submit(job(on_event=listen))
    engine.run_until_idle()
    assert handle.result().image.size == (64, 64)
    assert "a listener of a job failed" in caplog.text


def test_timings_add_up(make_engine: MakeEngine) -> None:
    engine = make_engine()
    handle = engine.submit(job())
    engine.run_until_idle()
    timings = handle.result().timings
    total_s = timings.pop("total_s")
    assert timings.keys() == {"queue_s", "encode_s", "denoise_s", "decode_s"}
    assert sum(timings.values()) == pytest.approx(total_s)


# ---- urgency ----


def test_the_earliest_deadline_goes_first_and_nobody_starves(make_engine: MakeEngine) -> None:
    now = time.monotonic()
    order: list[str] = []

    def tell(name: str) -> Callable[[Event], None]:
        return lambda event: order.append(name) if isinstance(event, Step) else None

    engine = make_engine(exact=True, max_skipped_turns=2)
    engine.submit(job(steps=2, on_event=tell("patient")))
    engine.submit(job(steps=5, on_event=tell("late"), deadline=now + 2000))
    engine.submit(job(steps=5, on_event=tell("urgent"), deadline=now + 1000))
    engine.run_until_idle()
    assert order[:4] == ["urgent", "urgent", "patient", "late"]
    assert sorted(order) == ["late"] * 5 + ["patient"] * 2 + ["urgent"] * 5


def test_a_deadline_ends_a_job_within_one_step_and_no_other(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels
) -> None:
    def dawdle(event: Event) -> None:
        if isinstance(event, Step):
            time.sleep(0.3)

    engine = make_engine()
    # Long enough to be encoded; the first step then takes longer than all of it.
    late = engine.submit(job(steps=50, deadline=time.monotonic() + 0.25, on_event=dawdle))
    never = engine.submit(job(deadline=time.monotonic() - 1))
    other = engine.submit(job(seed=1))
    engine.run_until_idle()
    assert kinds(late) == ["Started", "Step", "Failed"]
    assert kinds(never) == ["Failed"]
    for handle in (late, never):
        with pytest.raises(DeadlineExceeded):
            handle.result()
    assert (pixels(other.result().image) == oracle(job(seed=1))).all()


def test_cancelling_ends_a_job_within_one_step(make_engine: MakeEngine, oracle: Oracle, pixels: Pixels) -> None:
    with make_engine(exact=False) as engine:
        handle = engine.submit(job(steps=150))
        other = engine.submit(job(seed=1, steps=20))
        events = handle.events(timeout_s=30)
        assert [type(next(events)).__name__ for _ in range(2)] == ["Started", "Step"]
        handle.cancel()
        assert isinstance(list(events)[-1], Failed)
        with pytest.raises(Cancelled):
            handle.result()
        assert abs(pixels(other.result(30).image) - oracle(job(seed=1, steps=20))).max() < 2
        other.cancel()
        assert other.result().image.size == (64, 64)


# ---- failures stay with the job ----


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafleet.serve.engine import prompts

    healthy = prompts.encode_prompt

    def encode(base: Base, prompt: str, *rest: Any) -> prompts.PromptEmbedding:
        embedding = healthy(base, prompt, *rest)
        if prompt == "poison":
            return prompts.PromptEmbedding(embedding.hidden * float("nan"), embedding.pooled)
        return embedding

    monkeypatch.setattr(prompts, "encode_prompt", encode)


@pytest.mark.parametrize("exact", [True, False])
def test_a_job_of_nan_fails_alone(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch)
    engine = make_engine(exact=exact)
    first, bad, last = (engine.submit(job(prompt)) for prompt in ("yellow star", "poison", "cat"))
    engine.run_until_idle()
    with pytest.raises(GenerationFailed, match="NaN"):
        bad.result()
    for handle in (first, last):
        assert abs(pixels(handle.result().image) - oracle(handle.job)).max() <= (0 if exact else 1)


def test_a_scheduler_that_raises_fails_its_job_alone(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import LCMScheduler

    def step(*_: object, **__: object) -> None:
        raise RuntimeError("this sampler is broken")

    monkeypatch.setattr(LCMScheduler, "step", step)
    engine = make_engine(exact=False)
    bad, good = engine.submit(job(scheduler="lcm")), engine.submit(job())
    engine.run_until_idle()
    with pytest.raises(GenerationFailed, match="the log says why"):
        bad.result()
    assert kinds(bad) == ["Started", "Failed"]
    assert abs(pixels(good.result().image) - oracle(job())).max() < 2


def test_a_batch_too_large_for_the_memory_runs_in_halves(
    emojixl: Base, make_engine: MakeEngine, oracle: Oracle, pixels: Pixels
) -> None:
    rows: list[int] = []

    def limit(count: int) -> None:
        rows.append(count)
        if count > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(exact=False)
    handles = [engine.submit(job(seed=seed, steps=1)) for seed in range(5)]
    with before_forward(emojixl, limit):
        engine.run_until_idle()
    assert rows == [10, 4, 6, 2, 4]
    for handle in handles:
        assert abs(pixels(handle.result().image) - oracle(handle.job)).max() < 2


def test_a_job_too_large_by_itself_fails_alone(emojixl: Base, make_engine: MakeEngine) -> None:
    def limit(count: int) -> None:
        if count > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(exact=False)
    large, small = engine.submit(job()), engine.submit(job(guidance_scale=1.0))
    with before_forward(emojixl, limit):
        engine.run_until_idle()
    with pytest.raises(GenerationFailed, match="out of GPU memory"):
        large.result()
    assert small.result().image.size == (64, 64)


def test_what_ends_the_loop_ends_no_job_silently(emojixl: Base, make_engine: MakeEngine) -> None:
    def break_down(_: int) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with make_engine() as engine:
        with before_forward(emojixl, break_down):
            handles = [engine.submit(job(seed=seed)) for seed in range(3)]
            for handle in handles:
                with pytest.raises(NotReady, match="the engine failed"):
                    handle.result(30)
        assert isinstance(engine.failure, torch.AcceleratorError)
        with pytest.raises(NotReady, match="illegal memory access"):
            engine.submit(job())


# ---- life ----


def test_what_the_base_cannot_do_is_refused_at_once(make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidRequest, match="width must be a multiple of 32"):
        make_engine().submit(job(width=100))
    with pytest.raises(InvalidRequest, match="steps must be from 1 to 50 with scheduler lcm"):
        make_engine().submit(job(scheduler="lcm", steps=51))


@pytest.mark.parametrize("background", [True, False])
def test_closing_ends_every_job(make_engine: MakeEngine, background: bool) -> None:
    engine = make_engine(background=background).start()
    handles = [engine.submit(job(steps=150, seed=seed)) for seed in range(4)]
    next(handles[0].events(timeout_s=30))
    engine.close()
    engine.close()
    for handle in handles:
        assert handle.is_done
        with pytest.raises(NotReady, match="closed"):
            handle.result(0)
    with pytest.raises(NotReady, match="closed"):
        engine.submit(job())


def test_many_threads_may_submit_and_cancel(make_engine: MakeEngine, oracle: Oracle, pixels: Pixels) -> None:
    outcomes: dict[int, str] = {}

    def use(number: int) -> None:
        handle = engine.submit(job(seed=number % 4, steps=2))
        if number % 3 == 0:
            handle.cancel()
        try:
            assert (pixels(handle.result(60).image) == oracle_of[number % 4]).all()
            outcomes[number] = "image"
        except Cancelled:
            outcomes[number] = "cancelled"

    oracle_of = [oracle(job(seed=seed, steps=2)) for seed in range(4)]
    with make_engine() as engine:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert outcomes.keys() == set(range(40))
    assert all(outcomes[number] == "image" for number in range(40) if number % 3)


def test_the_heart_beats_at_work_and_at_rest(make_engine: MakeEngine) -> None:
    with make_engine() as engine:
        for wait_s in (0.0, 1.2):
            time.sleep(wait_s)
            assert time.monotonic() - engine.heartbeat < 1.0
        handle = engine.submit(job(steps=150))
        before = engine.heartbeat
        list(zip(range(4), handle.events(timeout_s=30), strict=False))
        assert engine.heartbeat > before
        handle.cancel()


def test_a_done_job_leaves_nothing_behind(make_engine: MakeEngine) -> None:
    engine = make_engine(prompt_cache_entries=0)

    def tensors() -> int:
        engine.submit(job())
        engine.run_until_idle()
        gc.collect()
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    tensors()
    assert tensors() == tensors()


def test_graphs_need_a_gpu(make_engine: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="engine.cuda_graphs needs the base on a CUDA GPU"):
        make_engine(cuda_graphs=True)


@pytest.mark.parametrize(
    ("mode", "max_batch", "buckets"),
    [
        ("regional", 1, (2,)),
        ("regional", 8, (2, 4, 6, 8, 10, 12, 14, 16)),
        ("regional", 12, (2, 4, 8, 12, 16, 20, 24)),
        ("full", 8, (2, 4, 8, 16)),
        ("full", 6, (2, 4, 8, 12)),
        ("none", 8, ()),
    ],
)
def test_batches_are_filled_up_to_what_is_warmed_up(
    make_engine: MakeEngine, mode: str, max_batch: int, buckets: tuple[int, ...]
) -> None:
    assert make_engine(exact=False, compile=mode, max_batch=max_batch)._row_buckets() == buckets
