"""Jobs with adapters in the engine: right images, no endless waiting, failures that stay alone, nothing left behind."""

import dataclasses
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lorafleet.core.errors import (
    AdapterBusy,
    AdapterIncompatible,
    AdapterUnreadable,
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    LorafleetError,
    NotReady,
)
from lorafleet.core.generation import GenerationRequest
from lorafleet.sdxl.base import Base
from lorafleet.sdxl.lora import Adapter, LowRank
from lorafleet.sdxl.lora_random import random_adapter
from lorafleet.sdxl.lora_read import read_adapter
from lorafleet.sdxl.lora_targets import Targets, targets_of
from lorafleet.sdxl.lora_write import write_adapter
from lorafleet.serve.config import EngineSettings
from lorafleet.serve.engine import Cancelled, Engine, Event, Job, JobAdapter, Step
from lorafleet.serve.engine.bank import AdapterBank

MakeEngine = Callable[..., Engine]
Oracle = Callable[[Job], Any]
Pixels = Callable[[Image.Image], Any]
Style = Callable[..., JobAdapter]
UNET = r"unet\..+\.attn[12]\..+"
TEXT = r"text_encoder(_2)?\..+fc1"


@pytest.fixture(scope="module")
def targets(emojixl: Base) -> Targets:
    return targets_of(emojixl)


@pytest.fixture
def style(targets: Targets) -> Style:
    """An adapter of a job by number, over the UNet and both text encoders unless `modules` says otherwise."""

    def make(number: int, weight: float = 1.0, load: Callable[[], Adapter] | None = None, **options: Any) -> JobAdapter:
        made = partial(random_adapter, targets, number, **{"ranks": (1 + number % 5, 3), "alphas": (2.5,), **options})
        return JobAdapter(f"{number} {options}", weight, load or made)

    return make


def job(*adapters: JobAdapter, seed: int = 0, **options: Any) -> Job:
    names = ("deadline", "on_event")
    own = {name: options.pop(name) for name in names if name in options}
    request = {"width": 64, "height": 64, "prompt": "yellow star", "steps": 3, **options}
    return Job(GenerationRequest(**request), seed, adapters=adapters, **own)


def bank_of(engine: Engine) -> AdapterBank:
    assert engine.bank is not None
    return engine.bank


def leased(engine: Engine) -> int:
    return bank_of(engine).stats().leased


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Gate:
    """A load that waits until it is let through."""

    def __init__(self, load: Callable[[], Adapter]) -> None:
        self._load = load
        self.is_entered, self._is_open = threading.Event(), threading.Event()

    def open(self) -> None:
        self._is_open.set()

    def __call__(self) -> Adapter:
        self.is_entered.set()
        assert self._is_open.wait(20)
        return self._load()


# ---- images ----


@pytest.mark.parametrize("background", [True, False])
def test_each_image_of_a_batch_has_its_own_adapters(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, style: Style, background: bool
) -> None:
    jobs = [
        job(style(0, 0.7), negative_prompt="green"),
        job(style(1, -0.5), style(2, 1.3), style(3, 0.0), style(4, 0.4)),
        job(),
        job(style(0), guidance_scale=1.0, scheduler="heun"),
        job(style(5, ranks=(64,), alphas=(7,), modules=UNET), style(0, 0.2), style(0, 0.3)),
    ]
    with make_engine(exact=False, background=background, bank={"slots": 6}, row_buckets=(4, 16)) as engine:
        handles = [engine.submit(one) for one in jobs]
        for one, handle in zip(jobs, handles, strict=True):
            assert abs(pixels(handle.result(60).image) - oracle(one)).max() < 2
        assert leased(engine) == 0
    images = [oracle(one) for one in jobs]
    assert all(
        abs(image - oracle(dataclasses.replace(one, adapters=()))).mean() > 2
        for one, image in zip(jobs, images, strict=True)
        if one.adapters
    )


@pytest.mark.parametrize("exact_jobs", [1, 3])
def test_exact_images_depend_neither_on_neighbours_nor_on_slots(
    make_engine: MakeEngine, pixels: Pixels, style: Style, exact_jobs: int
) -> None:
    engine = make_engine(exact=True, exact_jobs=exact_jobs, bank={"slots": 5, "max_rank": 7})
    jobs = [job(style(i, 0.8), style(i + 1, -0.4), seed=i) for i in range(5)]
    together = [engine.submit(one) for one in jobs]
    engine.run_until_idle()
    for one, handle in zip(reversed(jobs), reversed(together), strict=True):
        alone = engine.submit(one)
        engine.run_until_idle()
        assert (pixels(handle.result().image) == pixels(alone.result().image)).all()


def test_every_halved_batch_gets_its_own_rows(
    own: Base, make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, style: Style
) -> None:
    def limit(_: object, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(exact=False, bank={"slots": 4}, row_buckets=(2, 4, 8, 16))
    handles = [engine.submit(job(style(i), seed=i)) for i in range(4)]
    hook = own.pipeline.unet.register_forward_pre_hook(limit)
    try:
        engine.run_until_idle()
    finally:
        hook.remove()
    for handle in handles:
        assert abs(pixels(handle.result().image) - oracle(handle.job)).max() < 2


def test_prompts_are_encoded_anew_only_with_adapters_that_change_a_text_encoder(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, style: Style
) -> None:
    engine = make_engine(bank={"slots": 4})

    def misses(*adapters: JobAdapter) -> int:
        before = engine.prompts.misses
        handle = engine.submit(job(*adapters))
        engine.run_until_idle()
        assert abs(pixels(handle.result().image) - oracle(handle.job)).max() < 2
        assert (engine.prompts.misses - before) % 2 == 0  # the prompt, and the negative one
        return (engine.prompts.misses - before) // 2

    in_unet, in_text = partial(style, 0, modules=UNET), partial(style, 1, modules=TEXT)
    assert misses() == 1
    assert misses(in_unet(1.0)) == 0
    assert misses(in_text(1.0)) == 1
    assert misses(in_text(0.5)) == 1
    assert misses(in_text(0.0)) == 0
    assert misses(in_unet(0.3), in_text(0.5)) == 0
    assert misses(style(2, modules=TEXT)) == 1
    assert misses() == 0


# ---- waiting ----


def test_a_slow_load_holds_up_nobody_else(make_engine: MakeEngine, style: Style) -> None:
    slow = Gate(style(0).load)
    with make_engine(bank={"slots": 2}) as engine:
        first = engine.submit(job(style(0, load=slow)))
        assert slow.is_entered.wait(20)
        for _ in range(3):
            engine.submit(job(style(1))).result(20)
        assert not first.is_done
        slow.open()
        first.result(20)
        assert bank_of(engine).stats().fills == 2


def test_an_adapter_joins_at_a_step_boundary(make_engine: MakeEngine, style: Style) -> None:
    slow = Gate(style(0).load)
    seen: list[str] = []

    def listen(name: str) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            seen.append(name if isinstance(event, Step) else type(event).__name__)
            if seen.count("long") == 2:
                slow.open()

        return tell

    engine = make_engine(exact=False, bank={"slots": 2})
    engine.submit(job(steps=40, on_event=listen("long")))
    engine.submit(job(style(0, load=slow), steps=2, on_event=listen("short")))
    engine.run_until_idle()
    assert seen.count("short") == 2
    assert 2 <= seen.index("short") - 1 < seen.index("Finished") < seen.index("long", seen.index("Finished"))


def test_jobs_that_need_each_other_s_slots_do_not_wait_for_ever(make_engine: MakeEngine, style: Style) -> None:
    with make_engine(bank={"slots": 2, "max_wait_s": 60}) as engine:
        pairs = [(0, 1), (1, 0), (2, 1), (0, 2), (3, 0), (2, 3)] * 4
        handles = [engine.submit(job(style(a), style(b), steps=1)) for a, b in pairs]
        for handle in handles:
            handle.result(60)
        assert leased(engine) == 0


def test_who_waits_for_a_slot_holds_none(make_engine: MakeEngine, style: Style) -> None:
    """One slot gets free, then a more urgent job comes: if the first one kept that slot, both would wait for ever."""
    with make_engine(bank={"slots": 2, "max_wait_s": 10}) as engine:
        held = [bank_of(engine).acquire(f"outside {i}", style(i).load) for i in range(2)]
        first = engine.submit(job(style(0), style(1)))
        held[0].release()
        engine.submit(job()).result(20)  # there was time to take it
        urgent = engine.submit(job(style(3), style(2), deadline=time.monotonic() + 1000))
        engine.submit(job()).result(20)
        held[1].release()
        urgent.result(20)
        first.result(20)


def test_who_needs_many_slots_is_not_passed_for_ever(make_engine: MakeEngine, style: Style) -> None:
    """Two adapters are always in use by jobs that come again and again; another one needs both of their slots."""
    done: list[str] = []
    with make_engine(bank={"slots": 2}, max_skipped_turns=3) as engine:

        def again(number: int, event: Event) -> None:
            if isinstance(event, Step) and event.done == 1 and len(done) < 200:
                done.append("one")
                engine.submit(job(style(number), steps=2, on_event=partial(again, number)))

        for number in (0, 1):
            engine.submit(job(style(number), steps=2, on_event=partial(again, number)))
        engine.submit(job(style(2), style(3), steps=1)).result(60)
        assert len(done) < 50
        done.extend(["enough"] * 200)


def test_a_queue_that_moves_is_waited_for(make_engine: MakeEngine, style: Style) -> None:
    """Longer than `max_wait_s`, as long as others get the slot meanwhile."""

    def slow(number: int) -> Adapter:
        time.sleep(0.4)
        return style(number).load()

    with make_engine(bank={"slots": 1, "max_wait_s": 1.5}) as engine:
        for handle in [engine.submit(job(style(i, load=partial(slow, i)), steps=1)) for i in range(6)]:
            handle.result(60)


def test_waiting_ends_with_the_deadline_the_patience_and_the_job(make_engine: MakeEngine, style: Style) -> None:
    with make_engine(bank={"slots": 1, "max_wait_s": 1.5}) as engine:
        held = bank_of(engine).acquire("outside", style(9).load)
        patient, cancelled = engine.submit(job(style(0))), engine.submit(job(style(1)))
        late = engine.submit(job(style(2), deadline=time.monotonic() + 0.1))
        with pytest.raises(DeadlineExceeded):
            late.result(20)
        cancelled.cancel()
        with pytest.raises(Cancelled):
            cancelled.result(20)
        with pytest.raises(AdapterBusy, match="raise bank.slots") as caught:
            patient.result(20)
        assert caught.value.retry_after_s >= 1
        held.release()
        engine.submit(job(style(0))).result(20)


# ---- every end gives the slots back ----


def test_every_end_gives_the_slots_back(make_engine: MakeEngine, style: Style) -> None:
    def dawdle(_: Event) -> None:
        time.sleep(0.02)

    slow = Gate(style(3).load)
    with make_engine(bank={"slots": 4}) as engine:
        finished = engine.submit(job(style(0)))
        running = engine.submit(job(style(1), steps=150))
        late = engine.submit(job(style(2), steps=150, deadline=time.monotonic() + 1.0, on_event=dawdle))
        loading = engine.submit(job(style(3, load=slow)))
        finished.result(20)
        next(running.events(timeout_s=20))
        running.cancel()
        assert slow.is_entered.wait(20)
        loading.cancel()
        for handle, kind in ((running, Cancelled), (loading, Cancelled), (late, DeadlineExceeded)):
            with pytest.raises(kind):
                handle.result(20)
        assert leased(engine) == 0
        slow.open()
        until(lambda: bank_of(engine).stats().resident == 4)
        again = engine.submit(job(style(3, load=slow)))
        again.result(20)
        assert bank_of(engine).stats().fills == 4


def test_closing_gives_the_base_back(own: Base, make_engine: MakeEngine, style: Style) -> None:
    before = list(own.pipeline.unet.modules())
    slow = Gate(style(3).load)
    engine = make_engine(bank={"slots": 2}).start()
    assert list(own.pipeline.unet.modules()) != before
    handles = [engine.submit(job(style(i), steps=150)) for i in range(3)]
    handles.append(engine.submit(job(style(3, load=slow))))
    next(handles[0].events(timeout_s=20))
    slow.open()
    engine.close()
    for handle in handles:
        with pytest.raises(NotReady, match="closed"):
            handle.result(0)
    assert leased(engine) == 0
    assert list(own.pipeline.unet.modules()) == before


# ---- failures stay with the job ----


def raising(error: Exception) -> Callable[[], Adapter]:
    def load() -> Adapter:
        raise error

    return load


def test_bad_adapters_fail_alone_and_typed(
    make_engine: MakeEngine, oracle: Oracle, pixels: Pixels, style: Style, targets: Targets, tmp_path: Path
) -> None:
    sound = random_adapter(targets, 0)
    name, module = next(iter(sound.modules.items()))
    cut, strange = tmp_path / "cut.safetensors", tmp_path / "strange.safetensors"
    write_adapter(sound, cut)
    cut.write_bytes(cut.read_bytes()[:-100])
    write_adapter(Adapter({f"{name}.more": module}), strange)
    nan = Adapter({name: LowRank(module.a * float("nan"), module.b, 1.0)})
    bad: list[tuple[Callable[[], Adapter], type[LorafleetError], str]] = [
        (lambda: read_adapter(cut, targets), AdapterUnreadable, "no whole"),
        (lambda: read_adapter(strange, targets), AdapterIncompatible, "more"),
        (lambda: nan, AdapterIncompatible, "NaN"),
        (lambda: dataclasses.replace(sound, base_fingerprint="f" * 64), AdapterIncompatible, "another base"),
        (lambda: random_adapter(targets, 0, ranks=(9,)), AdapterIncompatible, "rank 9"),
        (lambda: Adapter({"unet.nowhere": module}), AdapterIncompatible, "nowhere"),
        (raising(OSError("the disk is gone")), AdapterUnreadable, "the disk is gone"),
        (raising(torch.OutOfMemoryError("no room")), AdapterUnreadable, "no room"),
    ]
    engine = make_engine(exact=True, exact_jobs=3, bank={"slots": 3, "max_rank": 8, "max_wait_s": 10})
    alone = [engine.submit(job(style(1), seed=seed)) for seed in range(2)]
    engine.run_until_idle()
    for i, (load, kind, words) in enumerate(bad):
        handles = [engine.submit(job(style(1), seed=0))]
        failing = [engine.submit(job(style(100 + i, load=load), style(1, 0.5))) for _ in range(2)]
        handles.append(engine.submit(job(style(1), seed=1)))
        engine.run_until_idle()
        for handle in failing:
            with pytest.raises(kind, match=words):
                handle.result(0)
        for handle, other in zip(handles, alone, strict=True):
            assert (pixels(handle.result().image) == pixels(other.result().image)).all()
        assert leased(engine) == 0
    three = engine.submit(job(style(1), style(2), style(3)))  # no slot was lost
    engine.run_until_idle()
    assert abs(pixels(three.result().image) - oracle(three.job)).max() < 2


def test_an_adapter_may_be_loaded_again_after_a_failure(make_engine: MakeEngine, style: Style) -> None:
    engine = make_engine(bank={"slots": 1})
    first = engine.submit(job(style(0, load=raising(OSError("gone")))))
    engine.run_until_idle()
    with pytest.raises(AdapterUnreadable):
        first.result()
    second = engine.submit(job(style(0)))
    engine.run_until_idle()
    assert second.result().image.size == (64, 64)


def test_what_an_adapter_makes_infinite_fails_at_once_and_alone(
    make_engine: MakeEngine, pixels: Pixels, style: Style
) -> None:
    engine = make_engine(exact=True, exact_jobs=2, bank={"slots": 2})
    good, bad = engine.submit(job(style(0))), engine.submit(job(style(1, 1e38), steps=10))
    engine.run_until_idle()
    alone = engine.submit(job(style(0)))
    engine.run_until_idle()
    with pytest.raises(GenerationFailed, match="after step 1 of 10"):
        bad.result()
    assert (pixels(good.result().image) == pixels(alone.result().image)).all()


def test_a_device_that_breaks_down_during_a_fill_ends_the_engine(make_engine: MakeEngine, style: Style) -> None:
    with make_engine(bank={"slots": 1}) as engine:
        handle = engine.submit(job(style(0, load=raising(torch.AcceleratorError("an illegal memory access")))))
        with pytest.raises(NotReady, match="the engine failed"):
            handle.result(20)
        assert isinstance(engine.failure, torch.AcceleratorError)
        assert leased(engine) == 0


# ---- what is refused at once ----


def test_adapters_that_cannot_be_are_refused_at_once(make_engine: MakeEngine, style: Style) -> None:
    with pytest.raises(InvalidRequest, match=r"set engine\.bank") as caught:
        make_engine().submit(job(style(0)))
    assert caught.value.param == "adapters"
    engine = make_engine(bank={"slots": 2, "per_row": 3})
    for adapters, words in (
        ([style(0)] * 4, "4, an image may combine 3"),
        ([style(0), style(1), style(2)], "raise engine.bank.slots"),
        ([style(0, float("nan"))], "finite"),
    ):
        with pytest.raises(InvalidRequest, match=words):
            engine.submit(job(*adapters))


def test_a_bank_must_hold_the_largest_batch() -> None:
    for settings in ({"max_batch": 9}, {"exact_jobs": 9}, {"row_buckets": (4, 18)}):
        with pytest.raises(ValueError, match=r"set bank\.rows=18 or leave it out"):
            EngineSettings.model_validate({"bank": {"rows": 16}, **settings})
        for bank in ({}, {"rows": 18}):
            chosen = EngineSettings.model_validate({"bank": bank, **settings}).bank
            assert chosen is not None
            assert chosen.rows == 18
